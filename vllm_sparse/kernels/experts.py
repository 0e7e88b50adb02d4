"""2:4 experts of a mixture-of-experts layer, all that a batch chose in one call of the CPU kernels."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from vllm_sparse.errors import UnsupportedError
from vllm_sparse.kernels.base import ActivationQuant, LinearSpec, PackedWeight
from vllm_sparse.kernels.cpu import kind_code


class GatedActivation(IntEnum):
    """What stands between the projections, numbered as csrc/experts.h numbers it."""

    SILU = 0
    GELU = 1
    GELU_TANH = 2


@dataclass(frozen=True)
class PackedExperts:
    """Both projections of all experts, one expert after the other.

    Attributes:
        down: the down projection's layer, ``[hidden, width]``.
        gate_up_packed: ``[experts, bytes]``; each expert's gate rows, then its up rows.
        gate_up_scale: its scales, ``[experts, ...]``, or None.
        down_packed: ``[experts, bytes]``.
        down_scale: its scales, or None.
    """

    down: LinearSpec
    gate_up_packed: Tensor
    gate_up_scale: Tensor | None
    down_packed: Tensor
    down_scale: Tensor | None


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


def _stack(experts: Sequence[Tensor]) -> Tensor:
    first = experts[0]
    bytes_of_one = first.numel() * first.element_size()
    flat = torch.ops.vllm_sparse.empty_huge(first, len(experts) * bytes_of_one)
    stacked: Tensor = flat.view(first.dtype).reshape(len(experts), *first.shape)
    for target, expert in zip(stacked, experts, strict=True):
        target.copy_(expert)
    return stacked


def stack(
    gate_up: LinearSpec, down: LinearSpec, gate_ups: Sequence[PackedWeight], downs: Sequence[PackedWeight]
) -> PackedExperts:
    """One tensor per projection from experts that the CPU backend packed.

    Raises:
        UnsupportedError: see :func:`unsupported_reason`.
    """
    reason = unsupported_reason(gate_up, down)
    if reason is not None:
        raise UnsupportedError(f"these experts have no operator of their own: {reason}")
    scales = [
        None if packed[0].scale is None else torch.stack([p.scale for p in packed if p.scale is not None])
        for packed in (gate_ups, downs)
    ]
    return PackedExperts(
        down, _stack([p.packed for p in gate_ups]), scales[0], _stack([p.packed for p in downs]), scales[1]
    )


def forward(
    experts: PackedExperts, activation: GatedActivation, x: Tensor, topk_weights: Tensor, topk_ids: Tensor
) -> Tensor:
    """Sum over each token's experts of ``weight * down(act(gate(x)) * up(x))``, accumulated in float32.

    Args:
        experts: the layer.
        activation: between the projections.
        x: ``[tokens, hidden]``.
        topk_weights: ``[tokens, top_k]``.
        topk_ids: ``[tokens, top_k]``; negative ones are experts of other ranks, which add nothing.

    Returns:
        ``[tokens, hidden]`` in ``x.dtype``.
    """
    out: Tensor = torch.ops.vllm_sparse.experts_packed_24(
        x.contiguous(),
        topk_weights.to(torch.float32).contiguous(),
        topk_ids.to(torch.int64).contiguous(),
        experts.gate_up_packed,
        experts.gate_up_scale,
        experts.down_packed,
        experts.down_scale,
        experts.down.k,
        kind_code(experts.down),
        experts.down.group_size or 0,
        int(activation),
    )
    return out
