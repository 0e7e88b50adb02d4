"""Wanda (Sun et al., arXiv:2306.11695) at 2:4: score ``|W_ij| * ||X_j||_2``, no weight update."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from converters.train.calibration import InputNorm, linears_of, sweep_layers
from converters.train.context import CalibratedRecipe, Context, Outcome
from vllm_sparse.sparse24 import topk_mask


class WandaRecipe(CalibratedRecipe):
    """The paper uses 128 sequences of 2,048 tokens."""

    method: Literal["wanda"] = "wanda"


def prune_wanda(weight: Tensor, sum_squares: Tensor) -> Tensor:
    """Prune one linear.

    Args:
        weight: ``[out, in]``.
        sum_squares: ``||X_j||^2``, float32 ``[in]``.

    Returns:
        ``[out, in]``, of every 4 along the input the 2 with the highest score kept as they were.
    """
    scores = weight.float().abs() * sum_squares.sqrt()
    return torch.where(topk_mask(scores), weight, 0)


def run(context: Context, recipe: WandaRecipe) -> Outcome:
    """Prune layer by layer, each seeing the pruned layers before it."""
    targets = set(context.targets(recipe.ignore))

    def visit(index: int, layer: nn.Module, norms: Mapping[str, Any]) -> None:
        for name, linear in linears_of(layer).items():
            if f"model.layers.{index}.{name}" in targets:
                norm: InputNorm = norms[name]
                linear.weight.copy_(prune_wanda(linear.weight, norm.sum_squares))

    sequences = context.calibration_sequences(recipe.samples)
    sweep_layers(context.loaded.model, sequences, InputNorm, visit, title="wanda", quiet=context.quiet)
    return Outcome("2:4", context.loaded.config, {"calibration_tokens": sequences.numel()})
