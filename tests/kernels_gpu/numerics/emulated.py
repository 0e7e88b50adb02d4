"""The CUDA C++ kernels on the emulated GPU of ``csrc/emulator.h``, behind the library's interface."""

import ctypes
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from vllm_sparse.kernels.cuda import build, library

_SCALE_BYTES = {0: 4, 1: 2, 2: 2}


@cache
def compile_emulator() -> ctypes.CDLL:
    """The same sources that nvcc compiles, as one C++ file."""
    with tempfile.TemporaryDirectory() as folder:
        unity = Path(folder) / "unity.cpp"
        unity.write_text("".join(f'#include "{source}"\n' for source in build.sources()))
        target = Path(folder) / "emulated.so"
        flags = ["-std=c++20", "-Og", "-DSPARSE24_EMULATE", "-shared", "-fPIC", "-fvisibility=hidden"]
        warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
        subprocess.run(["g++", *flags, *warnings, str(unity), "-o", str(target)], check=True)
        return library.open_library(target)


class Range(ctypes.Structure):
    """Memory that a kernel may touch."""

    _fields_ = (("start", ctypes.c_void_p), ("bytes", ctypes.c_int64))


def _ranges(p: library.Problem, splits: int) -> list[tuple[int | None, int]]:
    blocks = p.row_blocks * p.k_blocks
    groups = -(-p.k // p.group) if p.group else 1
    return [
        (p.x, 2 * ((p.m - 1) * p.stride_x + p.k)),
        (p.packed, p.metadata_offset + 512 * blocks),
        (p.scale, groups * p.n * _SCALE_BYTES[p.scale_type]),
        (p.token_scale, 4 * p.m),
        (p.bias, 2 * p.n),
        (p.y, 4 * splits * p.m * p.n if p.partial else 2 * p.m * p.n),
    ]


class EmulatedLibrary:
    """Stands where the loaded library stands; tells the emulator which memory a call may touch.

    Attributes:
        eager_copies: asynchronous copies land at once instead of as late as allowed.
        eager_products: the same of asynchronous products.
        seed: order of threads between barriers; 0 is ascending.
        launches: what was launched.
    """

    def __init__(self) -> None:
        self._library = compile_emulator()
        self.eager_copies = False
        self.eager_products = False
        self.seed = 0
        self.launches: list[library.Launch] = []

    def sparse24_mma_sp(self, problem: object, launch: object, stream: int) -> int:
        p, shape = problem._obj, launch._obj  # type: ignore[attr-defined]
        self.launches.append(shape)
        ranges = [Range(start, size) for start, size in _ranges(p, p.splits) if start]
        eager = self.eager_copies + 2 * self.eager_products
        self._library.sparse24_emulate((Range * len(ranges))(*ranges), len(ranges), eager)
        return int(self._library.sparse24_mma_sp(problem, launch, self.seed))

    def sparse24_error(self, code: int) -> bytes:
        return self._library.sparse24_error(code)
