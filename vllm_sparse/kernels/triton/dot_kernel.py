"""Kernels for more tokens: expand a tile of weights in registers, then an ordinary dense ``tl.dot``.

The weights are operand A (the product computed is ``W x^T``), so that few tokens do not waste rows of the
tensor core. Traffic is that of the sparse weight; arithmetic is that of the dense one.
"""

import triton
import triton.language as tl

from vllm_sparse.kernels.triton.decode import (
    BLOCK_COLUMNS,
    GROUPS,
    NO_SCALE,
    PER_GROUP,
    TILE_COLUMNS,
    TILE_WORDS,
    column_fields,
    expand,
    finish,
    pack_values,
    row_offsets,
    tile_scales,
    word_pointers,
)


@triton.jit
def accumulate(
    x_ptr,
    words,
    codes,
    scale_ptr,
    rows,
    row_mask,
    token_mask,
    n,
    k,
    start,
    stop,
    FORMAT: tl.constexpr,
    SCALES: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sums ``[BLOCK_N, TOKENS]`` over the blocks from ``start`` to ``stop``, group scales applied.

    ``x_ptr``: ``[128, TOKENS]``, the tokens' first 128 columns; ``words`` and ``codes``: ``[BLOCK_N, 32]``,
    the rows' first tile.
    """
    columns = tl.arange(0, TILE_COLUMNS)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    acc = tl.zeros([BLOCK_N, TOKENS], tl.float32)
    for block in tl.range(start, stop, num_stages=STAGES):
        both = tl.load(codes + block * TILE_WORDS, mask=row_mask[:, None], other=0).to(tl.int32)
        fields = column_fields(both)
        for tile in tl.static_range(2):
            loaded = tl.load(words + (block * 2 + tile) * TILE_WORDS, mask=row_mask[:, None], other=0)
            column = block * BLOCK_COLUMNS + tile * TILE_COLUMNS
            inside = (column + columns < k)[:, None] & token_mask[None, :]
            x = tl.load(x_ptr + column, mask=inside, other=0.0)
            if SCALES == PER_GROUP:
                scales = tile_scales(scale_ptr, rows, row_mask, n, k, column, FORMAT, GROUP)
                if GROUP % 128 == 0:
                    # Exact numbers in the product, the scale in float32 after it.
                    packed = pack_values(loaded, None, FORMAT, False, dtype)
                    acc += tl.dot(expand(packed, fields, tile, dtype), x) * scales
                else:
                    packed = pack_values(loaded, scales, FORMAT, True, dtype)
                    acc = tl.dot(expand(packed, fields, tile, dtype), x, acc)
            else:
                packed = pack_values(loaded, None, FORMAT, False, dtype)
                acc = tl.dot(expand(packed, fields, tile, dtype), x, acc)
    return acc


@triton.jit(do_not_specialize=["m", "blocks_per_split"])
def dot_24(
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
    blocks_per_split,
    FORMAT: tl.constexpr,
    SCALES: tl.constexpr,
    GROUP: tl.constexpr,
    TOKEN_SCALES: tl.constexpr,
    BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTIAL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``y[m, n] = x[m, k] @ W.T``; PARTIAL: float32 sums of one split, ``y[split, m, n]``, not yet scaled."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    split = tl.program_id(2)
    groups = tl.arange(0, GROUPS)
    columns = tl.arange(0, TILE_COLUMNS)
    row_mask = rows < n
    token_mask = tokens < m
    words, codes = word_pointers(packed_ptr, metadata_offset, FORMAT)
    words += row_offsets(rows, k_blocks * (2 * TILE_WORDS))[:, None] + groups[None, :]
    codes += row_offsets(rows, k_blocks * TILE_WORDS)[:, None] + groups[None, :]
    x_ptr += tokens.to(tl.int64)[None, :] * stride_x + columns[:, None]
    start = split * blocks_per_split
    stop = tl.minimum(start + blocks_per_split, k_blocks)

    acc = accumulate(
        x_ptr,
        words,
        codes,
        scale_ptr,
        rows,
        row_mask,
        token_mask,
        n,
        k,
        start,
        stop,
        FORMAT,
        SCALES,
        GROUP,
        TOKENS,
        BLOCK_N,
        STAGES,
    )
    if not PARTIAL:
        token_scale = tl.full([1, TOKENS], 1.0, tl.float32)
        if TOKEN_SCALES:
            token_scale = tl.load(token_scale_ptr + tokens, mask=token_mask, other=0.0)[None, :]
        acc = finish(acc, scale_ptr, bias_ptr, rows, row_mask, token_scale, FORMAT, SCALES, BIAS)
    where = (split * m + tokens).to(tl.int64)[None, :] * n + rows[:, None]
    tl.store(y_ptr + where, acc.to(y_ptr.dtype.element_ty), mask=row_mask[:, None] & token_mask[None, :])


@triton.jit
def experts_dot_24(
    x_ptr,
    packed_ptr,
    scale_ptr,
    token_scale_ptr,
    y_ptr,
    pair_ptr,
    block_expert_ptr,
    n,
    k,
    stride_x,
    k_blocks,
    metadata_offset,
    top_k,
    expert_bytes,
    expert_scales,
    FORMAT: tl.constexpr,
    SCALES: tl.constexpr,
    GROUP: tl.constexpr,
    TOKEN_SCALES: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Products by chosen experts, the pairs of an expert together: its weight is expanded once for all.

    Program column ``b`` multiplies expert ``block_expert_ptr[b]`` (negative: nothing to do) by the pairs of
    token and choice ``pair_ptr[b * TOKENS:]`` (negative: none). Pair ``p`` reads row ``p // top_k`` of ``x``
    and writes row ``p`` of ``y[pairs, n]``.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    block = tl.program_id(1)
    expert = tl.load(block_expert_ptr + block)
    pairs = tl.load(pair_ptr + block * TOKENS + tl.arange(0, TOKENS))
    row_mask = rows < n
    token_mask = pairs >= 0
    pairs = tl.maximum(pairs, 0)
    chosen = tl.maximum(expert, 0).to(tl.int64)
    groups = tl.arange(0, GROUPS)
    columns = tl.arange(0, TILE_COLUMNS)
    words, codes = word_pointers(packed_ptr + chosen * expert_bytes, metadata_offset, FORMAT)
    words += row_offsets(rows, k_blocks * (2 * TILE_WORDS))[:, None] + groups[None, :]
    codes += row_offsets(rows, k_blocks * TILE_WORDS)[:, None] + groups[None, :]
    if SCALES != NO_SCALE:
        scale_ptr += chosen * expert_scales
    sources = pairs // top_k
    x_ptr += sources.to(tl.int64)[None, :] * stride_x + columns[:, None]
    acc = accumulate(
        x_ptr,
        words,
        codes,
        scale_ptr,
        rows,
        row_mask,
        token_mask,
        n,
        k,
        0,
        tl.where(expert < 0, 0, k_blocks),
        FORMAT,
        SCALES,
        GROUP,
        TOKENS,
        BLOCK_N,
        STAGES,
    )
    token_scale = tl.full([1, TOKENS], 1.0, tl.float32)
    if TOKEN_SCALES:
        token_scale = tl.load(token_scale_ptr + sources, mask=token_mask, other=0.0)[None, :]
    acc = finish(acc, scale_ptr, None, rows, row_mask, token_scale, FORMAT, SCALES, False)
    where = pairs.to(tl.int64)[None, :] * n + rows[:, None]
    tl.store(y_ptr + where, acc.to(y_ptr.dtype.element_ty), mask=row_mask[:, None] & token_mask[None, :])
