"""2:4 experts of a mixture-of-experts layer, all that a batch chose in one call of the CPU kernels."""

import torch
from torch import Tensor

from vllm_sparse.kernels.base import ActivationQuant, GatedActivation, LinearSpec, StackedWeight


def unsupported_reason(gate_up: LinearSpec, down: LinearSpec) -> str | None:
    """Why the experts' operator cannot serve these layers, which the CPU backend can; None if it can."""
    if (gate_up.n, gate_up.k) != (2 * down.k, down.n):
        return f"gate and up [{gate_up.n}, {gate_up.k}] do not fit down [{down.n}, {down.k}]"
    same = (gate_up.weight, gate_up.activation_dtype, gate_up.activation_quant, gate_up.group_size) == (
        down.weight,
        down.activation_dtype,
        down.activation_quant,
        down.group_size,
    )
    if not same:
        return "the projections differ in format"
    if down.activation_quant is ActivationQuant.FP8_PER_TOKEN:
        return "fp8 activations are quantised outside the kernels"
    return None


def empty_stack(one: Tensor, count: int) -> Tensor:
    """Memory ``[count, ...]`` for weights like ``one``, in 2 MB pages where the system has them."""
    flat = torch.ops.vllm_sparse.empty_huge(one, count * one.nbytes)
    stacked: Tensor = flat.view(one.dtype).reshape(count, *one.shape)
    return stacked


def forward(
    gate_up: StackedWeight,
    down: StackedWeight,
    kind: int,
    activation: GatedActivation,
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
) -> Tensor:
    """See :meth:`vllm_sparse.kernels.base.Backend.experts_layer`; ``kind`` is the operators' number."""
    out: Tensor = torch.ops.vllm_sparse.experts_packed_24(
        x.contiguous(),
        topk_weights.to(torch.float32).contiguous(),
        topk_ids.to(torch.int64).contiguous(),
        gate_up.packed,
        gate_up.scale,
        down.packed,
        down.scale,
        down.spec.k,
        kind,
        down.spec.group_size or 0,
        int(activation),
    )
    return out
