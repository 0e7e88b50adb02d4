"""The three products of a sparse training step, on 2:4 hardware where there is some, else emulated exactly.

    forward    Y  = X Ws^T                 Ws is 2:4 along its input
    backward   dX = dY Ws                  as (Ws^T)^T: 2:4 too when the mask is transposable
               dW = prune(dY^T) X          the gradient pruned to 2:4 along the tokens, without bias

On NVIDIA GPUs from compute capability 8.0 on, 16-bit matrices whose sizes fit go through
``torch.sparse.to_sparse_semi_structured``. Elsewhere the same matrices, zeros and all, are multiplied
densely, which gives the same numbers up to the order of summation.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from converters.train.mvue import mvue24, padded
from vllm_sparse.sparse24.mask import GROUP

# What torch's semi-structured kernels take of 16-bit matrices: rows by 32, columns by 64.
_ROWS, _COLUMNS = 32, 64


def hardware_takes(matrix: Tensor) -> bool:
    """Whether a 2:4 matrix can be multiplied by sparse tensor cores here."""
    if not matrix.is_cuda or matrix.dtype not in (torch.float16, torch.bfloat16):
        return False
    if torch.cuda.get_device_capability(matrix.device) < (8, 0):
        return False
    return matrix.shape[0] % _ROWS == 0 and matrix.shape[1] % _COLUMNS == 0


def pack(matrix: Tensor) -> Tensor:
    """A 2:4 matrix as the hardware multiplies it, or itself."""
    if not hardware_takes(matrix):
        return matrix
    packed: Tensor = torch.sparse.to_sparse_semi_structured(matrix.contiguous())
    return packed


@dataclass
class SparseProducts:
    """One weight, packed for a step.

    Attributes:
        weight: Ws ``[out, in]`` for ``F.linear``.
        transposed: ``Ws^T`` ``[in, out]`` for ``F.linear``; only packed when it is 2:4.
        prune_weight_gradient: estimate dW from a pruned dY.
        prune_input_gradient: estimate dX from a pruned dY, for masks that are not transposable.
    """

    weight: Tensor
    transposed: Tensor
    prune_weight_gradient: bool
    prune_input_gradient: bool

    @classmethod
    def of(
        cls, weight: Tensor, transposable: bool, prune_weight_gradient: bool, prune_input_gradient: bool
    ) -> "SparseProducts":
        """Pack ``weight``, already 2:4, and its transpose."""
        transposed = weight.T
        return cls(
            pack(weight),
            pack(transposed) if transposable else transposed,
            prune_weight_gradient,
            prune_input_gradient,
        )

    def input_gradient(self, grad: Tensor, generator: torch.Generator) -> Tensor:
        """dX ``[tokens, in]`` of dY ``[tokens, out]``."""
        if self.prune_input_gradient:
            return pack(mvue24(grad, generator)) @ self.transposed.T
        return F.linear(grad, self.transposed)

    def weight_gradient(self, grad: Tensor, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """dW ``[out, in]`` of dY ``[tokens, out]`` and X ``[tokens, in]``."""
        if not self.prune_weight_gradient:
            return grad.T @ inputs
        # Tokens are the summed dimension; zeros make it a multiple of what is pruned and packed.
        columns = padded(grad.T, _COLUMNS if grad.is_cuda else GROUP)
        pruned = mvue24(columns, generator)
        missing = columns.shape[1] - inputs.shape[0]
        return pack(pruned) @ (F.pad(inputs, (0, 0, 0, missing)) if missing else inputs)


class SparseProduct(torch.autograd.Function):
    """``X Ws^T`` whose gradient is handed to all of the latent weight (straight through)."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, latent: Tensor, products: SparseProducts, seed: int) -> Tensor:
        """Inputs ``[tokens, in]``; ``latent`` only receives the gradient."""
        ctx.save_for_backward(inputs)
        ctx.products, ctx.seed = products, seed
        return F.linear(inputs, products.weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Both gradients, with noise that depends on the seed alone."""
        (inputs,) = ctx.saved_tensors
        products: SparseProducts = ctx.products
        grad = grads[0].contiguous()
        generator = torch.Generator(grad.device).manual_seed(ctx.seed)
        inner = products.input_gradient(grad, generator) if ctx.needs_input_grad[0] else None
        outer = products.weight_gradient(grad, inputs, generator) if ctx.needs_input_grad[1] else None
        return inner, outer, None, None
