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
def fp8_bits_to_float(bits):
    """float8_e4m3fn in the low 8 bits of an int32 -> float32, exact for all finite values.

    Sign, exponent and mantissa move to float32's fields; the exponent bias differs by 120. Written with
    integers because Triton has no e4m3 conversion below compute capability 8.9.
    """
    moved = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
    return moved.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120


@triton.jit
def values_as_float(words, FORMAT: tl.constexpr):
    """A tile of words -> the two kept values of each group, float32, exact."""
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
        first = fp8_bits_to_float(w & 0xFF)
        second = fp8_bits_to_float((w >> 8) & 0xFF)
    else:
        first = ((w << 28) >> 28).to(tl.float32)
        second = ((w << 24) >> 28).to(tl.float32)
    return first, second


@triton.jit
def values_as(words, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """A tile of words -> the two kept values of each group in the 16-bit ``DTYPE``, exact.

    16-bit formats are those of ``DTYPE`` itself; 8-bit and 4-bit values fit bfloat16's and float16's 8 and
    11 significant bits.
    """
    if FORMAT == BF16 or FORMAT == FP16:
        first = words.to(tl.int16).to(DTYPE, bitcast=True)
        second = (words >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    else:
        first, second = values_as_float(words, FORMAT)
        first = first.to(DTYPE)
        second = second.to(DTYPE)
    return first, second


@triton.jit
def expand(first, second, codes):
    """Four columns per group, side by side: ``[rows, 32]`` values and codes -> dense ``[rows, 128]``."""
    i = codes & 3
    j = codes >> 2
    zero = tl.zeros_like(first)
    # i < j, so column 0 is never the right value and column 3 never the left one.
    c0 = tl.where(i == 0, first, zero)
    c1 = tl.where(i == 1, first, tl.where(j == 1, second, zero))
    c2 = tl.where(i == 2, first, tl.where(j == 2, second, zero))
    c3 = tl.where(j == 3, second, zero)
    pairs = tl.join(tl.join(c0, c2), tl.join(c1, c3))
    return tl.reshape(pairs, (first.shape[0], TILE_COLUMNS))


@triton.jit
def tile_scales(scale_ptr, rows, row_mask, n, k, column, GROUP: tl.constexpr):
    """Scales of the tile at dense ``column``: float32 ``[rows, 1]``, or ``[rows, 32]`` for small groups.

    ``scale_ptr`` is ``[scale groups, n]``; a tile lies inside one group if the group's size is a multiple of
    the tile's 128 columns.
    """
    if GROUP % TILE_COLUMNS == 0:
        inside = row_mask & (column < k)
        scales = tl.load(scale_ptr + (column // GROUP) * n + rows, mask=inside, other=0.0)[:, None]
    else:
        columns = column + 4 * tl.arange(0, GROUPS)
        where = (columns[None, :] // GROUP) * n + rows[:, None]
        inside = row_mask[:, None] & (columns < k)[None, :]
        scales = tl.load(scale_ptr + where, mask=inside, other=0.0)
    return scales.to(tl.float32)


@triton.jit
def finish(acc, scale_ptr, bias_ptr, rows, row_mask, token_scale, SCALES: tl.constexpr, BIAS: tl.constexpr):
    """Sums ``[rows, tokens]`` -> results in float32: channel scale, token scale, bias.

    ``token_scale`` is ``[1, tokens]``.
    """
    if SCALES == PER_CHANNEL:
        acc *= tl.load(scale_ptr + rows, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    acc *= token_scale
    if BIAS:
        acc += tl.load(bias_ptr + rows, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    return acc
