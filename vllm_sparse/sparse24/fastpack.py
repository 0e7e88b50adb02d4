"""Packing of 2:4 weights on the CPU: table look-ups and shifts on whole groups, no boolean indexing.

A byte of the non-zero bitmask covers two groups of 4. A 256-entry table turns it into the byte that is
stored (short groups filled up with explicit zeros) and into the position of each of the 4 kept values;
a group of 1- or 2-byte values fits an integer register, so a kept value is one shift away.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from torch import Tensor

from vllm_sparse.sparse24.mask import GROUP, KEPT, short_group_mask
from vllm_sparse.sparse24.scan import CHUNK_BYTES, CROWDED, as_integers, nonzero_bits

# Below this, a second thread costs more than it saves.
_PARALLEL_BYTES = 4 << 20
_WIDE = {1: np.uint32, 2: np.uint64}


@cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """``(stored byte, four positions)`` for each of the 256 non-zero bytes.

    Which zeros fill up a short group is asked of ``topk``, as compressed-tensors does, so that files agree
    byte for byte. Entries of crowded bytes are never used.
    """
    codes = torch.arange(16).unsqueeze(1) >> torch.arange(GROUP) & 1
    kept = codes.to(torch.float32).topk(KEPT, dim=-1).indices.sort(dim=-1).values.numpy()
    stored = (1 << kept).sum(axis=-1)
    low, high = np.arange(256) & 15, np.arange(256) >> 4
    bytes_ = (stored[low] | stored[high] << GROUP).astype(np.uint8)
    positions = np.concatenate([kept[low], kept[high]], axis=-1).T
    return bytes_, np.ascontiguousarray(positions)


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
    step = max(1, CHUNK_BYTES // max(1, cols * values.itemsize))
    starts = range(0, rows, step)

    def work(start: int) -> bool:
        part = slice(start, start + step)
        return _pack_rows(values[part], floating, kept[part], bitmask[part])

    workers = min(torch.get_num_threads(), len(starts)) if values.nbytes >= _PARALLEL_BYTES else 1
    if workers > 1:
        with ThreadPoolExecutor(workers) as pool:
            crowded = list(pool.map(work, starts))
    else:
        crowded = [work(start) for start in starts]
    if any(crowded):
        short_group_mask(weight)  # raises, saying where
    return torch.from_numpy(kept.view(np.uint8)).view(weight.dtype), torch.from_numpy(bitmask)


def _pack_rows(values: np.ndarray, floating: bool, kept: np.ndarray, bitmask: np.ndarray) -> bool:
    """Pack some rows; True if a group holds more than 2 non-zeros."""
    stored, positions = _tables()
    bits = nonzero_bits(values, floating)
    np.take(stored, bits, out=bitmask, mode="clip")
    wide = _WIDE[values.itemsize]
    groups = values.view(wide).reshape(-1, 2)
    out = kept.reshape(-1, 4)  # a view: kept is contiguous
    flat = bits.reshape(-1)
    shifts = (positions * (8 * values.itemsize)).astype(wide)
    for slot in range(4):
        out[:, slot] = groups[:, slot // 2] >> np.take(shifts[slot], flat, mode="clip")
    return bool(np.take(CROWDED, flat, mode="clip").any())
