"""Gradual magnitude pruning to 2:4 with distillation: the classic retraining baseline.

Groups of 4 are pruned to 2 in the order of what they lose (the sum of their two smallest |W|), on the cubic
schedule of Zhu & Gupta (arXiv:1710.01878): share pruned ``1 - (1 - t/T_end)^3``. Pruned weights stay zero,
kept ones train on; what a group keeps is decided once, from its weights at that moment.
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from converters.train import parallel
from converters.train.context import Context, Outcome, Sparse24Recipe
from converters.train.device import resolve_precision
from converters.train.distill import DistillationRecipe, StudentLoss, frozen_copy
from converters.train.optim import adamw, lr_at, set_lr
from converters.train.recipes import OptimiserRecipe
from vllm_sparse.sparse24 import topk_mask
from vllm_sparse.sparse24.mask import GROUP


class GradualRecipe(Sparse24Recipe):
    """Same budget and loss as AST by default, so that the two compare."""

    method: Literal["gradual"] = "gradual"
    optimiser: OptimiserRecipe = OptimiserRecipe(steps=1000, lr=1e-3, warmup=50, min_lr_ratio=0.1)
    distillation: DistillationRecipe = DistillationRecipe(kl_weight=0.67, temperature=2.0)
    prune_until: float = Field(default=0.5, gt=0, le=1, description="share of the steps that pruning takes")
    refresh: int = Field(default=10, ge=1, description="steps between prunings")


def pruned_share(step: int, recipe: GradualRecipe) -> float:
    """Share of groups that are 2:4 after ``step`` steps: cubic, 1 at the end of pruning."""
    end = max(1.0, recipe.prune_until * recipe.optimiser.steps)
    return 1.0 - (1.0 - min(1.0, step / end)) ** 3


def grow_pruned(weight: Tensor, mask: Tensor, share: float) -> Tensor:
    """Prune more groups.

    Args:
        weight: ``[out, in]``, zero where the mask is False.
        mask: bool keep-mask; a group is either whole or has 2 kept.
        share: of all groups that must be 2:4 afterwards.

    Returns:
        The new mask; groups pruned before stay as they were.
    """
    groups = mask.reshape(-1, GROUP)
    done = ~groups.all(-1)
    missing = round(share * len(groups)) - int(done.sum())
    if missing <= 0:
        return mask
    loss = weight.abs().reshape(-1, GROUP).sort(-1).values[:, :2].sum(-1)
    loss = loss.masked_fill(done, float("inf"))
    chosen = loss.topk(missing, largest=False).indices
    new = groups.clone()
    new[chosen] = topk_mask(weight.abs()).reshape(-1, GROUP)[chosen]
    return new.reshape(mask.shape)


class GradualObjective:
    """Train, and prune some more every few steps."""

    def __init__(self, loss: StudentLoss, linears: dict[str, nn.Linear], recipe: GradualRecipe) -> None:
        self.loss = loss
        self.linears = linears
        self.recipe = recipe
        self.masks = {name: torch.ones_like(lin.weight, dtype=torch.bool) for name, lin in linears.items()}
        self.optimiser = adamw(loss.student, recipe.optimiser)

    def step(self, index: int, batch: Tensor) -> dict[str, Tensor | float]:
        """AdamW, then masks."""
        settings = self.recipe.optimiser
        lr = lr_at(index, settings)
        set_lr(self.optimiser, lr)
        figures = self.loss.backward(batch)
        figures["grad_norm"] = parallel.clip_gradients(self.loss.student.parameters(), settings.clip_norm)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        share = pruned_share(index + 1, self.recipe)
        due = (index + 1) % self.recipe.refresh == 0 or index + 1 == settings.steps
        with torch.no_grad():
            for name, linear in self.linears.items():
                if due:
                    # Groups compete over the whole weight.
                    grown = grow_pruned(parallel.full(linear.weight), parallel.full(self.masks[name]), share)
                    self.masks[name] = parallel.like(grown, linear.weight)
                linear.weight.mul_(self.masks[name])
        return {**figures, "lr": lr, "pruned_share": share}

    def optimisers(self) -> list[torch.optim.Optimizer]:
        """For sharded checkpoints."""
        return [self.optimiser]

    def state_dict(self) -> dict[str, Any]:
        """Weights, moments, masks."""
        return {
            "student": self.loss.student.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "masks": self.masks,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo of :meth:`state_dict`."""
        self.loss.student.load_state_dict(state["student"])
        self.optimiser.load_state_dict(state["optimiser"])
        for name, mask in state["masks"].items():
            self.masks[name].copy_(mask)


def run(context: Context, recipe: GradualRecipe) -> Outcome:
    """Retrain the loaded model in place."""
    model = context.loaded.model
    precision = resolve_precision(recipe.run.precision, context.device)
    teacher = frozen_copy(model)
    model.train()
    parallel.shard(teacher)
    parallel.shard(model)
    loss = StudentLoss(model, teacher, recipe.distillation, recipe.optimiser, context.device, precision)
    objective = GradualObjective(loss, context.targets(recipe.ignore), recipe)
    figures = context.train(objective, recipe.optimiser, precision)
    context.collect(model, lambda: None)
    context.loaded.model.eval()
    return Outcome("2:4", context.loaded.config, figures)
