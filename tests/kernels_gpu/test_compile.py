"""Every kernel compiles ahead of time, without a GPU, and takes what a program may take."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def compile_report(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the interpreter's mode and vLLM's stand-in for Triton stay out of it."""
    return subprocess.run(
        [sys.executable, "-m", "vllm_sparse.kernels.triton.compile_report", *arguments],
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
    assert len(lines) == 26
    products = [line for line in lines if " dot " in line]
    assert len(products) == 11
    assert all("mma" in line for line in products)


def test_one_kernel_compiles():
    """The cheapest proof that the toolchain works, on the architecture of most data centres."""
    result = compile_report("--arch", "90", "--only", "expand bf16")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "expand bf16" in result.stdout


def test_a_kernel_name_that_matches_nothing_is_an_error():
    result = compile_report("--arch", "90", "--only", "abacus")
    assert result.returncode == 2
    assert "abacus" in result.stderr
