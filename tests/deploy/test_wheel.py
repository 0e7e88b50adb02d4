"""What `make dist` makes: it installs beside vLLM, carries every kernel level, and serves."""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import server
from bench.server import Server

pytestmark = [pytest.mark.slow, pytest.mark.e2e]
LEVELS = ("scalar", "avx2", "avx512", "avx512bf16")


@pytest.fixture(scope="module")
def dist(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheel built from the sdist, from a copy of what is committed or about to be."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=root,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().rstrip("\0").split("\0"):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (root / name).is_file():
            target.write_bytes((root / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out)],
        cwd=source,
        env={**os.environ, "VLLM_SPARSE_REQUIRE_EXTENSION": "1"},
        check=True,
        capture_output=True,
        timeout=1500,
    )
    return out


@pytest.fixture(scope="module")
def clean(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``bin/`` of a fresh environment: this one's packages, but vllm-sparse from the wheel."""
    folder = tmp_path_factory.mktemp("clean")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    site = next((folder / "lib").glob("python*")) / "site-packages"
    (site / "vllm.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--force-reinstall", str(next(dist.glob("*.whl")))], check=True)
    program = folder / "bin" / "vllm"
    program.write_text(
        # As pip writes it; the guard is for vLLM's own processes, which import this file again.
        f"#!{folder}/bin/python\nimport sys\nfrom vllm.entrypoints.cli.main import main\n"
        "if __name__ == '__main__':\n    sys.exit(main())\n"
    )
    program.chmod(0o755)
    return folder / "bin"


def test_metadata(dist: Path, tool: Callable[[str], str]) -> None:
    files = [str(path) for path in dist.iterdir()]
    assert len(files) == 2
    subprocess.run([tool("twine"), "check", "--strict", *files], check=True, capture_output=True)


def test_contents(dist: Path) -> None:
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        names = wheel.namelist()
    assert "vllm_sparse/kernels/_cpu.abi3.so" in names
    tops = {name.split("/")[0] for name in names}
    assert {name for name in tops if not name.endswith(".dist-info")} == {
        "vllm_sparse",
        "converters",
        "bench",
    }
    with tarfile.open(next(dist.glob("*.tar.gz"))) as sdist:
        held = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    assert {"vllm_sparse/kernels/csrc/kernel.h", "vllm_sparse/kernels/csrc/ops.cpp", "setup.py"} <= held


@pytest.mark.parametrize("level", LEVELS)
def test_kernels_of_every_level(level: str, clean: Path, tmp_path: Path) -> None:
    code = (
        "import json, vllm_sparse\n"
        "from vllm_sparse.kernels import library\n"
        "print(json.dumps([vllm_sparse.__file__, library.load_failure(), library.current_isa().name]))\n"
    )
    done = subprocess.run(
        [str(clean / "python"), "-c", code],
        cwd=tmp_path,
        env={**os.environ, "VLLM_SPARSE_ISA": level, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    if "this processor executes" in done.stderr:
        pytest.skip(f"this processor does not execute {level}")
    place, failure, found = json.loads(done.stdout)
    assert place.startswith(str(clean.parent))
    assert failure is None
    assert found.lower() == level


def test_serves(
    clean: Path, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "vllm_program", lambda: str(clean / "vllm"))
    monkeypatch.setenv("PYTHONPATH", "")
    flags = ("--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "4")
    with Server(models["compressed"], flags=flags, log_path=tmp_path / "log") as running:
        body = json.dumps({"model": running.name, "prompt": "def main", "max_tokens": 4}).encode()
        request = urllib.request.Request(
            running.base_url + "/v1/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] >= 1
        with urllib.request.urlopen(running.base_url + "/metrics", timeout=20) as page:
            text = page.read().decode()
    assert 'vllm_sparse:info{backend="cpu",format="bf16"' in text
    assert "8 layers sparse" in (tmp_path / "log").read_text()
