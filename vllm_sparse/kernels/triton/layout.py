"""The packed 2:4 layout of the GPU kernels, packed and unpacked with plain torch on any device.

Words used here. A *group* is 4 consecutive columns of one row, of which it keeps two values, at positions
``i < j``. A *tile* is 16 rows x 128 columns (16 x 32 groups). A *block* is 16 rows x 256 columns: two tiles
side by side, and the metadata of both.

The buffer is flat uint8 and holds two regions, each a sequence of blocks along K, then along N:

- values: ``[row_blocks, k_blocks, 2 tiles, 16 rows, 32 groups]`` words. The word of a group holds its two
  values, the left one in the low half: 4 bytes for 16-bit values, 2 for 8-bit ones, 1 for int4.
- metadata: ``[row_blocks, k_blocks, 16 rows, 32 groups]`` bytes. The low nibble is the code of that group in
  the first tile, the high nibble in the second; a code is ``i + 4*j``.

That is 9, 5 or 3 bits per dense weight. Why this shape: a kernel reads both tiles and their codes with one
and the same index ``[row, group]``, so registers never exchange data, every load is one contiguous run of at
least 512 bytes, and a program that owns a strip of rows reads its share of each region from front to back.
The same words serve the kernel that selects activations (one to a few tokens) and the one that expands
weights (more tokens).

N is padded to a multiple of 16 and K to a multiple of 256 with zero values under code 4 (positions 0, 1).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_sparse.errors import FormatError
from vllm_sparse.kernels.base import WeightFormat

ROWS = 16
TILE_GROUPS = 32
TILES = 2
BLOCK_COLUMNS = 4 * TILE_GROUPS * TILES
# Positions (0, 1): what empty and padded groups carry.
_PAD_CODE = 4

WORD_BYTES = {
    WeightFormat.BF16: 4,
    WeightFormat.FP16: 4,
    WeightFormat.INT8: 2,
    WeightFormat.FP8_E4M3: 2,
    WeightFormat.INT4: 1,
}
_WORD_DTYPE = {4: torch.int32, 2: torch.int16, 1: torch.uint8}
# How the kernels name a format; ``decode`` holds the same numbers.
FORMAT_NUMBER = {
    WeightFormat.BF16: 0,
    WeightFormat.FP16: 1,
    WeightFormat.INT8: 2,
    WeightFormat.FP8_E4M3: 3,
    WeightFormat.INT4: 4,
}
VALUE_DTYPE = {
    WeightFormat.BF16: torch.bfloat16,
    WeightFormat.FP16: torch.float16,
    WeightFormat.INT8: torch.int8,
    WeightFormat.FP8_E4M3: torch.float8_e4m3fn,
    WeightFormat.INT4: torch.int8,
}


@dataclass(frozen=True)
class Layout:
    """Sizes of one packed weight.

    Attributes:
        n: output features.
        k: input features, a multiple of 4.
        weight: storage of the kept values.
    """

    n: int
    k: int
    weight: WeightFormat

    @property
    def row_blocks(self) -> int:
        """Blocks along N."""
        return -(-self.n // ROWS)

    @property
    def k_blocks(self) -> int:
        """Blocks along K."""
        return -(-self.k // BLOCK_COLUMNS)

    @property
    def value_bytes(self) -> int:
        """Size of the values region, also the offset of the metadata region; a multiple of 1024."""
        words = self.row_blocks * self.k_blocks * TILES * ROWS * TILE_GROUPS
        return words * WORD_BYTES[self.weight]

    @property
    def metadata_bytes(self) -> int:
        """Size of the metadata region."""
        return self.row_blocks * self.k_blocks * ROWS * TILE_GROUPS

    @property
    def total_bytes(self) -> int:
        """Size of the whole buffer."""
        return self.value_bytes + self.metadata_bytes


def group_codes(bitmask: Tensor, n: int, k: int) -> Tensor:
    """The code ``i + 4*j`` of every group, uint8 ``[n, k/4]``, from a canonical bitmask ``[n, ceil(k/8)]``.

    Raises:
        FormatError: a group does not keep exactly two positions.
    """
    nibbles = torch.stack([bitmask & 0x0F, bitmask >> 4], dim=-1).reshape(n, -1)[:, : k // 4]
    # Mask nibble -> code; 255 marks nibbles that do not have two bits set.
    table = torch.full((16,), 255, dtype=torch.uint8)
    for i in range(3):
        for j in range(i + 1, 4):
            table[1 << i | 1 << j] = i + 4 * j
    codes = table.to(bitmask.device)[nibbles.to(torch.int32)]
    if bool((codes == 255).any()):
        row, group = torch.nonzero(codes == 255)[0].tolist()
        raise FormatError(
            f"bitmask is not 2:4: row {row}, columns {4 * group}..{4 * group + 3} do not have exactly 2 "
            "bits set"
        )
    return codes


def _value_words(values: Tensor, weight: WeightFormat) -> Tensor:
    """Kept values ``[n, k/2]`` -> one word per group, ``[n, k/4]``."""
    if weight is WeightFormat.INT4:
        pairs = values.view(torch.uint8).reshape(values.shape[0], -1, 2)
        return (pairs[..., 0] & 0x0F) | (pairs[..., 1] << 4)
    return values.view(_WORD_DTYPE[WORD_BYTES[weight]])


def _padded(words: Tensor, layout: Layout, fill: int) -> Tensor:
    groups = layout.k_blocks * TILES * TILE_GROUPS
    pad = (0, groups - words.shape[1], 0, layout.row_blocks * ROWS - words.shape[0])
    return torch.nn.functional.pad(words, pad, value=fill)


def _blocks(words: Tensor, layout: Layout) -> Tensor:
    """Padded ``[rows, groups]`` -> ``[row_blocks, k_blocks, 2, 16, 32]``."""
    shape = (layout.row_blocks, ROWS, layout.k_blocks, TILES, TILE_GROUPS)
    return words.reshape(shape).permute(0, 2, 3, 1, 4)


def pack(layout: Layout, values: Tensor, bitmask: Tensor) -> Tensor:
    """Pack canonical values and bitmask.

    Args:
        layout: the weight's sizes.
        values: ``[n, k/2]`` in the format's storage dtype (int4: int8 holding [-8, 7]).
        bitmask: ``[n, ceil(k/8)]`` uint8, little-endian bits.

    Returns:
        uint8 ``[layout.total_bytes]`` on the device of ``values``.

    Raises:
        FormatError: a group does not keep exactly two positions.
    """
    out = torch.empty(layout.total_bytes, dtype=torch.uint8, device=values.device)
    codes = _blocks(_padded(group_codes(bitmask, layout.n, layout.k), layout, _PAD_CODE), layout)
    metadata = out[layout.value_bytes :].view(layout.row_blocks, layout.k_blocks, ROWS, TILE_GROUPS)
    torch.bitwise_or(codes[:, :, 0], codes[:, :, 1] << 4, out=metadata)
    words = _padded(_value_words(values.contiguous(), layout.weight), layout, 0)
    region = out[: layout.value_bytes].view(words.dtype)
    region.view(layout.row_blocks, layout.k_blocks, TILES, ROWS, TILE_GROUPS).copy_(_blocks(words, layout))
    return out


def _rows(blocks: Tensor, layout: Layout) -> Tensor:
    """The inverse of :func:`_blocks`, without the padding: ``[n, k/4]``."""
    words = blocks.permute(0, 3, 1, 2, 4).reshape(layout.row_blocks * ROWS, -1)
    return words[: layout.n, : layout.k // 4]


def unpack(layout: Layout, packed: Tensor) -> Tensor:
    """The dense weight ``[n, k]`` in the format's storage dtype, scales not applied."""
    shape = (layout.row_blocks, layout.k_blocks, ROWS, TILE_GROUPS)
    metadata = packed[layout.value_bytes :].view(shape)
    codes = _rows(torch.stack([metadata & 0x0F, metadata >> 4], dim=2), layout)
    words = packed[: layout.value_bytes].view(_WORD_DTYPE[WORD_BYTES[layout.weight]])
    words = _rows(words.view(layout.row_blocks, layout.k_blocks, TILES, ROWS, TILE_GROUPS), layout)
    if layout.weight is WeightFormat.INT4:
        nibbles = torch.stack([words & 0x0F, words >> 4], dim=-1).view(torch.int8)
        pairs = (nibbles ^ 8) - 8
    else:
        # 8-bit values move as raw bytes: not every torch op takes float8.
        dtype = VALUE_DTYPE[layout.weight]
        raw = torch.uint8 if dtype.itemsize == 1 else dtype
        pairs = words.contiguous().view(raw).reshape(layout.n, -1, 2)
    dense = torch.zeros(layout.n, layout.k // 4, 4, dtype=pairs.dtype, device=packed.device)
    dense.scatter_(2, (codes & 3).long().unsqueeze(-1), pairs[..., :1])
    dense.scatter_(2, (codes >> 2).long().unsqueeze(-1), pairs[..., 1:])
    return dense.reshape(layout.n, layout.k).view(VALUE_DTYPE[layout.weight])
