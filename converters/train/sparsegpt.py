"""SparseGPT (Frantar & Alistarh, arXiv:2301.00774) at 2:4.

With ``H = (2/N) sum x x^T + damping`` of a linear's inputs and ``U`` the upper Cholesky factor of ``H^-1``,
columns are swept left to right. ``U_jj^2`` is the j-th diagonal entry of the inverse of H restricted to the
columns from j on, so ``w^2 / U_jj^2`` is the error that removing w causes after the best update of the
columns behind it, and row j of ``U / U_jj`` is that update.
"""

import logging
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from converters.train.calibration import InputHessian, linears_of, sweep_layers
from converters.train.context import CalibratedRecipe, Context, Outcome
from vllm_sparse.errors import NumericsError
from vllm_sparse.sparse24 import topk_mask
from vllm_sparse.sparse24.mask import GROUP

logger = logging.getLogger(__name__)


class SparseGptRecipe(CalibratedRecipe):
    """The paper uses 128 sequences of 2,048 tokens, damping 0.01, blocks of 128."""

    method: Literal["sparsegpt"] = "sparsegpt"
    damping: float = Field(default=0.01, gt=0, description="times the mean diagonal of H")
    block_size: int = Field(default=128, gt=0, multiple_of=GROUP)


def prune_sparsegpt(weight: Tensor, hessian: Tensor, damping: float = 0.01, block_size: int = 128) -> Tensor:
    """Prune one linear and correct what is kept.

    Args:
        weight: ``[out, in]``.
        hessian: undamped, ``[in, in]``.
        damping: times the mean diagonal, added to the diagonal.
        block_size: columns whose errors are passed on at once; a multiple of 4.

    Returns:
        float32 ``[out, in]``, at most 2 non-zeros of every 4.

    Raises:
        NumericsError: H is not positive definite even so; raise the damping or the sample count.
    """
    weight = weight.float().clone()
    hessian = hessian.double().clone()
    diagonal = hessian.diagonal()
    # A feature that never fired says nothing about its weights; they go.
    dead = diagonal == 0
    diagonal[dead] = 1.0
    weight[:, dead] = 0.0
    diagonal += damping * diagonal.mean()
    upper = _inverse_factor(hessian).to(weight.dtype)
    columns = weight.shape[1]
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        block, errors = _prune_block(weight[:, start:end], upper[start:end, start:end])
        weight[:, start:end] = block
        weight[:, end:] -= errors @ upper[start:end, end:]
    return weight


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper U with ``U^T U = H^-1``, in float64."""
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if int(failed):
        raise NumericsError(
            "the calibration Hessian is not positive definite; raise damping or give more samples"
        )
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)


def _prune_block(block: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Sweep one block; returns it pruned, and the scaled errors of its columns."""
    block = block.clone()
    errors = torch.zeros_like(block)
    kept = torch.zeros_like(block, dtype=torch.bool)
    diagonal = upper.diagonal()
    for j in range(block.shape[1]):
        if j % GROUP == 0:
            group = slice(j, j + GROUP)
            kept[:, group] = topk_mask(block[:, group].square() / diagonal[group].square())
        column = block[:, j].clone()
        value = torch.where(kept[:, j], column, 0)
        errors[:, j] = (column - value) / diagonal[j]
        block[:, j:] -= torch.outer(errors[:, j], upper[j, j:])
        block[:, j] = value
    return block, errors


def run(context: Context, recipe: SparseGptRecipe) -> Outcome:
    """Prune layer by layer, each seeing the pruned layers before it."""
    targets = set(context.targets(recipe.ignore))
    errors: dict[str, float] = {}

    def visit(index: int, layer: nn.Module, statistics: Mapping[str, Any]) -> None:
        for name, linear in linears_of(layer).items():
            full = f"model.layers.{index}.{name}"
            if full in targets:
                hessian = statistics[name].hessian
                pruned = prune_sparsegpt(linear.weight, hessian, recipe.damping, recipe.block_size)
                errors[full] = _relative_error(linear.weight, pruned, hessian)
                linear.weight.copy_(pruned)

    sequences = context.calibration_sequences(recipe.samples)
    sweep_layers(context.loaded.model, sequences, InputHessian, visit, title="sparsegpt", quiet=context.quiet)
    figures = {"calibration_tokens": sequences.numel(), "relative_output_error": errors}
    return Outcome("2:4", context.loaded.config, figures)


def _relative_error(dense: Tensor, pruned: Tensor, hessian: Tensor) -> float:
    """``||(W - W') X||^2 / ||W X||^2`` over the calibration tokens."""
    difference = (dense - pruned).float()
    lost = torch.einsum("oi,ij,oj->", difference, hessian, difference)
    whole = torch.einsum("oi,ij,oj->", dense.float(), hessian, dense.float())
    return float(lost / whole) if float(whole) else 0.0
