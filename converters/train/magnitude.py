"""Magnitude pruning to 2:4: of every 4 weights along the input dimension the 2 largest stay."""

from typing import Literal

import torch
from torch import Tensor

from converters.train.context import Context, Outcome, Sparse24Recipe
from vllm_sparse.sparse24 import topk_mask


class MagnitudeRecipe(Sparse24Recipe):
    """No data, no calibration."""

    method: Literal["magnitude"] = "magnitude"


def prune_magnitude(weight: Tensor) -> Tensor:
    """``[out, in]`` -> the same with exactly 2 of 4 kept."""
    return torch.where(topk_mask(weight.abs()), weight, 0)


@torch.no_grad()
def run(context: Context, recipe: MagnitudeRecipe) -> Outcome:
    """Prune every target."""
    for linear in context.targets(recipe.ignore).values():
        linear.weight.copy_(prune_magnitude(linear.weight))
    return Outcome("2:4", context.loaded.config)
