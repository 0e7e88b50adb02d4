"""compressed-tensors' ``sparse-24-bitmask`` bytes.

A dense weight ``[rows, cols]`` becomes

- ``compressed`` ``[rows, cols/2]``, the weight's dtype: kept values, row by row, left to right;
- ``bitmask`` ``[rows, ceil(cols/8)]`` uint8, **little-endian inside a byte**: bit *j* of byte *b* is
  column ``8b + j``; pad bits are 0.

Golden example: the row mask ``1 0 0 1 0 1 1 0`` is the byte 105 (big-endian would give 150). Reversing
the bit order still looks 2:4, so only golden bytes and dense values can test it.
"""

import torch
from torch import Tensor

from vllm_sparse.errors import FormatError
from vllm_sparse.sparse24.fastpack import can_pack, pack
from vllm_sparse.sparse24.mask import GROUP, KEPT, short_group_mask


def _bit_values(device: torch.device) -> Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)


def pack_mask(mask: Tensor) -> Tensor:
    """Bool ``[..., cols]`` -> uint8 ``[..., ceil(cols/8)]``, little-endian bits."""
    pad = -mask.shape[-1] % 8
    bits = torch.nn.functional.pad(mask.to(torch.uint8), (0, pad))
    bits = bits.reshape(*mask.shape[:-1], -1, 8)
    return (bits * _bit_values(mask.device)).sum(-1, dtype=torch.uint8)


def unpack_mask(bitmask: Tensor, cols: int) -> Tensor:
    """Uint8 ``[..., ceil(cols/8)]`` -> bool ``[..., cols]``; the inverse of :func:`pack_mask`."""
    if bitmask.dtype != torch.uint8 or bitmask.shape[-1] != -(-cols // 8):
        raise FormatError(
            f"bitmask for {cols} columns must be uint8 with {-(-cols // 8)} bytes a row; "
            f"found {bitmask.dtype} {list(bitmask.shape)}"
        )
    bits = (bitmask.unsqueeze(-1) & _bit_values(bitmask.device)) != 0
    return bits.reshape(*bitmask.shape[:-1], -1)[..., :cols]


def compress(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Pack a weight that already is 2:4.

    Args:
        weight: ``[rows, cols]``, any dtype of 1, 2 or 4 bytes, cols a multiple of 4.

    Returns:
        ``(compressed, bitmask)`` as in the module's docstring.

    Raises:
        FormatError: wrong rank, cols not a multiple of 4, or a group with more than 2 non-zeros.
    """
    if weight.ndim != 2:
        raise FormatError(f"sparse-24-bitmask packs matrices; found shape {list(weight.shape)}")
    rows, cols = weight.shape
    if can_pack(weight):
        return pack(weight)
    mask = short_group_mask(weight)
    raw = weight.view(torch.uint8) if weight.element_size() == 1 else weight
    values = raw[mask].reshape(rows, cols // 2)
    return values.view(weight.dtype), pack_mask(mask)


def decompress(compressed: Tensor, bitmask: Tensor) -> Tensor:
    """Rebuild the dense ``[rows, cols]`` weight, cols being twice ``compressed``'s.

    Raises:
        FormatError: shapes disagree, or a group of 4 does not have exactly 2 bits set.
    """
    validate_bitmask(compressed, bitmask)
    rows, half = compressed.shape
    mask = unpack_mask(bitmask, 2 * half)
    storage = compressed.view(torch.uint8) if compressed.element_size() == 1 else compressed
    dense = torch.zeros(rows, 2 * half, dtype=storage.dtype, device=storage.device)
    dense.masked_scatter_(mask, storage)
    return dense.view(compressed.dtype)


def validate_bitmask(compressed: Tensor, bitmask: Tensor, shape: tuple[int, int] | None = None) -> None:
    """Check that values, bitmask and (if given) the declared dense shape describe one 2:4 matrix.

    Raises:
        FormatError: saying which of them disagrees and where.
    """
    if compressed.ndim != 2 or bitmask.ndim != 2 or compressed.shape[0] != bitmask.shape[0]:
        raise FormatError(
            f"compressed {list(compressed.shape)} and bitmask {list(bitmask.shape)} must be matrices "
            "with the same number of rows"
        )
    cols = 2 * compressed.shape[1]
    if cols % GROUP:
        raise FormatError(f"compressed has {compressed.shape[1]} values a row; 2:4 needs an even number")
    if shape is not None and tuple(shape) != (compressed.shape[0], cols):
        raise FormatError(
            f"declared shape {list(shape)} disagrees with compressed {list(compressed.shape)}, "
            f"which holds a [{compressed.shape[0]}, {cols}] matrix"
        )
    mask = unpack_mask(bitmask, cols)
    counts = mask.reshape(compressed.shape[0], cols // GROUP, GROUP).sum(-1, dtype=torch.uint8)
    wrong = counts != KEPT
    if bool(wrong.any()):
        row, group = torch.nonzero(wrong)[0].tolist()
        raise FormatError(
            f"bitmask is not 2:4: {int(wrong.sum())} of {wrong.numel()} groups of 4 do not have exactly "
            f"2 bits set (first at row {row}, columns {group * GROUP}..{group * GROUP + 3}, "
            f"{int(counts[row, group])} bits)"
        )
    if cols % 8 and bool((bitmask[:, -1] >> (cols % 8)).any()):
        raise FormatError("bitmask has pad bits set after the last column; they must be 0")
