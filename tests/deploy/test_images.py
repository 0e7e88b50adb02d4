"""Dockerfiles and what runs in them, short of running a container."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.deploy import dockerfile

ENTRYPOINT = "deploy/images/entrypoint.sh"


def test_hadolint_has_nothing_to_say(tool: Callable[[str], str], root: Path) -> None:
    files = [str(root / f"deploy/Dockerfile.{name}") for name in ("cpu", "cuda")]
    done = subprocess.run([tool("hadolint"), *files], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_images_run_as_an_ordinary_user_without_secrets(name: str, root: Path) -> None:
    text = (root / f"deploy/Dockerfile.{name}").read_text()
    final = text[text.rindex("\nFROM ") :]
    assert re.findall(r"^USER (.*)$", final, re.MULTILINE) == ["10001:10001"]
    assert "HEALTHCHECK" in final
    assert "VLLM_SPARSE_STRICT=1" in final
    assert not re.search(r"API_KEY|HF_TOKEN|PASSWORD", final)
    copied = re.findall(r"^COPY (?!--from)(?:--\S+ )?(.*) \S+$", text, re.MULTILINE)
    for source in " ".join(copied).replace("${VERSION}", "*").split():
        kept = subprocess.run(["git", "check-ignore", "-q", source], cwd=root, check=False).returncode
        assert list(root.glob(source)) or kept == 0, source  # there, or built (dist/)


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_the_final_stage_starts_the_entry_point_it_copied(name: str, root: Path) -> None:
    final = dockerfile.read(root / f"deploy/Dockerfile.{name}")[-1]
    found = {one.keyword: one.text for one in final.instructions}
    (entrypoint,) = dockerfile.words(found["ENTRYPOINT"])
    program, check = dockerfile.words(found["HEALTHCHECK"].partition("CMD ")[2])
    assert (program, Path(entrypoint).parent) == ("python3", Path(check).parent)
    copied = [one.text for one in final.instructions if one.keyword == "COPY"]
    assert any(entrypoint.endswith(Path(ENTRYPOINT).name) and ENTRYPOINT in text for text in copied)
    words = dockerfile.words(found["CMD"])
    assert words[0] == "/models/model"
    assert int(words[words.index("--shutdown-timeout") + 1]) > 0


def test_dockerfiles_are_read_as_docker_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "Dockerfile"
    path.write_text(
        "# about\nARG TAG=1\nFROM base:${TAG} AS one\nENV A=b \\\n    C=$A\n# between\n"
        'RUN x \\\n  # within\n  && y\nFROM other\nCMD ["a", "b c"]\n'
    )
    first, second = dockerfile.read(path, {"TAG": "2"})
    assert (first.base, first.name, second.base, second.name) == ("base:2", "one", "other", None)
    assert [(one.keyword, one.text) for one in first.instructions] == [("ENV", "A=b C=$A"), ("RUN", "x && y")]
    assert dockerfile.pairs(first.instructions[0].text) == [("A", "b"), ("C", "$A")]
    assert dockerfile.words(second.instructions[0].text) == ["a", "b c"]
    assert dockerfile.expand("$A/${B}-$C", {"A": "x", "B": "y"}) == "x/y-"
    path.write_text("FROM a\nADD x y\n")
    with pytest.raises(ValueError, match="ADD"):
        dockerfile.read(path)


def test_the_locked_torch_is_the_one_in_the_image(root: Path) -> None:
    setup = (root / "deploy/environment/setup.sh").read_text()
    image = (root / "deploy/Dockerfile.cpu").read_text()
    wanted = re.search(r"torch==([\d.]+)", setup)
    assert wanted is not None
    assert f"torch=={wanted[1]}" in image
    version = re.search(r"vllm==([\d.]+)", (root / "deploy/environment/cuda.lock").read_text())
    assert version is not None
    assert f"ARG VLLM_VERSION={version[1]}" in (root / "deploy/Dockerfile.cuda").read_text()


@pytest.fixture
def run_entrypoint(root: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the entry point with programs that say what they were called with."""
    for name in ("vllm", "vllm-sparse"):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho "{name} $* key=${{VLLM_API_KEY:-none}}"\n')
        program.chmod(0o755)

    def call(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", str(root / ENTRYPOINT), *words],
            env={"PATH": f"{tmp_path}:{os.environ['PATH']}", **env},
            capture_output=True,
            text=True,
            check=False,
        )

    return call


def test_no_key_no_server(run_entrypoint: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = run_entrypoint("/models/model", "--host", "0.0.0.0")
    assert done.returncode == 2
    assert "no API key" in done.stderr
    assert done.stdout == ""
    for words in (("/m",), ("/m", "--host=10.0.0.1"), ("/m", "--host", "::")):
        assert run_entrypoint(*words).returncode == 2


@pytest.mark.parametrize("words", [("--host", "127.0.0.1"), ("--host=localhost",), ("--host", "::1")])
def test_loopback_needs_none(
    words: tuple[str, ...], run_entrypoint: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = run_entrypoint("/m", *words)
    assert done.stdout == f"vllm serve /m {' '.join(words)} key=none\n"


def test_key_from_a_mounted_secret(
    tmp_path: Path, run_entrypoint: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    (tmp_path / "key").write_text("abc123\n")
    done = run_entrypoint("/m", VLLM_API_KEY_FILE=str(tmp_path / "key"))
    assert done.stdout == "vllm serve /m key=abc123\n"
    assert "abc123" not in done.stderr
    missing = run_entrypoint("/m", VLLM_API_KEY_FILE=str(tmp_path / "none"))
    assert missing.returncode == 2
    assert "cannot be read" in missing.stderr


def test_other_commands(run_entrypoint: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = run_entrypoint("convert", "/models/a", "/models/b", "--resume")
    assert done.stdout == "vllm-sparse convert /models/a /models/b --resume key=none\n"


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1), (None, 1)])
def test_health_check(status: int | None, code: int, root: Path) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/health"
            self.send_response(status or 500)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    port = server.server_port
    if status is None:
        server.server_close()
    else:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        done = subprocess.run(
            [sys.executable, str(root / "deploy/images/healthcheck.py")],
            # Docker's client may set a proxy for every container; it cannot reach this loopback.
            env={**os.environ, "PORT": str(port), "http_proxy": "http://127.0.0.1:9", "no_proxy": ""},
            capture_output=True,
            check=False,
        )
        assert done.returncode == code
    finally:
        if status is not None:
            server.shutdown()
            server.server_close()
