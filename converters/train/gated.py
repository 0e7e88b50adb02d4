"""The gated activation of an FFN, ``act(gate) * up``, fused and in the order its inputs lie in memory.

A sparse product comes out column by column. A kernel that walks such a matrix row by row touches a new cache
line with every element, so on GPUs the Triton kernel gives a program a stretch of a *column* where the gate
is stored by columns and a stretch of a row otherwise (arXiv:2404.01847 does so for GEGLU; SwiGLU is alike).
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Activation = Literal["silu", "gelu_tanh"]
# Hugging Face's names for what the kernel knows.
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
}  # fmt: skip


def gated_reference(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """``act(gate) * up`` in plain torch."""
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


class FusedGated(torch.autograd.Function):
    """The Triton kernels as one differentiable operation on ``[rows, columns]``."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        """One pass over memory."""
        from converters.train.gated_triton import forward_kernel

        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return forward_kernel(gate, up, activation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """Both gradients in one pass."""
        from converters.train.gated_triton import backward_kernel

        gate, up = ctx.saved_tensors
        return *backward_kernel(grads[0], gate, up, ctx.activation), None


def gated_activation(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """``act(gate) * up``; fused on CUDA.

    Args:
        gate: ``[..., width]``.
        up: the same shape and dtype.
        activation: SwiGLU's or GEGLU's.
    """
    if not gate.is_cuda:
        return gated_reference(gate, up, activation)
    fused: Tensor = FusedGated.apply(gate.flatten(0, -2), up.flatten(0, -2), activation)
    return fused.unflatten(0, gate.shape[:-1])


class GatedFfn(nn.Module):
    """A family's gated FFN with the fused activation; its linears keep their names."""

    def __init__(self, mlp: Any, activation: Activation) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.activation: Activation = activation

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``down(act(gate x) * (up x))``."""
        gate, up = self.gate_proj(hidden_states), self.up_proj(hidden_states)
        output: Tensor = self.down_proj(gated_activation(gate, up, self.activation))
        return output
