"""Every kernel compiles ahead of time, without a GPU, and takes what a program may take."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

from vllm_sparse.errors import UnsupportedError
from vllm_sparse.kernels.cuda import build, library

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def compile_report(*arguments: str, kernels: str = "triton") -> subprocess.CompletedProcess[str]:
    """In a process of its own: the interpreter's mode and vLLM's stand-in for Triton stay out of it."""
    return subprocess.run(
        [sys.executable, "-m", f"vllm_sparse.kernels.{kernels}.compile_report", *arguments],
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_all_kernels_compile(arch):
    """Exit status 1 would mean spilled registers or too much shared memory."""
    result = compile_report("--arch", str(arch))
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith(f"sm{arch}")]
    assert len(lines) == 28
    products = [line for line in lines if " dot " in line]
    assert len(products) == 13
    assert all("mma" in line for line in products)


def has_nvcc() -> bool:
    try:
        build.find_nvcc()
    except UnsupportedError:
        return False
    return True


needs_nvcc = pytest.mark.skipif(not has_nvcc(), reason="no nvcc here")


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_all_cuda_kernels_compile(arch):
    """Exit status 1 would mean local memory, or no sparse tensor cores or asynchronous copies."""
    result = compile_report("--arch", str(arch), kernels="cuda")
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith(f"sm{arch}")]
    # Four storages of the weights, two types of activations, five sizes; on 9.0 sixteen of wgmma_sp too, and
    # five of wgmma_sp_tma, of which int8 and fp8 weights have those with activations in 8 bits besides.
    assert len(set(lines)) == 40 + (128 + 60 if arch == 90 else 0)


@needs_nvcc
@pytest.mark.slow
def test_the_library_builds_and_has_the_interface(tmp_path):
    """For one architecture; loading it needs no GPU, and a launch without one is an error in words."""
    path = build.build(tmp_path / "kernels.so", [90], 1)
    assert [item.name for item in tmp_path.iterdir()] == ["kernels.so"]
    opened = library.open_library(path)
    assert opened.sparse24_error(-1) == b"no such instance"
    launch = library.Launch(half=0, format=0, token_tiles=3, row_tiles=1, warps=4, splits=1)
    assert opened.sparse24_mma_sp(library.Problem(stages=3), launch, 0) == -1


def test_one_kernel_compiles():
    """The cheapest proof that the toolchain works, on the architecture of most data centres."""
    result = compile_report("--arch", "90", "--only", "expand bf16")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "expand bf16" in result.stdout


def test_a_kernel_name_that_matches_nothing_is_an_error():
    result = compile_report("--arch", "90", "--only", "abacus")
    assert result.returncode == 2
    assert "abacus" in result.stderr


def test_without_a_compiler_it_says_where_it_looked(monkeypatch, capsys):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    assert build.main(["--arch", "90"]) == 2
    assert "$CUDACXX" in capsys.readouterr().err


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path, capsys):
    """Nothing half-written is left."""
    compiler = tmp_path / "nvcc"
    compiler.write_text("#!/bin/sh\necho unsupported gpu architecture >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(compiler))
    out = tmp_path / "out" / "kernels.so"
    assert build.main(["--arch", "7", "--out", str(out)]) == 2
    assert "unsupported gpu architecture" in capsys.readouterr().err
    assert not list(out.parent.iterdir())


def test_the_library_is_optional(monkeypatch, tmp_path, caplog):
    """Missing or broken, it is a reason, said once in the log."""
    broken = tmp_path / "broken.so"
    broken.write_text("not a library")
    caplog.set_level("INFO")
    for path, reason in ((tmp_path / "none.so", "are not built"), (broken, "do not load")):
        monkeypatch.setenv(library.ENV_LIBRARY, str(path))
        library._load.cache_clear()
        try:
            assert reason in library.load_failure()
            assert reason in library.load_failure()
            with pytest.raises(UnsupportedError, match=reason):
                library.start(library.Problem(), library.Launch(), 0)
        finally:
            library._load.cache_clear()
        assert caplog.text.count(reason) == 1
