"""Builds deploy/Dockerfile.cpu without Docker and serves from the result: debootstrap, chroot, namespaces.

    python -m tests.deploy.chroot_image build --work DIR [--build-arg NAME=VALUE] [--bind PATH]
    python -m tests.deploy.chroot_image serve --work DIR --model MODEL_DIR

``build`` runs every instruction of the Dockerfile, in order, in a Debian made by debootstrap; it needs root.
``serve`` starts ENTRYPOINT with CMD as the image's user, with the root file system and the model
read-only, a tmpfs on /tmp, no capabilities, process and network namespaces of its own; then it runs the
HEALTHCHECK, asks for a completion with and without the key, tries to write, and stops it with SIGTERM amid
an answer. It is no container runtime: cgroup limits, seccomp and image layers are not tried.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.deploy import dockerfile

ROOT = Path(__file__).parents[2]
FILE = ROOT / "deploy" / "Dockerfile.cpu"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
KEY = "a-key-of-this-check"
_IGNORED = shutil.ignore_patterns("__pycache__", "*.so", "*.o")
_START_S = 900.0
_STOP_S = 90.0


@dataclass(slots=True)
class Image:
    """What a stage came to: its root file system and the settings a container starts with."""

    rootfs: Path
    env: dict[str, str] = field(default_factory=lambda: {"PATH": PATH})
    arguments: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = "0:0"
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)

    def settings(self) -> dict[str, object]:
        """What ``serve`` needs later."""
        names = ("env", "workdir", "user", "entrypoint", "command", "healthcheck")
        return {name: getattr(self, name) for name in names}


class Builder:
    """Runs a Dockerfile's stages.

    Args:
        work: Where the file systems go.
        base: A file system of the base image's distribution, copied for every stage.
        build_args: As ``docker build --build-arg``.
        binds: Host paths that RUN sees read-only at the same place (package indexes, certificates).
        extra_env: Environment of RUN alone (a proxy, pip's certificate).
    """

    def __init__(
        self,
        work: Path,
        base: Path,
        build_args: Mapping[str, str],
        binds: Sequence[Path],
        extra_env: Mapping[str, str],
    ) -> None:
        self._work, self._base, self._build_args = work, base, build_args
        self._binds, self._extra_env = binds, extra_env
        self._images: dict[str, Image] = {}

    def build(self) -> Image:
        """All stages; the last one's image."""
        image = None
        for number, stage in enumerate(dockerfile.read(FILE, self._build_args)):
            name = stage.name or f"stage-{number}"
            rootfs = self._work / name
            subprocess.run(["cp", "-a", "--reflink=auto", str(self._base), str(rootfs)], check=True)
            image = self._images[name] = Image(rootfs)
            for instruction in stage.instructions:
                print(f"{name}: {instruction.keyword} {instruction.text[:100]}", flush=True)
                self._do(image, instruction)
        if image is None:
            raise ValueError(f"{FILE} has no stage")
        (self._work / "image.json").write_text(
            json.dumps({"rootfs": image.rootfs.name, **image.settings()}, indent=1)
        )
        return image

    def _do(self, image: Image, instruction: dockerfile.Instruction) -> None:
        text = instruction.text
        match instruction.keyword:
            case "ARG":
                name, _, value = text.partition("=")
                image.arguments[name] = self._build_args.get(name, value)
            case "ENV":
                known = {**image.arguments, **image.env}
                image.env |= {name: dockerfile.expand(value, known) for name, value in dockerfile.pairs(text)}
            case "WORKDIR":
                image.workdir = text
                (image.rootfs / text.lstrip("/")).mkdir(parents=True, exist_ok=True)
            case "USER":
                image.user = text
            case "ENTRYPOINT":
                image.entrypoint = dockerfile.words(text)
            case "CMD":
                image.command = dockerfile.words(text)
            case "HEALTHCHECK":
                image.healthcheck = dockerfile.words(text.partition("CMD ")[2])
            case "COPY":
                self._copy(image, text)
            case "RUN":
                self._run(image, text)
            case "LABEL" | "EXPOSE":
                pass
            case other:
                raise ValueError(f"{other} cannot be done in a chroot")

    def _copy(self, image: Image, text: str) -> None:
        *sources, target = shlex.split(text)
        options = dict(w.lstrip("-").split("=", 1) for w in sources if w.startswith("--"))
        sources = [word for word in sources if not word.startswith("--")]
        into = image.rootfs / Path(image.workdir.lstrip("/"), target).as_posix().lstrip("/")
        if target.startswith("/"):
            into = image.rootfs / target.lstrip("/")
        if "from" in options:
            origin = self._images[options["from"]].rootfs
            for source in sources:
                into.parent.mkdir(parents=True, exist_ok=True)
                # Links instead of copies: gigabytes that nobody changes afterwards.
                subprocess.run(["cp", "-al", str(origin / source.lstrip("/")), str(into)], check=True)
            return
        for source in sources:
            place = ROOT / source
            if place.is_dir():
                shutil.copytree(place, into, dirs_exist_ok=True, ignore=_IGNORED)
                continue
            goal = into / place.name if target.endswith("/") else into
            goal.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(place, goal)
            goal.chmod(int(options.get("chmod", "0644"), 8))

    def _run(self, image: Image, text: str) -> None:
        root = shlex.quote(str(image.rootfs))
        lines = [
            f"mount -t proc proc {root}/proc",
            f"mount --rbind /dev {root}/dev",
            f"cp /etc/resolv.conf {root}/etc/resolv.conf",
        ]
        for bind in self._binds:
            place = shlex.quote(f"{image.rootfs}{bind}")
            make = "mkdir -p" if bind.is_dir() else f"mkdir -p $(dirname {place}) && touch"
            lines += [f"{make} {place}", f"mount --bind -o ro {shlex.quote(str(bind))} {place}"]
        inside = f"cd {shlex.quote(image.workdir)} && {text}"
        lines.append(f"exec chroot {root} /bin/sh -ec {shlex.quote(inside)}")
        env = {"DEBIAN_FRONTEND": "noninteractive", **self._extra_env, **image.arguments, **image.env}
        subprocess.run(["unshare", "--mount", "sh", "-ec", "\n".join(lines)], env=env, check=True)


def debian(work: Path, suite: str = "bookworm") -> Path:
    """A minimal Debian, what the base image is made from."""
    target = work / "base"
    if not target.is_dir():
        subprocess.run(["debootstrap", "--variant=minbase", suite, str(target)], check=True)
    return target


class Container:
    """The image's process in namespaces of its own.

    Args:
        work: Where ``build`` left the image.
        model: Mounted read-only at /models/model.
    """

    def __init__(self, work: Path, model: Path) -> None:
        self._settings = json.loads((work / "image.json").read_text())
        self._rootfs, self._model = work / self._settings["rootfs"], model
        self._log = work / "serve.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Container":
        root, view = shlex.quote(str(self._rootfs)), "/mnt"
        # As a container has them: its own name, and nobody to ask for others.
        (self._rootfs / "etc/hosts").write_text("127.0.0.1 localhost\n10.0.0.2 image\n")
        (self._rootfs / "etc/resolv.conf").write_text("")
        lines = [
            # A network that leads nowhere: the server must need none.
            "ip link set lo up",
            "ip addr add 10.0.0.2/32 dev lo && ip route add default dev lo",
            "hostname image",
            f"mkdir -p {root}/models/model",
            f"mount --bind {root} {view} && mount -o remount,ro,bind {view}",
            f"mount --bind {shlex.quote(str(self._model))} {view}/models/model",
            f"mount -o remount,ro,bind {view}/models/model",
            f"mount -t proc proc {view}/proc && mount -t sysfs -o ro sysfs {view}/sys",
            f"mount --rbind /dev {view}/dev",
            f"mount -t tmpfs tmpfs {view}/dev/shm && mount -t tmpfs -o mode=1777 tmpfs {view}/tmp",
            "exec " + shlex.join(self._inside([*self._settings["entrypoint"], *self._settings["command"]])),
        ]
        outer = ["unshare", "--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "--kill-child"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*outer, "sh", "-ec", "\n".join(lines)], env=self._env(), stdout=log, stderr=log
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def _env(self) -> dict[str, str]:
        return {**self._settings["env"], "VLLM_API_KEY": KEY, "VLLM_CPU_KVCACHE_SPACE": "1"}

    def _inside(self, words: Sequence[str]) -> list[str]:
        uid, gid = self._settings["user"].split(":")
        drop = ["--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", "--clear-groups"]
        return ["chroot", "/mnt", "setpriv", f"--reuid={uid}", f"--regid={gid}", *drop, *words]

    @property
    def server(self) -> int:
        """The host's number of the server's first process."""
        return self._children()[0]

    def _children(self) -> list[int]:
        if self._process is None:
            raise RuntimeError("not started")
        listed = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        return [int(word) for word in listed.read_text().split()] if listed.exists() else []

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """As ``docker exec``: the image's user and settings, in the same namespaces."""
        enter = ["nsenter", "--target", str(self.server), "--mount", "--net", "--pid", "--ipc", "--uts"]
        return subprocess.run(
            [*enter, *self._inside(words)], env=self._env(), capture_output=True, text=True, check=False
        )

    def healthy(self) -> bool:
        """What the HEALTHCHECK says; before there is a process, no."""
        return bool(self._children()) and self.run(*self._settings["healthcheck"]).returncode == 0

    def wait(self, seconds: float = _START_S) -> float:
        """Seconds until it is healthy; an error with the log's end when it is not."""
        begin = time.monotonic()
        while not self.healthy():
            ended = self._process is not None and self._process.poll() is not None
            if ended or time.monotonic() - begin > seconds:
                raise RuntimeError(f"not healthy; the log ends:\n{self.log()[-3000:]}")
            time.sleep(2)
        return time.monotonic() - begin

    def ask(self, tokens: int, key: str = KEY) -> subprocess.CompletedProcess[str]:
        """One completion, by a client in the same network namespace."""
        code = (
            "import json, sys, urllib.request as u\n"
            "body = json.dumps({'model': 'model', 'prompt': [5, 6, 7], 'max_tokens': int(sys.argv[1]),"
            " 'ignore_eos': True}).encode()\n"
            "head = {'Content-Type': 'application/json', 'Authorization': 'Bearer ' + sys.argv[2]}\n"
            "request = u.Request('http://127.0.0.1:8000/v1/completions', body, head)\n"
            "print(json.load(u.urlopen(request))['usage']['completion_tokens'])\n"
        )
        return self.run("python3", "-c", code, str(tokens), key)

    def terminate(self) -> int:
        """SIGTERM to the server; its exit code."""
        os.kill(self.server, signal.SIGTERM)
        if self._process is None:
            raise RuntimeError("not started")
        return self._process.wait(_STOP_S)

    def log(self) -> str:
        """What the server printed."""
        return self._log.read_text(errors="replace")


def serve(work: Path, model: Path) -> list[tuple[str, bool, str]]:
    """Start the image and try what deploy.md says of it: (what, holds, what was seen)."""
    from concurrent.futures import ThreadPoolExecutor

    seen: list[tuple[str, bool, str]] = []

    def note(what: str, holds: bool, detail: str = "") -> None:
        seen.append((what, holds, detail))
        print(f"{'ok ' if holds else 'NOT'}  {what}  {detail}", flush=True)

    with Container(work, model) as container:
        note("healthy by its HEALTHCHECK", True, f"after {container.wait():.0f} s")
        status = container.run("cat", "/proc/self/status").stdout.splitlines()
        facts = {line.partition(":")[0]: line.partition(":")[2].split() for line in status}
        note("ordinary user", facts["Uid"][0] == facts["Gid"][0] == "10001", " ".join(facts["Uid"]))
        note("no capabilities", int(facts["CapEff"][0], 16) == 0, facts["CapEff"][0])
        for place in ("/opt/venv/x", "/usr/x", "/models/model/x"):
            done = container.run("sh", "-c", f": > {place}")
            note(f"{place} cannot be written", "Read-only file system" in done.stderr, done.stderr.strip())
        done = container.ask(8)
        note("answers with the key", done.stdout.strip() == "8", done.stdout.strip() or done.stderr[-200:])
        done = container.ask(8, key="another")
        note("refuses another key", "401" in done.stderr, done.stderr.strip()[-60:])
        page = container.run(
            "python3", "-c",
            "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8000/metrics').read().decode())",
        ).stdout  # fmt: skip
        series = [line for line in page.splitlines() if line.startswith("vllm_sparse:")]
        sparse = next((line for line in series if 'layers{kind="sparse"}' in line), "")
        note("2:4 layers on its /metrics", float(sparse.rpartition(" ")[2] or 0) > 0, sparse)
        done = container.run("vllm-sparse", "doctor")
        note("vllm-sparse doctor", done.returncode == 0, done.stdout.strip().splitlines()[0][:80])
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(container.ask, 400)
            time.sleep(1.5)
            code = container.terminate()
            text = answer.result().stdout.strip()
        note("SIGTERM: the answer in flight came whole", text == "400", text)
        note("SIGTERM: exit code 0", code == 0, str(code))
    return seen


def _pairs(words: Sequence[str]) -> dict[str, str]:
    return dict(word.split("=", 1) for word in words)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.deploy.chroot_image",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=["build", "serve"])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--base", type=Path, help="a Debian file system; default: debootstrap makes one")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--bind", action="append", default=[], type=Path, metavar="PATH")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for RUN alone")
    parser.add_argument("--model", type=Path, help="served by `serve`")
    options = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("chroot and mounts need root")
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.action == "build":
        base = options.base or debian(options.work)
        builder = Builder(options.work, base, _pairs(options.build_arg), options.bind, _pairs(options.env))
        print(f"built: {builder.build().rootfs}")
        return 0
    if options.model is None:
        parser.error("serve needs --model DIR")
    return 0 if all(holds for _, holds, _ in serve(options.work, options.model.resolve())) else 1


if __name__ == "__main__":
    sys.exit(main())
