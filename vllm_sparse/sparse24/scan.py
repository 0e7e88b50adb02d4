"""Counting zeros and crowded groups in one pass that stays in the cache."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from vllm_sparse.sparse24 import native
from vllm_sparse.sparse24.mask import GROUP, KEPT

T = TypeVar("T")

CHUNK_BYTES = 1 << 18
# Compiled code keeps no intermediate results in the cache, and a call for every chunk would cost as much as
# its work.
SCAN_BYTES = 4 << 20
# Below this, a second thread costs more than it saves.
PARALLEL_BYTES = 4 << 20
# Crowded groups in a byte of the non-zero bitmask: low 4 bits and high 4 bits of a byte are two groups of 4.
CROWDED = np.array(
    [(bin(byte & 15).count("1") > KEPT) + (bin(byte >> 4).count("1") > KEPT) for byte in range(256)], np.uint8
)
# The bits that are all ones in NaN and Inf; e4m3 has no Inf, and NaN there is every bit but the sign.
EXPONENT = {
    torch.float8_e4m3fn: 0x7F,
    torch.float8_e5m2: 0x7C,
    torch.float16: 0x7C00,
    torch.bfloat16: 0x7F80,
    torch.float32: 0x7F80_0000,
    torch.float64: 0x7FF0_0000_0000_0000,
}
_INTEGERS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def nonzero_bits(values: np.ndarray, floating: bool) -> np.ndarray:
    """Little-endian bytes with a bit per value that is not zero; -0.0 is zero.

    Args:
        values: ``[..., K]`` as unsigned integers of the value's width.
        floating: the values are floats, so that the sign bit alone does not make them non-zero.
    """
    if floating:
        sign = np.array(1 << (8 * values.itemsize - 1), dtype=values.dtype)
        return np.packbits((values & ~sign) != 0, axis=-1, bitorder="little")
    return np.packbits(values != 0, axis=-1, bitorder="little")


def as_integers(weight: Tensor) -> np.ndarray:
    """A CPU tensor's memory as unsigned integers of the same width, without a copy."""
    contiguous = weight.detach().contiguous()
    unsigned = _INTEGERS[weight.element_size()]
    return contiguous.view(torch.uint8).numpy().view(unsigned)


def count_24(weight: Tensor) -> tuple[int, int]:
    """Count what decides whether a weight is 2:4.

    Args:
        weight: ``[..., K]`` on the CPU, any dtype of 1 to 8 bytes, K a multiple of 4.

    Returns:
        ``(zeros, crowded)``: zero values, and groups of 4 with more than 2 non-zeros.
    """
    if weight.numel() == 0:
        return 0, 0
    flat = as_integers(weight).reshape(-1)
    if flat.size % (2 * GROUP):
        flat = np.concatenate([flat, np.zeros(GROUP, dtype=flat.dtype)])
    padding = flat.size - weight.numel()
    floating = weight.is_floating_point()
    compiled = native.available(flat.itemsize)
    step = (SCAN_BYTES if compiled else CHUNK_BYTES) // flat.itemsize

    def work(start: int) -> tuple[int, int]:
        if compiled:
            return native.count(flat[start : start + step], floating)
        bits = nonzero_bits(flat[start : start + step], floating)
        nonzero = int(np.bitwise_count(bits).sum(dtype=np.int64))
        return nonzero, int(np.take(CROWDED, bits).sum(dtype=np.int64))

    counts = map_chunks(work, range(0, flat.size, step), flat.nbytes)
    nonzero, crowded = (sum(part) for part in zip(*counts, strict=True))
    return flat.size - padding - nonzero, crowded


def any_nonfinite(tensor: Tensor) -> bool:
    """Whether a float tensor on the CPU, of one of :data:`EXPONENT`'s dtypes, holds NaN or Inf."""
    flat = as_integers(tensor.reshape(-1))
    bits = EXPONENT[tensor.dtype]
    compiled = native.available(flat.itemsize, (1, 2, 4))
    step = (SCAN_BYTES if compiled else CHUNK_BYTES) // flat.itemsize
    mask = flat.dtype.type(bits)

    def work(start: int) -> bool:
        part = flat[start : start + step]
        return native.any_bits(part, bits) if compiled else bool(((part & mask) == mask).any())

    return any(map_chunks(work, range(0, flat.size, step), flat.nbytes))


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    """Threads that stay: starting them for every tensor costs more than a small tensor takes."""
    return ThreadPoolExecutor(workers, thread_name_prefix="sparse24")


# A forked process has the pool but not its threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)


def map_chunks(work: Callable[[int], T], starts: Sequence[int], nbytes: int) -> list[T]:
    """``work`` on every chunk, on torch's number of threads when there is enough to do.

    numpy lets go of the interpreter lock inside its loops, so threads do run side by side.
    """
    workers = min(torch.get_num_threads(), len(starts)) if nbytes >= PARALLEL_BYTES else 1
    if workers <= 1:
        return [work(start) for start in starts]
    # One task a thread: a task for every chunk would cost as much as its work.
    parts = list(_pool(workers).map(lambda first: [work(s) for s in starts[first::workers]], range(workers)))
    return [parts[place % workers][place // workers] for place in range(len(starts))]
