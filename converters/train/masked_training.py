"""What AST and CAST share: linears with a 2:4 mask that moves, their moments, and the run around them.

Both keep a float32 weight, recompute its magnitude mask every few steps and update it with an optimiser of
their own, whose first moment averages gradients alone; everything else is trained by an ordinary one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from converters.train import parallel
from converters.train.context import Context, Outcome, Sparse24Recipe
from converters.train.device import resolve_precision
from converters.train.distill import (
    DistillationRecipe,
    StudentLoss,
    emptied,
    frozen_copy,
    other_parameters,
    replace_module,
)
from converters.train.optim import set_lr
from converters.train.recipes import OptimiserRecipe
from vllm_sparse.sparse24 import topk_mask


@dataclass
class Moments:
    """State of one weight: averages of gradients and of squared updates."""

    first: Tensor
    second: Tensor

    def local(self) -> "Moments":
        """This process's rows."""
        return Moments(parallel.local(self.first), parallel.local(self.second))


class PatternLinear(nn.Module):
    """A linear's weight and bias, and the 2:4 mask of the weight's magnitudes."""

    mask: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.register_buffer("mask", topk_mask(linear.weight.detach().abs()))

    @torch.no_grad()
    def refresh(self) -> Tensor:
        """Recompute the mask; returns how many entries of this process changed."""
        mask, old = topk_mask(parallel.local(self.weight).abs()), parallel.local(self.mask)
        flips = (mask != old).sum()
        old.copy_(mask)
        return flips

    def sparse_linear(self, template: nn.Linear) -> nn.Linear:
        """The trained 2:4 layer, in ``template`` or around it."""
        raise NotImplementedError


class RetrainingRecipe(Sparse24Recipe):
    """Keys that both have."""

    optimiser: OptimiserRecipe = OptimiserRecipe(steps=1000, lr=1e-3, warmup=50, min_lr_ratio=0.1)
    distillation: DistillationRecipe = DistillationRecipe()
    refresh: int = Field(default=10, ge=1, description="steps between mask updates")


LayerT = TypeVar("LayerT", bound=PatternLinear)


class PatternObjective(Generic[LayerT]):
    """State of a run; a method adds :meth:`step`.

    Args:
        loss: with its student.
        layers: linears of the student by name.
        others: of every parameter that is not a layer's weight.
    """

    def __init__(self, loss: StudentLoss, layers: dict[str, LayerT], others: torch.optim.Optimizer) -> None:
        self.loss = loss
        self.layers = layers
        self.others = others
        self.moments = {
            name: Moments(torch.zeros_like(layer.weight), torch.zeros_like(layer.weight))
            for name, layer in layers.items()
        }
        self.parameters = [p for p in loss.student.parameters() if p.requires_grad]
        self.entries = sum(layer.mask.numel() for layer in layers.values())

    def step(self, index: int, batch: Tensor) -> dict[str, Tensor | float]:
        """One update."""
        raise NotImplementedError

    def refresh(self) -> Tensor:
        """New masks; returns how many entries of this process changed."""
        return torch.stack([layer.refresh() for layer in self.layers.values()]).sum()

    def update_others(self, lr: float) -> None:
        """Step the ordinary optimiser; gradients are gone afterwards."""
        set_lr(self.others, lr)
        self.others.step()
        self.loss.student.zero_grad(set_to_none=True)

    def report(self) -> dict[str, Any]:
        """Figures of the weights as training left them; none by default."""
        return {}

    def optimisers(self) -> list[torch.optim.Optimizer]:
        """For sharded checkpoints."""
        return [self.others]

    def state_dict(self) -> dict[str, Any]:
        """Weights and masks, both optimisers' moments."""
        return {
            "student": self.loss.student.state_dict(),
            "first": {name: m.first for name, m in self.moments.items()},
            "second": {name: m.second for name, m in self.moments.items()},
            "others": self.others.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo of :meth:`state_dict`."""
        self.loss.student.load_state_dict(state["student"])
        self.others.load_state_dict(state["others"])
        for name, moments in self.moments.items():
            moments.first.copy_(state["first"][name])
            moments.second.copy_(state["second"][name])


def parameters_beside(loss: StudentLoss, layers: dict[str, LayerT]) -> list[nn.Parameter]:
    """Trainable parameters of the student that are no layer's weight."""
    return other_parameters(loss.student, (layer.weight for layer in layers.values()))


def retrain(
    context: Context,
    recipe: RetrainingRecipe,
    wrap: Callable[[nn.Linear], LayerT],
    make: Callable[[StudentLoss, dict[str, LayerT]], PatternObjective[LayerT]],
) -> Outcome:
    """Train the loaded model against its dense self; its targets end 2:4.

    Args:
        context: the model and its data.
        recipe: of the method.
        wrap: a method's layer from a linear.
        make: its objective.
    """
    layers: dict[str, LayerT] = {}
    templates: dict[str, nn.Linear] = {}

    def rebuild() -> None:
        for name, linear in context.targets(recipe.ignore).items():
            layers[name] = wrap(linear)
            templates[name] = emptied(linear)
            replace_module(context.loaded.model, name, layers[name])

    precision = resolve_precision(recipe.run.precision, context.device)
    teacher = frozen_copy(context.loaded.model)
    rebuild()
    model = context.loaded.model.train()
    parallel.shard(teacher)
    parallel.shard(model)
    loss = StudentLoss(model, teacher, recipe.distillation, recipe.optimiser, context.device, precision)
    objective = make(loss, layers)
    figures = context.train(objective, recipe.optimiser, precision)
    figures |= objective.report()
    context.collect(model, rebuild)
    model = context.loaded.model.eval()
    for name, layer in layers.items():
        replace_module(model, name, layer.sparse_linear(templates[name]))
    return Outcome("2:4", context.loaded.config, figures)
