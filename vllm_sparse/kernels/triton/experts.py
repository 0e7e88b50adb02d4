"""Products by the chosen experts of a mixture-of-experts layer, for decode: no host involved.

Each pair of a token and one of its experts is one product with one token, on the select kernel. A batch of a
few tokens rarely asks an expert twice, and where it does the second read comes from the cache; there is
nothing to sort, nothing to count and nothing to wait for, so the operator captures into a CUDA graph. Beyond
a few tokens per expert, per-expert products read less.
"""

import torch
import triton
from torch import Tensor

from vllm_sparse.kernels.base import PackedWeight
from vllm_sparse.kernels.triton.configs import EXPERT_CONFIG, Config
from vllm_sparse.kernels.triton.layout import FORMAT_NUMBER, Layout
from vllm_sparse.kernels.triton.ops import (
    FORMAT_OF_NUMBER,
    FP8_TOKENS,
    LIBRARY,
    NO_QUANT,
    Call,
    rows_for_kernels,
)
from vllm_sparse.kernels.triton.select_kernel import select_24


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
    config: Config = EXPERT_CONFIG,
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
        config: a select configuration without split.

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
    select_24[(triton.cdiv(n, config.block_n), 1, tokens * top_k)](
        call.x,
        packed,
        scale,
        call.token_scale,
        None,
        y,
        1,
        n,
        k,
        call.x.stride(0),
        layout.k_blocks,
        layout.value_bytes,
        layout.k_blocks,
        expert_ids.contiguous(),
        top_k,
        packed.stride(0),
        0 if scale is None else scale.stride(0),
        FORMAT=FORMAT_NUMBER[layout.weight],
        HALF=x.dtype == torch.float16,
        SCALES=call.scales,
        GROUP=group,
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
    return y


LIBRARY.define(
    "experts_linear_24_triton(Tensor x, Tensor packed, Tensor? scale, Tensor expert_ids, int n, int k, "
    "int weight, int group, int quant) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
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


for _key in ("CUDA", "CPU"):
    LIBRARY.impl("experts_linear_24_triton", _op, _key)
torch.library.register_fake("vllm_sparse::experts_linear_24_triton", _fake, lib=LIBRARY)
