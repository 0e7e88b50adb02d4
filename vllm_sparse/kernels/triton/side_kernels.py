"""The small kernels around the products: sums of splits, dense expansion, activation quantisation."""

import triton
import triton.language as tl

from vllm_sparse.kernels.triton.decode import (
    BLOCK_COLUMNS,
    GROUPS,
    NO_SCALE,
    PER_CHANNEL,
    TILE_COLUMNS,
    TILE_WORDS,
    column_fields,
    expand,
    finish,
    in_units,
    pack_values,
    row_offsets,
    tile_scales,
    word_pointers,
)


@triton.jit(do_not_specialize=["m"])
def sum_splits_24(
    partial_ptr,
    scale_ptr,
    token_scale_ptr,
    bias_ptr,
    y_ptr,
    m,
    n,
    FORMAT: tl.constexpr,
    SCALES: tl.constexpr,
    TOKEN_SCALES: tl.constexpr,
    BIAS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Partial sums ``[SPLIT_K, m, n]`` -> ``y[m, n]``, added in a fixed order, then scaled."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(1)
    row_mask = rows < n
    total = tl.zeros([BLOCK_N], tl.float32)
    for split in tl.static_range(SPLIT_K):
        where = (split * m + token).to(tl.int64) * n + rows
        total += tl.load(partial_ptr + where, mask=row_mask, other=0.0)
    token_scale = 1.0
    if TOKEN_SCALES:
        token_scale = tl.load(token_scale_ptr + token)
    total = finish(total[:, None], scale_ptr, bias_ptr, rows, row_mask, token_scale, FORMAT, SCALES, BIAS)
    result = tl.reshape(total, (BLOCK_N,)).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + token.to(tl.int64) * n + rows, result, mask=row_mask)


@triton.jit
def expand_24(
    packed_ptr,
    scale_ptr,
    dense_ptr,
    first_row,
    n,
    k,
    k_blocks,
    metadata_offset,
    FORMAT: tl.constexpr,
    SCALES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Rows from ``first_row`` on as a dense matrix ``[rows, k]``, dequantised if SCALES says so."""
    local = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = first_row + local
    block = tl.program_id(1)
    groups = tl.arange(0, GROUPS)
    row_mask = rows < n
    dtype: tl.constexpr = dense_ptr.dtype.element_ty
    words, codes = word_pointers(packed_ptr, metadata_offset, FORMAT)
    words += row_offsets(rows, k_blocks * (2 * TILE_WORDS))[:, None] + groups[None, :]
    codes += row_offsets(rows, k_blocks * TILE_WORDS)[:, None] + groups[None, :]
    both = tl.load(codes + block * TILE_WORDS, mask=row_mask[:, None], other=0).to(tl.int32)
    fields = column_fields(both)
    for tile in tl.static_range(2):
        loaded = tl.load(words + (block * 2 + tile) * TILE_WORDS, mask=row_mask[:, None], other=0)
        column = block * BLOCK_COLUMNS + tile * TILE_COLUMNS
        if SCALES == NO_SCALE:
            pairs = pack_values(loaded, None, FORMAT, False, dtype)
        else:
            if SCALES == PER_CHANNEL:
                scales = tl.load(scale_ptr + rows, mask=row_mask, other=0.0).to(tl.float32)[:, None]
                scales = in_units(scales, FORMAT)
            else:
                scales = tile_scales(scale_ptr, rows, row_mask, n, k, column, FORMAT, GROUP)
            pairs = pack_values(loaded, scales, FORMAT, True, dtype)
        dense = expand(pairs, fields, tile, dtype)
        columns = column + tl.arange(0, TILE_COLUMNS)
        mask = row_mask[:, None] & (columns < k)[None, :]
        tl.store(dense_ptr + local.to(tl.int64)[:, None] * k + columns[None, :], dense, mask=mask)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def quantize_tokens(
    x_ptr,
    q_ptr,
    token_scale_ptr,
    k,
    stride_x,
    stride_q,
    FP8: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Symmetric dynamic quantisation of one token, as ``reference.quantize_per_token`` defines it.

    The quantised numbers are written in 8 bits or in the activations' own 16-bit dtype, which holds every
    int8 and e4m3 number exactly; the scale is apart.
    """
    token = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, k, BLOCK):
        x = tl.load(x_ptr + token * stride_x + start + offsets, mask=start + offsets < k, other=0.0)
        largest = _larger(largest, tl.abs(x.to(tl.float32)))
    limit: tl.constexpr = 448.0 if FP8 else 127.0
    scale = _larger(tl.div_rn(tl.reduce(largest, 0, _larger), limit), 1.1754943508222875e-38)
    tl.store(token_scale_ptr + token, scale)
    for start in range(0, k, BLOCK):
        mask = start + offsets < k
        x = tl.load(x_ptr + token * stride_x + start + offsets, mask=mask, other=0.0).to(tl.float32)
        v = tl.minimum(tl.maximum(tl.div_rn(x, scale), -limit), limit)
        # Adding and taking away 1.5 * 2^23 steps rounds to a multiple of one step, ties to even.
        if FP8:
            # A step is 2^-3 of the value's power of two, and at least 2^-9 (subnormals).
            power = (v.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
            magic = tl.maximum(power, 0.015625) * 1572864.0
        else:
            magic = 12582912.0
        q = (v + magic) - magic
        tl.store(q_ptr + token * stride_q + start + offsets, q.to(q_ptr.dtype.element_ty), mask=mask)
