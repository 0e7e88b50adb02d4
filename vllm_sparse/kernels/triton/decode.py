"""Triton helpers shared by the kernels: addresses, codes and values of the layout in ``layout``.

The constants repeat ``layout``'s; they are ``tl.constexpr`` here because kernels may read no other globals.
"""

import triton
import triton.language as tl

ROWS = tl.constexpr(16)
GROUPS = tl.constexpr(32)
TILE_WORDS = tl.constexpr(512)
TILE_COLUMNS = tl.constexpr(128)
BLOCK_COLUMNS = tl.constexpr(256)

BF16 = tl.constexpr(0)
FP16 = tl.constexpr(1)
INT8 = tl.constexpr(2)
FP8 = tl.constexpr(3)
INT4 = tl.constexpr(4)

# The only PTX: permutation of the 8 bytes in two registers. Triton has no operation for it.
PERMUTE = tl.constexpr("prmt.b32 $0, $1, $2, $3;")

NO_SCALE = tl.constexpr(0)
PER_CHANNEL = tl.constexpr(1)
PER_GROUP = tl.constexpr(2)


@triton.jit
def word_pointers(packed_ptr, metadata_offset, FORMAT: tl.constexpr):
    """Pointers to the values region, in words of one group, and to the metadata region, in bytes."""
    if FORMAT == BF16 or FORMAT == FP16:
        words = packed_ptr.to(tl.pointer_type(tl.int32))
    elif FORMAT == INT4:
        words = packed_ptr
    else:
        words = packed_ptr.to(tl.pointer_type(tl.int16))
    return words, packed_ptr + metadata_offset


@triton.jit
def row_offsets(rows, block_words):
    """Offset of each row's first group in a region whose row blocks are ``block_words`` long.

    64-bit: the values of a large head pass 2^31 bytes.
    """
    return (rows // ROWS).to(tl.int64) * block_words + (rows % ROWS) * GROUPS


@triton.jit
def permute_bytes(low, high, selector):
    """PTX ``prmt``: each selector nibble names a byte of ``high:low`` (0 is the lowest) for the result."""
    return tl.inline_asm_elementwise(
        PERMUTE, "=r,r,r,r", [low, high, selector], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def values_as_float(words, FORMAT: tl.constexpr):
    """A tile of words -> the two kept values of each group, float32, exact; fp8 values divided by 256.

    An e4m3 number moves to float16's fields, whose exponent bias is 8 larger; below compute capability 8.9
    there is no instruction for it.
    """
    w = words.to(tl.int32)
    if FORMAT == BF16:
        first = (w << 16).to(tl.float32, bitcast=True)
        second = (w & -65536).to(tl.float32, bitcast=True)
    elif FORMAT == FP16:
        first = w.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        second = (w >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    elif FORMAT == INT8:
        first = ((w << 24) >> 24).to(tl.float32)
        second = ((w << 16) >> 24).to(tl.float32)
    elif FORMAT == FP8:
        # Both numbers into the high bytes of two halves, then all but the sign one place down.
        halves = permute_bytes(w, tl.zeros_like(w), tl.full([1, 1], 0x1404, tl.int32))
        halves = (halves & -0x7FFF8000) | ((halves >> 1) & 0x3F803F80)
        first = halves.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        second = (halves >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        first = ((w << 28) >> 28).to(tl.float32)
        second = ((w << 24) >> 28).to(tl.float32)
    return first, second


@triton.jit
def activation_selectors(both, TILE: tl.constexpr):
    """Metadata bytes -> ``permute_bytes`` selectors that pick 16-bit elements i and j out of four.

    The selector's nibbles are ``2i, 2i+1, 2j, 2j+1``.
    """
    spread = both | (both << 6) if TILE == 0 else (both >> 4) | (both << 2)
    positions = spread & 0x303
    return positions * 0x22 + 0x1010


@triton.jit
def column_fields(both):
    """Metadata bytes -> what lies in each column: byte 0 for the first tile's group, byte 1 for the second's.

    Two bits per column, from column 0 up: 0 the left value, 1 the right value, 2 zero. Adding bit 3 of a code
    to it maps the six codes to different numbers below 8, with which one ``prmt`` looks up both bytes.
    """
    index = (both + ((both >> 3) & 0x11)) & 0x77
    # Entries 0 and 3 belong to no code; entry 0 is met in rows beyond the matrix.
    low = tl.full([1, 1], -0x556D6756, tl.int32)  # entries 3..0: aa 92 98 aa
    high = tl.full([1, 1], 0x4A6268A4, tl.int32)  # entries 7..4
    return permute_bytes(low, high, index)


@triton.jit
def pack_values(words, scales, FORMAT: tl.constexpr, SCALED: tl.constexpr, DTYPE: tl.constexpr):
    """A tile of words -> the two kept values in 16-bit ``DTYPE``, left one in the low half of an int32.

    Without scales that is exact: 8-bit and 4-bit values fit bfloat16's and float16's 8 and 11 significant
    bits. With scales the product is rounded to ``DTYPE``.
    """
    if FORMAT == BF16 or FORMAT == FP16:
        packed = words
    else:
        first, second = values_as_float(words, FORMAT)
        if SCALED:
            first *= scales
            second *= scales
        left = first.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        right = second.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) << 16
        packed = left | right
    return packed


@triton.jit
def expand(packed, fields, TILE: tl.constexpr, DTYPE: tl.constexpr):
    """Pairs of kept values ``[rows, 32]`` -> dense ``[rows, 128]``, by two byte permutations per group."""
    field = (fields >> (8 * TILE)) & 0xFF
    left = (field | (field << 6)) & 0x303
    right = ((field >> 4) | (field << 2)) & 0x303
    zero = tl.zeros_like(packed)
    c01 = permute_bytes(packed, zero, left * 0x22 + 0x1010)
    c23 = permute_bytes(packed, zero, right * 0x22 + 0x1010)
    c0 = c01.to(tl.int16).to(DTYPE, bitcast=True)
    c1 = (c01 >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    c2 = c23.to(tl.int16).to(DTYPE, bitcast=True)
    c3 = (c23 >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    pairs = tl.join(tl.join(c0, c2), tl.join(c1, c3))
    return tl.reshape(pairs, (packed.shape[0], TILE_COLUMNS))


@triton.jit
def in_units(scales, FORMAT: tl.constexpr):
    """Scales for the numbers as :func:`values_as_float` returns them."""
    return scales * 256.0 if FORMAT == FP8 else scales


@triton.jit
def tile_scales(scale_ptr, rows, row_mask, n, k, column, FORMAT: tl.constexpr, GROUP: tl.constexpr):
    """Scales of the tile at dense ``column``: float32 ``[rows, 1]``, or ``[rows, 32]`` for small groups.

    ``scale_ptr`` is ``[scale groups, n]``; a tile lies inside one group if the group's size is a multiple of
    the tile's 128 columns.
    """
    if GROUP % 128 == 0:
        inside = rows < tl.where(column < k, n, 0)
        scales = tl.load(scale_ptr + (column // GROUP) * n + rows, mask=inside, other=0.0)[:, None]
    else:
        columns = column + 4 * tl.arange(0, GROUPS)
        where = (columns[None, :] // GROUP) * n + rows[:, None]
        inside = row_mask[:, None] & (columns < k)[None, :]
        scales = tl.load(scale_ptr + where, mask=inside, other=0.0)
    return in_units(scales.to(tl.float32), FORMAT)


@triton.jit
def finish(
    acc,
    scale_ptr,
    bias_ptr,
    rows,
    row_mask,
    token_scale,
    FORMAT: tl.constexpr,
    SCALES: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Sums ``[rows, tokens]`` -> results in float32: channel scale, token scale, bias.

    ``token_scale`` is ``[1, tokens]``.
    """
    if SCALES == PER_CHANNEL:
        acc *= in_units(tl.load(scale_ptr + rows, mask=row_mask, other=0.0).to(tl.float32), FORMAT)[:, None]
    acc *= token_scale
    if BIAS:
        acc += tl.load(bias_ptr + rows, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    return acc
