"""Kernel for one to eight tokens: select the activations that the kept values meet, multiply, add.

No weight is expanded and no tensor core is used; each group costs two multiply-adds per token. The program
owns ``BLOCK_N`` rows and, with split-K, a share of the blocks along K.
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
    activation_selectors,
    finish,
    permute_bytes,
    row_offsets,
    tile_scales,
    values_as_float,
    word_pointers,
)


@triton.jit
def selected_activations(x_ptr, group, inside, selectors, HALF: tl.constexpr):
    """The two activations that each group's kept values meet, float32 ``[rows, 32]``.

    The four of a group arrive in one 8-byte load; one byte permutation picks both.
    """
    raw = tl.load(x_ptr.to(tl.pointer_type(tl.int64)) + group, mask=inside, other=0)
    low = raw.to(tl.int32)[None, :]
    high = (raw >> 32).to(tl.int32)[None, :]
    pair = permute_bytes(low, high, selectors)
    if HALF:
        left = pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        right = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        left = (pair << 16).to(tl.float32, bitcast=True)
        right = (pair & -65536).to(tl.float32, bitcast=True)
    return left, right


@triton.jit(do_not_specialize=["m", "blocks_per_split"])
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
    blocks_per_split,
    expert_ptr,
    top_k,
    expert_bytes,
    expert_scales,
    FORMAT: tl.constexpr,
    HALF: tl.constexpr,
    SCALES: tl.constexpr,
    GROUP: tl.constexpr,
    TOKEN_SCALES: tl.constexpr,
    BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTIAL: tl.constexpr,
    STAGES: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """``y[m, n] = x[m, k] @ W.T``; PARTIAL: float32 sums of one split, ``y[split, m, n]``, not yet scaled.

    With EXPERTS the weights of all experts lie ``expert_bytes`` apart, ``expert_ptr[pair]`` chooses one for
    each pair of token and choice, and ``y`` is ``[pairs, n]``; ``m`` and ``TOKENS`` are then 1.
    ``m <= TOKENS``; rows of ``x`` start 8-byte aligned, ``stride_x`` is in elements.
    """
    if EXPERTS:
        # One program column per (token, chosen expert): its own weight, input row and output row.
        pair = tl.program_id(2)
        expert = tl.load(expert_ptr + pair).to(tl.int64)
        packed_ptr += expert * expert_bytes
        if SCALES != NO_SCALE:
            scale_ptr += expert * expert_scales
        if TOKEN_SCALES:
            token_scale_ptr += pair // top_k
        x_ptr += (pair // top_k).to(tl.int64) * stride_x
        y_ptr += pair.to(tl.int64) * n
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    groups = tl.arange(0, GROUPS)
    row_mask = rows < n
    words, codes = word_pointers(packed_ptr, metadata_offset, FORMAT)
    words += row_offsets(rows, k_blocks * (2 * TILE_WORDS))[:, None] + groups[None, :]
    codes += row_offsets(rows, k_blocks * TILE_WORDS)[:, None] + groups[None, :]
    start = split * blocks_per_split
    stop = tl.minimum(start + blocks_per_split, k_blocks)

    sums = ()
    for _ in tl.static_range(TOKENS):
        sums += (tl.zeros([BLOCK_N, GROUPS], tl.float32),)
    for block in tl.range(start, stop, num_stages=STAGES):
        both = tl.load(codes + block * TILE_WORDS, mask=row_mask[:, None], other=0).to(tl.int32)
        for tile in tl.static_range(2):
            loaded = tl.load(words + (block * 2 + tile) * TILE_WORDS, mask=row_mask[:, None], other=0)
            first, second = values_as_float(loaded, FORMAT)
            selectors = activation_selectors(both, tile)
            column = block * BLOCK_COLUMNS + tile * TILE_COLUMNS
            if SCALES == PER_GROUP:
                scales = tile_scales(scale_ptr, rows, row_mask, n, k, column, FORMAT, GROUP)
                first *= scales
                second *= scales
            updated = ()
            for token in tl.static_range(TOKENS):
                # No columns for a token beyond the last: vector masks from scalars only.
                limit = tl.where(m > token, k, 0)
                left, right = selected_activations(
                    x_ptr + token * stride_x,
                    column // 4 + groups,
                    column + 4 * groups < limit,
                    selectors,
                    HALF,
                )
                updated += (sums[token] + first * left + second * right,)
            sums = updated

    for token in tl.static_range(TOKENS):
        total = tl.sum(sums[token], axis=1)[:, None]
        mask = rows < tl.where(m > token, n, 0)
        if not PARTIAL:
            token_scale = 1.0
            if TOKEN_SCALES:
                token_scale = tl.load(token_scale_ptr + token, mask=m > token, other=0.0)
            total = finish(total, scale_ptr, bias_ptr, rows, row_mask, token_scale, FORMAT, SCALES, BIAS)
        result = tl.reshape(total, (BLOCK_N,)).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + (split * m + token).to(tl.int64) * n + rows, result, mask=mask)
