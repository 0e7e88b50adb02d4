"""Packing of 2:4 weights on the CPU: table look-ups and shifts on whole groups, no boolean indexing.

In C++ where the kernels' library is built (:mod:`.native`), otherwise in numpy, with the same result.

A byte of the non-zero bitmask covers two groups of 4. A 256-entry table turns it into the byte that is
stored (short groups filled up with explicit zeros) and into the position of each of the 4 kept values;
a group of 1- or 2-byte values fits an integer register, so a kept value is one shift away.
"""

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_sparse.sparse24 import native
from vllm_sparse.sparse24.mask import GROUP, KEPT, short_group_mask
from vllm_sparse.sparse24.scan import CHUNK_BYTES, CROWDED, as_integers, map_chunks, nonzero_bits

# Input of a call to compiled code: what it makes of that stays in a core's cache until it is written out.
PACK_BYTES = 1 << 20
# Integers that hold a group of 4 values, and the 2 kept ones, by bytes per value.
_WIDE: dict[int, Any] = {1: np.uint32, 2: np.uint64}
_PAIR: dict[int, Any] = {1: np.uint16, 2: np.uint32}

# (first row, compressed rows, bitmask rows).
Sink = Callable[[int, np.ndarray, np.ndarray], None]
_BUFFERS = threading.local()


@cache
def _kept_positions() -> np.ndarray:
    """uint8 ``[16, 2]``: for each of the 16 non-zero patterns of a group, the two places that are kept.

    Which zeros fill up a short group is asked of ``topk``, as compressed-tensors does, so that files agree
    byte for byte. Entries of crowded patterns are never used.
    """
    codes = torch.arange(16).unsqueeze(1) >> torch.arange(GROUP) & 1
    kept = codes.to(torch.float32).topk(KEPT, dim=-1).indices.sort(dim=-1).values
    return np.ascontiguousarray(kept.numpy().astype(np.uint8))


@cache
def _stored_bytes() -> tuple[np.ndarray, np.ndarray]:
    """``(stored byte, positions [256, 2, 2])`` for each of the 256 non-zero bytes: two groups, two kept."""
    kept = _kept_positions().astype(np.int64)
    stored = (1 << kept).sum(axis=-1)
    low, high = np.arange(256) & 15, np.arange(256) >> 4
    bytes_ = (stored[low] | stored[high] << GROUP).astype(np.uint8)
    return bytes_, np.stack([kept[low], kept[high]], axis=1)


@cache
def _shifts(width: int) -> np.ndarray:
    """Right shifts for values of ``width`` bytes, one item per non-zero byte, to be viewed as two integers.

    Each integer serves one group: the low byte brings the first kept value to lane 0, the next byte brings
    the second (never at position 0) to lane 1.
    """
    positions = _stored_bytes()[1]
    lane = 8 * width
    both = positions[..., 0] * lane | (positions[..., 1] - 1) * lane << 8
    pair = np.ascontiguousarray(both.astype(_WIDE[width]))
    # One item of both integers, so that a single look-up fetches them; the item type only names its size.
    return pair.view(np.complex128 if width == 2 else np.uint64).reshape(256)


def can_pack(weight: Tensor) -> bool:
    """Whether :func:`pack` takes this weight: on the CPU, 1- or 2-byte values, K a multiple of 8."""
    return weight.device.type == "cpu" and weight.element_size() in _WIDE and weight.shape[-1] % 8 == 0


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``(compressed, bitmask)`` of a 2:4 weight; see :mod:`.bitmask` for the layout.

    Args:
        weight: ``[rows, cols]`` accepted by :func:`can_pack`.

    Raises:
        FormatError: a group with more than 2 non-zeros.
    """
    rows, cols = weight.shape
    values = as_integers(weight).reshape(rows, cols)
    kept = np.empty((rows, cols // 2), dtype=values.dtype)
    bitmask = np.empty((rows, cols // 8), dtype=np.uint8)
    floating = weight.is_floating_point()

    def work(start: int) -> bool:
        part = slice(start, start + starts.step)
        return _pack_rows(values[part], floating, kept[part], bitmask[part])

    starts = _row_chunks(values)
    if any(map_chunks(work, starts, values.nbytes)):
        short_group_mask(weight)  # raises, saying where
    return torch.from_numpy(kept.view(np.uint8)).view(weight.dtype), torch.from_numpy(bitmask)


def pack_chunks(weight: Tensor, sink: Sink) -> None:
    """Like :func:`pack`, but a few rows at a time into buffers that stay in the cache.

    Fresh memory for a whole result costs more, in page faults, than the packing itself.

    Args:
        weight: ``[rows, cols]`` accepted by :func:`can_pack`.
        sink: called with the first row, ``compressed`` rows and ``bitmask`` rows, from several threads and in
            any order; the arrays are used again after it returns.

    Raises:
        FormatError: a group with more than 2 non-zeros; chunks before it were delivered.
    """
    rows, cols = weight.shape
    values = as_integers(weight).reshape(rows, cols)
    floating = weight.is_floating_point()
    starts = _row_chunks(values)

    def work(start: int) -> bool:
        part = values[start : start + starts.step]
        kept, bitmask = _scratch(part)
        crowded = _pack_rows(part, floating, kept, bitmask)
        sink(start, kept, bitmask)
        return crowded

    if any(map_chunks(work, starts, values.nbytes)):
        short_group_mask(weight)  # raises, saying where


def _row_chunks(values: np.ndarray) -> range:
    size = PACK_BYTES if native.available(values.itemsize) else CHUNK_BYTES
    return range(0, values.shape[0], max(1, size // max(1, values.shape[1] * values.itemsize)))


def _scratch(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """This thread's buffers for the packed form of ``part``."""
    rows, cols = part.shape
    if getattr(_BUFFERS, "raw", np.empty(0)).nbytes < part.nbytes:
        _BUFFERS.raw = np.empty(part.nbytes, dtype=np.uint8)
    half = part.nbytes // 2
    kept = _BUFFERS.raw[:half].view(part.dtype).reshape(rows, cols // 2)
    return kept, _BUFFERS.raw[half : half + rows * cols // 8].reshape(rows, cols // 8)


def _pack_rows(values: np.ndarray, floating: bool, kept: np.ndarray, bitmask: np.ndarray) -> bool:
    """Pack some rows; True if a group holds more than 2 non-zeros."""
    if native.available(values.itemsize):
        return native.encode(values, floating, _kept_positions(), kept, bitmask)
    return _pack_rows_numpy(values, floating, kept, bitmask)


def _pack_rows_numpy(values: np.ndarray, floating: bool, kept: np.ndarray, bitmask: np.ndarray) -> bool:
    bits = nonzero_bits(values, floating)
    np.take(_stored_bytes()[0], bits, out=bitmask, mode="clip")
    flat = bits.reshape(-1)
    wide = _WIDE[values.itemsize]
    lane = 8 * values.itemsize
    groups = values.view(wide).reshape(-1)
    second = np.take(_shifts(values.itemsize), flat, mode="clip").view(wide)
    first = second & wide(0xFF)
    np.right_shift(groups, first, out=first)
    np.bitwise_and(first, wide((1 << lane) - 1), out=first)
    np.right_shift(second, wide(8), out=second)
    np.right_shift(groups, second, out=second)
    np.bitwise_and(second, wide((1 << lane) - 1 << lane), out=second)
    np.bitwise_or(first, second, out=first)
    kept.view(_PAIR[values.itemsize]).reshape(-1)[:] = first
    return bool(np.take(CROWDED, flat, mode="clip").any())
