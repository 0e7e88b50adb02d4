"""Fine-tuning that keeps what pruning made: exact zeros stay zero, shapes stay as they are.

On a dense model it is the control arm of a comparison (the same tokens without any pruning), on a one-shot
2:4 model it is retraining under a fixed mask, on a structured model it is recovery training.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from converters.train import parallel
from converters.train.calibration import decoder_layers, linears_of
from converters.train.context import CompressionRecipe, Context, Kind, Outcome
from converters.train.device import resolve_precision
from converters.train.recipes import OptimiserRecipe
from converters.train.trainer import LanguageModelling
from vllm_sparse.sparse24 import is_24


class FinetuneRecipe(CompressionRecipe):
    """Plain next-token training of a model as it is."""

    method: Literal["finetune"] = "finetune"
    optimiser: OptimiserRecipe = OptimiserRecipe(steps=1000, lr=1e-3, warmup=50, min_lr_ratio=0.1)


class MaskedLanguageModelling(LanguageModelling):
    """Next-token training that puts zeros back after every step."""

    def __init__(
        self,
        model: nn.Module,
        linears: list[nn.Linear],
        recipe: OptimiserRecipe,
        device: torch.device,
        precision: Any,
    ) -> None:
        super().__init__(model, recipe, device, precision)
        # Only linears with a pattern pay for it.
        self.masks = [
            (lin, lin.weight != 0) for lin in linears if bool((parallel.full(lin.weight) == 0).any())
        ]

    def step(self, index: int, batch: Tensor) -> dict[str, Tensor | float]:
        """One update under the fixed pattern."""
        figures = super().step(index, batch)
        with torch.no_grad():
            for linear, mask in self.masks:
                linear.weight.mul_(mask)
        return figures


def run(context: Context, recipe: FinetuneRecipe) -> Outcome:
    """Train the loaded model in place."""
    model, config = context.loaded.model, context.loaded.config
    precision = resolve_precision(recipe.run.precision, context.device)
    linears = [linear for layer in decoder_layers(model) for linear in linears_of(layer).values()]
    kind: Kind = "structured" if config.get("per_layer_config") else "dense"
    if all(is_24(linear.weight.detach()) for linear in linears):
        kind = "2:4"
    parallel.shard(model)
    objective = MaskedLanguageModelling(model, linears, recipe.optimiser, context.device, precision)
    figures = context.train(objective, recipe.optimiser, precision)
    context.collect(model, lambda: None)
    context.loaded.model.eval()
    return Outcome(kind, config, figures)
