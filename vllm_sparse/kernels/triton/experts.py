"""Products by the chosen experts of a mixture-of-experts layer, for decode: no host involved.

A few pairs of a token and one of its experts: each is one product with one token, on the select kernel. Such
a batch rarely asks an expert twice, and where it does the second read comes from the cache; there is nothing
to sort. More pairs: they are sorted by expert on the device, and each expert's weight is expanded once for up
to 16 of its pairs, on tensor cores. Neither way waits for the host, so both capture into a CUDA graph.
"""

import torch
import triton
from torch import Tensor

from vllm_sparse.kernels import operators
from vllm_sparse.kernels.base import PackedWeight
from vllm_sparse.kernels.triton.configs import EXPERT_CONFIG, EXPERT_DOT_CONFIG, Config, Route
from vllm_sparse.kernels.triton.dot_kernel import experts_dot_24
from vllm_sparse.kernels.triton.layout import FORMAT_NUMBER, Layout
from vllm_sparse.kernels.triton.ops import (
    FORMAT_OF_NUMBER,
    FP8_TOKENS,
    NO_QUANT,
    Call,
    rows_for_kernels,
)
from vllm_sparse.kernels.triton.select_kernel import select_24

# Up to this many pairs for each expert of the layer every pair is a product of its own.
PAIRS_PER_EXPERT = 4


def stack(packed: list[PackedWeight]) -> PackedWeight:
    """The packed weights of all experts (same spec) in one tensor ``[experts, bytes]``, scales likewise."""
    scales = [expert.scale for expert in packed if expert.scale is not None]
    dtypes = {scale.dtype for scale in scales}
    # An expert's scales may have packed smaller than another's; all take the widest.
    wide = scales[0].dtype if len(dtypes) == 1 else torch.float32
    return PackedWeight(
        torch.stack([expert.packed for expert in packed]),
        torch.stack([scale.to(wide) for scale in scales]) if scales else None,
    )


def group_pairs(expert_ids: Tensor, experts: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Sort pairs by expert into blocks of ``tokens`` that hold one expert each; nothing waits.

    Args:
        expert_ids: ``[pairs]``, each below ``experts``.
        experts: how many there are.
        tokens: pairs per block.

    Returns:
        ``(pair of every slot [blocks * tokens], expert of every block [blocks])``, int32, -1 where there is
        none.
        The number of blocks depends on sizes alone: it is the most that any choice of experts can fill.
    """
    ids = expert_ids.to(torch.int64)
    pairs = ids.numel()
    order = ids.argsort(stable=True)
    counts = torch.zeros(experts, dtype=torch.int64, device=ids.device)
    counts.scatter_add_(0, ids, torch.ones_like(ids))
    padded = (counts + tokens - 1) // tokens * tokens
    ends = padded.cumsum(0)
    # Where an expert's slots start, less where its pairs start in the sorted order.
    shift = (ends - padded) - (counts.cumsum(0) - counts)
    slots = torch.arange(pairs, device=ids.device) + shift[ids[order]]
    blocks = min(pairs, experts) + pairs // tokens
    pair_of_slot = torch.full((blocks * tokens,), -1, dtype=torch.int32, device=ids.device)
    pair_of_slot.scatter_(0, slots, order.to(torch.int32))
    starts = torch.arange(0, blocks * tokens, tokens, device=ids.device)
    expert_of_block = torch.searchsorted(ends, starts, right=True)
    return pair_of_slot, expert_of_block.masked_fill(expert_of_block >= experts, -1).to(torch.int32)


def experts_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor | None,
    expert_ids: Tensor,
    n: int,
    k: int,
    weight: int,
    group: int,
    quant: int,
    config: Config | None = None,
) -> Tensor:
    """Every token by each of its experts.

    Args:
        x: ``[tokens, k]``; for a second projection ``[tokens * top_k, k]``, its ids in one column.
        packed: ``[experts, bytes]`` from :func:`stack`.
        scale: ``[experts, ...]`` from :func:`stack`.
        expert_ids: ``[tokens, top_k]`` integers, each below the number of experts.
        n: output features.
        k: input features.
        weight: the format's number.
        group: columns that share a scale; 0 is one scale per output channel.
        quant: quantisation of the activations, numbered as for the plain operator.
        config: a select or dot configuration without split; by default the number of pairs chooses.

    Returns:
        ``[tokens, top_k, n]`` in the dtype of ``x``.
    """
    layout = Layout(n, k, FORMAT_OF_NUMBER[weight])
    tokens, top_k = expert_ids.shape
    y = torch.empty(tokens, top_k, n, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    call = Call(rows_for_kernels(x, k), packed, scale, None, layout, group)
    if quant != NO_QUANT:
        call.quantize(fp8=quant == FP8_TOKENS)
    if config is None:
        few = tokens * top_k <= PAIRS_PER_EXPERT * packed.shape[0]
        config = EXPERT_CONFIG if few else EXPERT_DOT_CONFIG
    if config.route is Route.DOT:
        _grouped(call, expert_ids, config, y)
    else:
        _pairwise(call, expert_ids, config, y)
    return y


def _grouped(call: Call, expert_ids: Tensor, config: Config, y: Tensor) -> None:
    layout, packed, scale = call.layout, call.packed, call.scale
    pair_of_slot, expert_of_block = group_pairs(expert_ids.flatten(), packed.shape[0], config.tokens)
    experts_dot_24[(triton.cdiv(layout.n, config.block_n), expert_of_block.numel())](
        call.x,
        packed,
        scale,
        call.token_scale,
        y,
        pair_of_slot,
        expert_of_block,
        layout.n,
        layout.k,
        call.x.stride(0),
        layout.k_blocks,
        layout.value_bytes,
        expert_ids.shape[1],
        packed.stride(0),
        0 if scale is None else scale.stride(0),
        FORMAT=FORMAT_NUMBER[layout.weight],
        SCALES=call.scales,
        GROUP=call.group,
        TOKEN_SCALES=call.token_scale is not None,
        TOKENS=config.tokens,
        BLOCK_N=config.block_n,
        STAGES=config.stages,
        num_warps=config.warps,
        enable_fp_fusion=True,
    )


def _pairwise(call: Call, expert_ids: Tensor, config: Config, y: Tensor) -> None:
    layout, packed, scale = call.layout, call.packed, call.scale
    tokens, top_k = expert_ids.shape
    select_24[(triton.cdiv(layout.n, config.block_n), 1, tokens * top_k)](
        call.x,
        packed,
        scale,
        call.token_scale,
        None,
        y,
        1,
        layout.n,
        layout.k,
        call.x.stride(0),
        layout.k_blocks,
        layout.value_bytes,
        layout.k_blocks,
        expert_ids.contiguous(),
        top_k,
        packed.stride(0),
        0 if scale is None else scale.stride(0),
        FORMAT=FORMAT_NUMBER[layout.weight],
        HALF=call.x.dtype == torch.float16,
        SCALES=call.scales,
        GROUP=call.group,
        TOKEN_SCALES=call.token_scale is not None,
        BIAS=False,
        TOKENS=1,
        BLOCK_N=config.block_n,
        PARTIAL=False,
        STAGES=config.stages,
        EXPERTS=True,
        num_warps=config.warps,
        enable_fp_fusion=True,
    )


def _op(
    x: Tensor,
    packed: Tensor,
    scale: Tensor | None,
    expert_ids: Tensor,
    n: int,
    k: int,
    weight: int,
    group: int,
    quant: int,
) -> Tensor:
    return experts_linear(x, packed, scale, expert_ids, n, k, weight, group, quant)


def _fake(
    x: Tensor,
    packed: Tensor,
    scale: Tensor | None,
    expert_ids: Tensor,
    n: int,
    k: int,
    weight: int,
    group: int,
    quant: int,
) -> Tensor:
    return x.new_empty([*expert_ids.shape, n])


operators.define(
    "experts_linear_24_triton(Tensor x, Tensor packed, Tensor? scale, Tensor expert_ids, int n, int k, "
    "int weight, int group, int quant) -> Tensor",
    _op,
    _fake,
)
