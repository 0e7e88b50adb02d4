"""The compiled library: finding and loading it, and its C interface (``csrc/problem.h``).

A plain C interface rather than a torch extension: one library then serves every torch and Python, and it can
be compiled where torch has no CUDA headers. It carries its own static CUDA runtime, which shares contexts and
streams with torch's.
"""

import ctypes
import logging
import os
from functools import cache
from pathlib import Path
from typing import Any

from vllm_sparse.errors import UnsupportedError

logger = logging.getLogger(__name__)

ENV_LIBRARY = "VLLM_SPARSE_CUDA_LIBRARY"
ABI_VERSION = 5
DEFAULT_PATH = Path(__file__).parent / "_mma_sp.so"
BUILD_COMMAND = "python -m vllm_sparse.kernels.cuda.build"
# What the build needs of a CUDA toolkit, where there is none. Beside torch it keeps torch's release.
PIP_TOOLKIT = "pip install 'cuda-toolkit[nvcc,crt,nvvm,cudart,cccl]==13.0.*'"


class Problem(ctypes.Structure):
    """``csrc/problem.h``'s Problem, field by field."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("packed", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("token_scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("stride_x", ctypes.c_int64),
        ("metadata_offset", ctypes.c_int64),
        ("m", ctypes.c_int32),
        ("n", ctypes.c_int32),
        ("k", ctypes.c_int32),
        ("row_blocks", ctypes.c_int32),
        ("k_blocks", ctypes.c_int32),
        ("blocks_per_split", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("scale_type", ctypes.c_int32),
        ("partial", ctypes.c_int32),
        ("splits", ctypes.c_int32),
        ("cluster", ctypes.c_int32),
        ("stages", ctypes.c_int32),
        ("slots", ctypes.c_int32),
        ("programs", ctypes.c_int32),
    )


class Launch(ctypes.Structure):
    """``csrc/problem.h``'s Launch, field by field."""

    _fields_ = (
        ("half", ctypes.c_int32),
        ("eight_bits", ctypes.c_int32),
        ("format", ctypes.c_int32),
        ("token_tiles", ctypes.c_int32),
        ("row_tiles", ctypes.c_int32),
        ("warps", ctypes.c_int32),
        ("kernel", ctypes.c_int32),
    )


def open_library(path: Path) -> ctypes.CDLL:
    """Load a library of this interface.

    Raises:
        OSError: it does not load.
        UnsupportedError: it has another version of the interface.
    """
    library = ctypes.CDLL(str(path))
    found = int(library.sparse24_abi_version())
    if found != ABI_VERSION:
        raise UnsupportedError(
            f"{path} has version {found} of the interface, this installation needs {ABI_VERSION}; build it "
            f"again with {BUILD_COMMAND}"
        )
    library.sparse24_mma_sp.argtypes = [
        ctypes.POINTER(Problem),
        ctypes.POINTER(Launch),
        ctypes.c_void_p,
    ]
    library.sparse24_error.argtypes = [ctypes.c_int]
    library.sparse24_error.restype = ctypes.c_char_p
    return library


@cache
def _load() -> tuple[Any, str | None]:
    """The library, or why there is none; said once."""
    named = os.environ.get(ENV_LIBRARY, "").strip()
    path = Path(named) if named else DEFAULT_PATH
    reason = None
    if not path.exists():
        reason = (
            f"the CUDA C++ kernels are not built ({path} is missing); {BUILD_COMMAND} compiles them with "
            f"nvcc, which {PIP_TOOLKIT} brings if the machine has none"
        )
    else:
        try:
            return open_library(path), None
        except (OSError, AttributeError, UnsupportedError) as error:
            reason = f"the CUDA C++ kernels do not load: {error}"
    logger.info("%s. Triton's kernels serve instead.", reason)
    return None, reason


# Why a library that loads is not used all the same; the last one said.
_distrusted: list[str] = []


def distrust(reason: str) -> None:
    """From now on no product of this process uses the library."""
    _distrusted.append(reason)


def load_failure() -> str | None:
    """Why the CUDA C++ kernels cannot be used; None if they can."""
    return _distrusted[-1] if _distrusted else _load()[1]


def advice() -> str | None:
    """What decoding loses without the CUDA C++ kernels and how to get them; None if they are there."""
    reason = load_failure()
    if reason is None:
        return None
    return (
        "2:4 layers will be slower than dense ones in decode batches of 3 to 64 tokens: Triton's kernels "
        f"alone reach 0.4 to 0.8 of cuBLAS's speed there (measured on an H200). The reason: {reason}"
    )


def start(problem: Problem, launch: Launch, stream: int) -> None:
    """Queue one product on a stream; nothing waits.

    Raises:
        UnsupportedError: there is no library, it failed its self-test, it has no such instance, or CUDA
            refuses the launch.
    """
    reason = load_failure()
    if reason is not None:
        raise UnsupportedError(reason)
    library, _ = _load()
    code = library.sparse24_mma_sp(ctypes.byref(problem), ctypes.byref(launch), stream)
    if code:
        text = library.sparse24_error(code).decode()
        raise UnsupportedError(
            f"the CUDA C++ kernel was not launched for {problem.m} tokens by {problem.n}x{problem.k}: "
            f"{text}. VLLM_SPARSE_BACKEND=triton serves without it."
        )
