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

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from converters.train import parallel
from converters.train.context import Context, Outcome
from converters.train.distill import DistillationRecipe, StudentLoss
from converters.train.masked_training import (
    Moments,
    PatternLinear,
    PatternObjective,
    RetrainingRecipe,
    parameters_beside,
    retrain,
)
from converters.train.optim import decay_groups, lr_at
from converters.train.recipes import OptimiserRecipe
from converters.train.slorb import BranchLinear, SlorbRecipe, make_branch


class AstRecipe(RetrainingRecipe):
    """Defaults suit a small model; the paper's GPT-2 runs: lr 2e-4, lambda 1e-4, 40,000 steps."""

    method: Literal["ast"] = "ast"
    distillation: DistillationRecipe = DistillationRecipe(kl_weight=0.67, temperature=2.0)
    masked_decay: float = Field(default=1e-2, ge=0, description="final lambda")
    ramp: float = Field(default=0.25, ge=0, le=1, description="share of the steps over which lambda rises")
    slorb: SlorbRecipe | None = Field(default=None, description="add the low-rank branch")


def masked_decay_at(step: int, recipe: AstRecipe) -> float:
    """``lambda(t)``: linear up to the end of the ramp, then constant."""
    length = recipe.ramp * recipe.optimiser.steps
    return recipe.masked_decay * (1.0 if length == 0 else min(1.0, step / length))


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


class MaskedLinear(PatternLinear):
    """A linear that multiplies with ``m * W``; it holds the dense latent W, the mask and maybe a branch."""

    def __init__(
        self,
        linear: nn.Linear,
        slorb: SlorbRecipe | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(linear)
        self.branch = make_branch(linear.weight, self.mask, slorb, generator) if slorb else None

    def forward(self, inputs: Tensor) -> Tensor:
        """``inputs @ (m * W)^T + bias``, and the branch's share."""
        # Where FSDP has gathered the weight, the mask is gathered too.
        output = F.linear(inputs, _StraightThrough.apply(self.weight, parallel.full(self.mask)), self.bias)
        return output if self.branch is None else output + self.branch(inputs)

    @torch.no_grad()
    def sparse_linear(self, template: nn.Linear) -> nn.Linear:
        """``template`` with the weight that the forward pass uses."""
        template.weight = nn.Parameter(torch.where(self.mask, self.weight, 0.0))
        return template if self.branch is None else BranchLinear.of(template, self.branch)


class AstObjective(PatternObjective[MaskedLinear]):
    """One AST step: the :class:`~converters.train.loop.Objective` of the method."""

    def __init__(self, loss: StudentLoss, layers: dict[str, MaskedLinear], recipe: AstRecipe) -> None:
        settings = recipe.optimiser
        others = torch.optim.AdamW(
            decay_groups(parameters_beside(loss, layers), settings.weight_decay),
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
        )
        super().__init__(loss, layers, others)
        self.recipe = recipe
        self.initial = {name: layer.mask.clone() for name, layer in layers.items()}

    def step(self, index: int, batch: Tensor) -> dict[str, Tensor | float]:
        """Gradients, the AST update, and every ``refresh`` steps new masks."""
        settings = self.recipe.optimiser
        lr, decay = lr_at(index, settings), masked_decay_at(index, self.recipe)
        figures = self.loss.backward(batch)
        figures["grad_norm"] = parallel.clip_gradients(self.parameters, settings.clip_norm)
        self._update(index, lr, decay)
        figures |= {"lr": lr, "masked_decay": decay}
        if (index + 1) % self.recipe.refresh == 0:
            figures |= self._flips()
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
        self.update_others(lr)

    def _flips(self) -> dict[str, Tensor | float]:
        flips = self.refresh()
        moved = torch.stack(
            [
                (parallel.local(layer.mask) != parallel.local(self.initial[name])).sum()
                for name, layer in self.layers.items()
            ]
        ).sum()
        flips, moved = parallel.summed(torch.stack([flips, moved]))
        return {"flip_rate": flips / self.entries, "flipped_since_start": moved / self.entries}

    def state_dict(self) -> dict[str, Any]:
        """Weights and masks, both optimisers' moments, the first masks."""
        return super().state_dict() | {"initial": self.initial}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo of :meth:`state_dict`."""
        super().load_state_dict(state)
        for name, mask in self.initial.items():
            mask.copy_(state["initial"][name])


def run(context: Context, recipe: AstRecipe) -> Outcome:
    """Retrain the loaded model; its targets end as ``m * W``."""
    generator = torch.Generator().manual_seed(recipe.run.seed)
    return retrain(
        context,
        recipe,
        lambda linear: MaskedLinear(linear, recipe.slorb, generator),
        lambda loss, layers: AstObjective(loss, layers, recipe),
    )
