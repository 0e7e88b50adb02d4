"""AST, Adaptive Sparse Trainer (arXiv:2407.20584): retraining at 2:4 with a mask that keeps moving.

Notation of the paper: W is the dense latent weight, m the keep-mask, W~ = m * W what the forward pass uses.

- Straight-through: ``dL/dW~`` is handed to all of W.
- Annealed decay (ARS-STE): ``lambda(t)`` rises linearly to its final value over the ramp, then stays. Early
  on masks explore, later pruned weights shrink and the mask settles.
- The decay enters AdamW after the first moment, which stays an average of loss gradients alone.
- The mask is the magnitude top 2 of 4 of the latent W, recomputed every ``refresh`` steps.
- Distillation from the dense model by forward KL.
- SLoRB, optional: see :mod:`converters.train.slorb`.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

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
from converters.train.optim import decay_groups, lr_at, set_lr
from converters.train.recipes import OptimiserRecipe
from converters.train.slorb import BranchLinear, SlorbRecipe, make_branch
from vllm_sparse.sparse24 import topk_mask


class AstRecipe(Sparse24Recipe):
    """Defaults suit a small model; the paper's GPT-2 runs: lr 2e-4, lambda 1e-4, 40,000 steps."""

    method: Literal["ast"] = "ast"
    optimiser: OptimiserRecipe = OptimiserRecipe(steps=1000, lr=1e-3, warmup=50, min_lr_ratio=0.1)
    distillation: DistillationRecipe = DistillationRecipe(kl_weight=0.67, temperature=2.0)
    masked_decay: float = Field(default=1e-2, ge=0, description="final lambda")
    ramp: float = Field(default=0.25, ge=0, le=1, description="share of the steps over which lambda rises")
    refresh: int = Field(default=10, ge=1, description="steps between mask updates")
    slorb: SlorbRecipe | None = Field(default=None, description="add the low-rank branch")


def masked_decay_at(step: int, recipe: AstRecipe) -> float:
    """``lambda(t)``: linear up to the end of the ramp, then constant."""
    length = recipe.ramp * recipe.optimiser.steps
    return recipe.masked_decay * (1.0 if length == 0 else min(1.0, step / length))


@dataclass
class Moments:
    """AdamW's state of one weight: averages of gradients and of squared updates."""

    first: Tensor
    second: Tensor

    def local(self) -> "Moments":
        """The part of this process."""
        return Moments(parallel.local(self.first), parallel.local(self.second))


def ast_update(
    weight: Tensor,
    grad: Tensor,
    mask: Tensor,
    moments: Moments,
    step: int,
    lr: float,
    masked_decay: float,
    recipe: OptimiserRecipe,
) -> None:
    """One AdamW step whose first moment is clean of the masked decay; changes weight and moments.

    Args:
        weight: latent W, float32.
        grad: ``dL/dW~``.
        mask: bool, True where kept.
        moments: running averages.
        step: counts from 1, for the bias correction.
        lr: of this step.
        masked_decay: ``lambda(t)``.
        recipe: betas, eps and decoupled weight decay.
    """
    beta1, beta2 = recipe.betas
    moments.first.lerp_(grad, 1.0 - beta1)
    update = moments.first + masked_decay * torch.where(mask, 0.0, weight)
    moments.second.mul_(beta2).addcmul_(update, update, value=1.0 - beta2)
    weight.mul_(1.0 - lr * recipe.weight_decay)
    scale = (moments.second / (1.0 - beta2**step)).sqrt_().add_(recipe.eps)
    weight.addcdiv_(update, scale, value=-lr / (1.0 - beta1**step))


class _StraightThrough(torch.autograd.Function):
    """``m * W`` whose gradient is passed to all of W."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, weight, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class MaskedLinear(nn.Module):
    """A linear that multiplies with ``m * W``; it holds the dense latent W, the mask and maybe a branch."""

    mask: Tensor

    def __init__(self, linear: nn.Linear, slorb: SlorbRecipe | None = None) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.register_buffer("mask", topk_mask(linear.weight.detach().abs()))
        self.branch = make_branch(linear.weight, self.mask, slorb) if slorb else None

    def forward(self, inputs: Tensor) -> Tensor:
        """``inputs @ (m * W)^T + bias``, and the branch's share."""
        # Where FSDP has gathered the weight, the mask is gathered too.
        output = F.linear(inputs, _StraightThrough.apply(self.weight, parallel.full(self.mask)), self.bias)
        return output if self.branch is None else output + self.branch(inputs)

    @torch.no_grad()
    def refresh(self) -> Tensor:
        """Recompute the mask; returns how many entries of this process changed."""
        mask, old = topk_mask(parallel.local(self.weight).abs()), parallel.local(self.mask)
        flips = (mask != old).sum()
        old.copy_(mask)
        return flips

    @torch.no_grad()
    def sparse_linear(self, template: nn.Linear) -> nn.Linear:
        """``template`` with the weight that the forward pass uses."""
        template.weight = nn.Parameter(torch.where(self.mask, self.weight, 0.0))
        return template if self.branch is None else BranchLinear.of(template, self.branch)


class AstObjective:
    """One AST step: the :class:`~converters.train.loop.Objective` of the method."""

    def __init__(self, loss: StudentLoss, layers: dict[str, MaskedLinear], recipe: AstRecipe) -> None:
        self.loss = loss
        self.layers = layers
        self.recipe = recipe
        self.initial = {name: layer.mask.clone() for name, layer in layers.items()}
        self.moments = {
            name: Moments(torch.zeros_like(layer.weight), torch.zeros_like(layer.weight))
            for name, layer in layers.items()
        }
        self.parameters = [p for p in loss.student.parameters() if p.requires_grad]
        others = other_parameters(loss.student, (layer.weight for layer in layers.values()))
        settings = recipe.optimiser
        self.others = torch.optim.AdamW(
            decay_groups(others, settings.weight_decay),
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
        )
        self.entries = sum(layer.mask.numel() for layer in layers.values())

    def step(self, index: int, batch: Tensor) -> dict[str, Tensor | float]:
        """Gradients, the AST update, and every ``refresh`` steps new masks."""
        settings = self.recipe.optimiser
        lr, decay = lr_at(index, settings), masked_decay_at(index, self.recipe)
        figures = self.loss.backward(batch)
        figures["grad_norm"] = parallel.clip_gradients(self.parameters, settings.clip_norm)
        self._update(index, lr, decay)
        figures |= {"lr": lr, "masked_decay": decay}
        if (index + 1) % self.recipe.refresh == 0:
            figures |= self._refresh()
        return figures

    @torch.no_grad()
    def _update(self, index: int, lr: float, decay: float) -> None:
        for name, layer in self.layers.items():
            if layer.weight.grad is not None:
                ast_update(
                    parallel.local(layer.weight),
                    parallel.local(layer.weight.grad),
                    parallel.local(layer.mask),
                    self.moments[name].local(),
                    index + 1,
                    lr,
                    decay,
                    self.recipe.optimiser,
                )
        set_lr(self.others, lr)
        self.others.step()
        self.loss.student.zero_grad(set_to_none=True)

    def _refresh(self) -> dict[str, Tensor | float]:
        flips = torch.stack([layer.refresh() for layer in self.layers.values()]).sum()
        moved = torch.stack(
            [
                (parallel.local(layer.mask) != parallel.local(self.initial[name])).sum()
                for name, layer in self.layers.items()
            ]
        ).sum()
        flips, moved = parallel.summed(torch.stack([flips, moved]))
        return {"flip_rate": flips / self.entries, "flipped_since_start": moved / self.entries}

    def optimisers(self) -> list[torch.optim.Optimizer]:
        """For sharded checkpoints."""
        return [self.others]

    def state_dict(self) -> dict[str, Any]:
        """Weights and masks, both optimisers' moments, the first masks."""
        return {
            "student": self.loss.student.state_dict(),
            "first": {name: m.first for name, m in self.moments.items()},
            "second": {name: m.second for name, m in self.moments.items()},
            "others": self.others.state_dict(),
            "initial": self.initial,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo of :meth:`state_dict`."""
        self.loss.student.load_state_dict(state["student"])
        self.others.load_state_dict(state["others"])
        for name, moments in self.moments.items():
            moments.first.copy_(state["first"][name])
            moments.second.copy_(state["second"][name])
            self.initial[name].copy_(state["initial"][name])


def run(context: Context, recipe: AstRecipe) -> Outcome:
    """Retrain the loaded model; its targets end as ``m * W``."""
    layers: dict[str, MaskedLinear] = {}
    templates: dict[str, nn.Linear] = {}

    def rebuild() -> None:
        for name, linear in context.targets(recipe.ignore).items():
            layers[name] = MaskedLinear(linear, recipe.slorb)
            templates[name] = emptied(linear)
            replace_module(context.loaded.model, name, layers[name])

    precision = resolve_precision(recipe.run.precision, context.device)
    teacher = frozen_copy(context.loaded.model)
    rebuild()
    model = context.loaded.model.train()
    parallel.shard(teacher)
    parallel.shard(model)
    loss = StudentLoss(model, teacher, recipe.distillation, recipe.optimiser, context.device, precision)
    done = context.train(AstObjective(loss, layers, recipe), recipe.optimiser, precision)
    context.collect(model, rebuild)
    model = context.loaded.model.eval()
    for name, layer in layers.items():
        replace_module(model, name, layer.sparse_linear(templates[name]))
    return Outcome("2:4", context.loaded.config, done)
