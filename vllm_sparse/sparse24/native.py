"""The compiled encoder of the CPU kernels' library, where it is built; numpy does the same without it.

The functions are plain C: ctypes lets go of the interpreter lock while they run, so chunks run side by side.
"""

import ctypes
from functools import cache
from typing import Any

import numpy as np


@cache
def _library() -> Any:
    """The library with its argument types declared; None where it is missing or older."""
    from vllm_sparse.kernels.library import encoder

    library = encoder()
    if library is None:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int
    common: list[Any] = [pointer, ctypes.c_int64, number, number, number]
    library.vllm_sparse_count_24.argtypes = [*common, pointer]
    library.vllm_sparse_count_24.restype = ctypes.c_int
    library.vllm_sparse_encode_24.argtypes = [*common, pointer, pointer, pointer]
    library.vllm_sparse_encode_24.restype = ctypes.c_int64
    library.vllm_sparse_any_bits.argtypes = [pointer, ctypes.c_int64, number, ctypes.c_uint64]
    library.vllm_sparse_any_bits.restype = ctypes.c_int
    return library


def available(width: int, widths: tuple[int, ...] = (1, 2)) -> bool:
    """Whether values of ``width`` bytes can be handled here, by a function that takes ``widths``."""
    return width in widths and _library() is not None


def any_bits(values: np.ndarray, bits: int) -> bool:
    """Whether one of contiguous unsigned integers of 1, 2 or 4 bytes has all of ``bits``."""
    found = _library().vllm_sparse_any_bits(values.ctypes.data, values.nbytes, values.itemsize, bits)
    return bool(found)


def count(values: np.ndarray, floating: bool, vectors: bool = True) -> tuple[int, int]:
    """``(non-zeros, crowded groups)`` of contiguous unsigned integers, a multiple of 8 of them."""
    out = np.zeros(2, dtype=np.int64)
    _library().vllm_sparse_count_24(
        values.ctypes.data, values.nbytes, values.itemsize, int(floating), int(vectors), out.ctypes.data
    )
    return int(out[0]), int(out[1])


def encode(
    values: np.ndarray,
    floating: bool,
    positions: np.ndarray,
    kept: np.ndarray,
    bitmask: np.ndarray,
    vectors: bool = True,
) -> bool:
    """Pack contiguous rows into ``kept`` and ``bitmask``; True if a group holds more than 2 non-zeros.

    Args:
        values: ``[rows, cols]`` unsigned integers, cols a multiple of 8.
        floating: the sign bit alone does not make a value non-zero.
        positions: uint8 ``[16, 2]``, the kept places of each non-zero pattern.
        kept: ``[rows, cols / 2]``, overwritten.
        bitmask: uint8 ``[rows, cols / 8]``, overwritten.
        vectors: use AVX-512 where there is any.
    """
    crowded = _library().vllm_sparse_encode_24(
        values.ctypes.data,
        values.nbytes,
        values.itemsize,
        int(floating),
        int(vectors),
        positions.ctypes.data,
        kept.ctypes.data,
        bitmask.ctypes.data,
    )
    return bool(crowded)
