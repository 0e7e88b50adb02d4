"""Kernel for one to eight tokens: select the activations that the kept values meet, multiply, add.

No weight is expanded and no tensor core is used; each group costs two multiply-adds per token. The program
owns ``BLOCK_N`` rows and, with split-K, a share of the blocks along K.
"""

import triton
import triton.language as tl

from vllm_sparse.kernels.triton.decode import (
    BLOCK_COLUMNS,
    GROUPS,
    PER_GROUP,
    TILE_COLUMNS,
    TILE_WORDS,
    finish,
    row_offsets,
    tile_scales,
    values_as_float,
    word_pointers,
)


@triton.jit
def group_activations(x_ptr, group, inside, HALF: tl.constexpr):
    """The 4 activations of each of 32 groups, float32, from one 8-byte load per group."""
    raw = tl.load(x_ptr.to(tl.pointer_type(tl.int64)) + group, mask=inside, other=0)
    low = raw.to(tl.int32)
    high = (raw >> 32).to(tl.int32)
    if HALF:
        x0 = low.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        x1 = (low >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        x2 = high.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        x3 = (high >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        x0 = (low << 16).to(tl.float32, bitcast=True)
        x1 = (low & -65536).to(tl.float32, bitcast=True)
        x2 = (high << 16).to(tl.float32, bitcast=True)
        x3 = (high & -65536).to(tl.float32, bitcast=True)
    return x0[None, :], x1[None, :], x2[None, :], x3[None, :]


@triton.jit(do_not_specialize=["m"])
def select_24(
    x_ptr,
    packed_ptr,
    scale_ptr,
    token_scale_ptr,
    bias_ptr,
    y_ptr,
    m,
    n,
    k,
    stride_x,
    k_blocks,
    metadata_offset,
    FORMAT: tl.constexpr,
    HALF: tl.constexpr,
    SCALES: tl.constexpr,
    GROUP: tl.constexpr,
    TOKEN_SCALES: tl.constexpr,
    BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``y[m, n] = x[m, k] @ W.T``; with split-K float32 partial sums ``y[split, m, n]``, not yet scaled.

    ``m <= TOKENS``; rows of ``x`` start 8-byte aligned, ``stride_x`` is in elements.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    groups = tl.arange(0, GROUPS)
    row_mask = rows < n
    words, codes = word_pointers(packed_ptr, metadata_offset, FORMAT)
    words += row_offsets(rows, k_blocks * (2 * TILE_WORDS))[:, None] + groups[None, :]
    codes += row_offsets(rows, k_blocks * TILE_WORDS)[:, None] + groups[None, :]
    per_split = tl.cdiv(k_blocks, SPLIT_K)
    start = split * per_split
    stop = tl.minimum(start + per_split, k_blocks)

    sums = ()
    for _ in tl.static_range(TOKENS):
        sums += (tl.zeros([BLOCK_N, GROUPS], tl.float32),)
    for block in tl.range(start, stop, num_stages=STAGES):
        both = tl.load(codes + block * TILE_WORDS, mask=row_mask[:, None], other=0).to(tl.int32)
        for tile in tl.static_range(2):
            loaded = tl.load(words + (block * 2 + tile) * TILE_WORDS, mask=row_mask[:, None], other=0)
            first, second = values_as_float(loaded, FORMAT)
            i = (both >> (4 * tile)) & 3
            j = (both >> (4 * tile + 2)) & 3
            column = block * BLOCK_COLUMNS + tile * TILE_COLUMNS
            if SCALES == PER_GROUP:
                scales = tile_scales(scale_ptr, rows, row_mask, n, k, column, GROUP)
                first *= scales
                second *= scales
            inside = column + 4 * groups < k
            updated = ()
            for token in tl.static_range(TOKENS):
                x0, x1, x2, x3 = group_activations(
                    x_ptr + token * stride_x, column // 4 + groups, inside & (m > token), HALF
                )
                left = tl.where(i == 0, x0, tl.where(i == 1, x1, x2))
                right = tl.where(j == 1, x1, tl.where(j == 2, x2, x3))
                updated += (sums[token] + first * left + second * right,)
            sums = updated

    for token in tl.static_range(TOKENS):
        total = tl.sum(sums[token], axis=1)[:, None]
        mask = row_mask & (m > token)
        if SPLIT_K == 1:
            token_scale = 1.0
            if TOKEN_SCALES:
                token_scale = tl.load(token_scale_ptr + token, mask=m > token, other=0.0)
            total = finish(total, scale_ptr, bias_ptr, rows, row_mask, token_scale, SCALES, BIAS)
        result = tl.reshape(total, (BLOCK_N,)).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + (split * m + token).to(tl.int64) * n + rows, result, mask=mask)
