"""The kernels of AVX-512 and AMX where there are none: their own source, instructions by ``emulation/``.

Every processor with AVX2 runs this, those with AVX-512 too: few have AMX.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_sparse.kernels import library

from .conftest import LEVELS

REPOSITORY = Path(__file__).parents[2]
SOURCES = (
    "vllm_sparse",
    "converters",
    "tests/conftest.py",
    "tests/kernels",
    "tests/sparse24",
    "setup.py",
    "pyproject.toml",
    "README.md",
)
TIMEOUT = 1200

pytestmark = [
    pytest.mark.skipif("avx2" not in LEVELS, reason="needs AVX2, and the kernels to be built"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.timeout(TIMEOUT),
]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources whose library finds and emulates every instruction set."""
    copy = tmp_path_factory.mktemp("emulated")
    no_builds = shutil.ignore_patterns("*.so", "__pycache__")
    for name in SOURCES:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        if (REPOSITORY / name).is_dir():
            shutil.copytree(REPOSITORY / name, copy / name, ignore=no_builds)
        else:
            shutil.copy(REPOSITORY / name, copy / name)
    compiler = f"{sys.executable} {copy / 'tests/kernels/emulation/compiler.py'}"
    environment = {
        "CC": f"{compiler} gcc",
        "CXX": f"{compiler} g++",
        "VLLM_SPARSE_REQUIRE_EXTENSION": "1",
        "VLLM_SPARSE_BUILD_CUDA": "0",
    }
    run(copy, ["setup.py", "-q", "build_ext", "--inplace"], environment)
    return copy


def run(copy: Path, arguments: list[str], environment: dict[str, str] | None = None) -> str:
    """Runs Python in the copy, whose packages come first, and returns what it printed."""
    process = subprocess.run(
        [sys.executable, *arguments],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy), **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert process.returncode == 0, process.stdout
    return process.stdout


def test_every_level_is_there_and_no_real_instruction(emulated):
    levels = "from vllm_sparse.kernels import library as l; print(*l.supported_levels(), l.current_isa())"
    found = [int(level) for level in run(emulated, ["-c", levels]).split()]
    assert found == [*library.Isa, library.Isa.AMX]
    objdump = shutil.which("objdump")
    if objdump is not None:
        binary = str(emulated / "vllm_sparse/kernels/_cpu.abi3.so")
        text = subprocess.run([objdump, "-d", binary], capture_output=True, text=True, check=True).stdout
        assert "%ymm" in text
        assert "%zmm" not in text
        assert "%tmm" not in text


@pytest.mark.parametrize(
    "selection",
    [
        # Levels by their own tests, and what runs on the best level.
        [
            "tests/kernels",
            "-k",
            "not scalar and not avx2 and not emulation and not bench_kernels and not reference",
        ],
        ["tests/sparse24/test_codec.py"],
    ],
    ids=["kernels", "codec"],
)
def test_the_tests_pass(emulated, selection):
    printed = run(emulated, ["-m", "pytest", "-q", "-p", "no:cacheprovider", *selection])
    assert " passed" in printed
    assert "no such level" not in printed
