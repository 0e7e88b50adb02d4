"""CAST, Continuous Adaptive Sparse Trainer (arXiv:2509.25996): dense forward, an optimiser that sparsifies.

The forward pass is dense for the whole run. The 2:4 mask only tells the optimiser, AdamS, which weights to
drive to zero, with a pull that takes over from the gradient as ``alpha = t/T`` goes from 0 to 1. At the end
the masked weights are so small that the hard prune costs next to nothing. A scale per row and block of
columns, trained alongside, restores the magnitude that decay takes; it is merged into the weights.

Masters are float32: a pull of this size vanishes in bf16.
"""

import logging
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
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
from converters.train.optim import lr_at
from converters.train.recipes import OptimiserRecipe
from vllm_sparse.errors import FormatError

logger = logging.getLogger(__name__)

# Budgets of at least 5 times the largest masked weight always reached zero in simulation; below 1 never.
SAFE_BUDGET = 5.0


class CastRecipe(RetrainingRecipe):
    """The paper's run: lr 2e-5, pull 4e-7, 7,500 steps of 1M tokens, 2 scale blocks, KL weight 1/3."""

    method: Literal["cast"] = "cast"
    optimiser: OptimiserRecipe = OptimiserRecipe(
        steps=1000, lr=1e-3, warmup=50, min_lr_ratio=0.05, weight_decay=0.0
    )
    distillation: DistillationRecipe = DistillationRecipe(kl_weight=1 / 3, temperature=1.0)
    pull: float | None = Field(
        default=None, gt=0, description="lambda; without one, the mean |gradient| of the first batch"
    )
    scale_blocks: int = Field(default=2, ge=0, description="column blocks with a scale per row; 0 for none")

    @model_validator(mode="after")
    def _has_no_weight_decay(self) -> "CastRecipe":
        if self.optimiser.weight_decay:
            raise ValueError(
                f"optimiser.weight_decay is {self.optimiser.weight_decay}; cast decays masked weights by its "
                "pull and no others: leave it at 0"
            )
        return self


def adams_update(
    weight: Tensor,
    grad: Tensor,
    mask: Tensor,
    moments: Moments,
    step: int,
    total: int,
    lr: float,
    pull: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One AdamS step (Algorithm 1, Eq. 7-8); changes weight and moments.

    Args:
        weight: W, float32.
        grad: loss gradient.
        mask: bool, True where kept.
        moments: ``first`` averages gradients alone; ``second`` averages squares of what is applied.
        step: t, from 0.
        total: T; ``alpha = t/T``.
        lr: of this step.
        pull: lambda, times ``sign(W)``.
        betas: decay rates of the averages.
        eps: added to the root of the second moment.
    """
    alpha = step / total
    moments.first.lerp_(grad, 1.0 - betas[0])
    pulled = (1.0 - alpha) * moments.first + (alpha * pull) * weight.sign()
    update = torch.where(mask, moments.first, pulled)
    moments.second.mul_(betas[1]).addcmul_(update, update, value=1.0 - betas[1])
    scale = (moments.second / (1.0 - betas[1] ** (step + 1))).sqrt_().add_(eps)
    weight.addcdiv_(update, scale, value=-lr / (1.0 - betas[0] ** (step + 1)))


class ScaledLinear(PatternLinear):
    """A dense linear with a trained scale per row and column block (Eq. 11-12), and its 2:4 mask."""

    def __init__(self, linear: nn.Linear, scale_blocks: int) -> None:
        rows, columns = linear.weight.shape
        if scale_blocks and columns % scale_blocks:
            raise FormatError(
                f"scale_blocks {scale_blocks} does not divide a linear's {columns} input features"
            )
        super().__init__(linear)
        self.scale = nn.Parameter(torch.ones(rows, scale_blocks, device=linear.weight.device))

    def scaled(self, weight: Tensor) -> Tensor:
        """``weight * A``, A constant over each row's blocks of columns."""
        blocks = self.scale.shape[1]
        if blocks == 0:
            return weight
        rows, columns = weight.shape
        return (weight.reshape(rows, blocks, columns // blocks) * self.scale.unsqueeze(-1)).reshape(
            rows, columns
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Dense product with the scaled weight."""
        return F.linear(inputs, self.scaled(self.weight), self.bias)

    @torch.no_grad()
    def sparse_linear(self, template: nn.Linear) -> nn.Linear:
        """Prune with the final mask, then merge the scale; into ``template``."""
        template.weight = nn.Parameter(self.scaled(torch.where(self.mask, self.weight, 0.0)))
        return template


class CastObjective(PatternObjective[ScaledLinear]):
    """One CAST step: the :class:`~converters.train.loop.Objective` of the method."""

    def __init__(self, loss: StudentLoss, layers: dict[str, ScaledLinear], recipe: CastRecipe) -> None:
        settings = recipe.optimiser
        others = torch.optim.Adam(
            parameters_beside(loss, layers), lr=settings.lr, betas=settings.betas, eps=settings.eps
        )
        super().__init__(loss, layers, others)
        self.recipe = recipe
        self.pull = recipe.pull
        warning = check_budget(settings, float(self.masked_sizes()[1]))
        if warning:
            logger.warning("cast: %s", warning)

    def step(self, index: int, batch: Tensor) -> dict[str, Tensor | float]:
        """New masks when due, gradients of the dense model, AdamS."""
        settings = self.recipe.optimiser
        lr = lr_at(index, settings)
        figures: dict[str, Tensor | float] = {"lr": lr, "alpha": index / settings.steps}
        if index % self.recipe.refresh == 0:
            figures["flip_rate"] = parallel.summed(self.refresh()) / self.entries
        figures |= self.loss.backward(batch)
        figures["grad_norm"] = parallel.clip_gradients(self.parameters, settings.clip_norm)
        self._update(index, lr)
        if (index + 1) % self.recipe.refresh == 0:
            figures["masked_mean"] = self.masked_sizes()[0]
        return figures

    @torch.no_grad()
    def _update(self, index: int, lr: float) -> None:
        settings = self.recipe.optimiser
        grads = {
            name: parallel.local(layer.weight.grad)
            for name, layer in self.layers.items()
            if layer.weight.grad is not None
        }
        if self.pull is None:
            # In float64, so that it does not depend on how weights are cut.
            sums = torch.stack([g.abs().sum(dtype=torch.float64) for g in grads.values()])
            self.pull = float(parallel.summed(sums.sum()) / self.entries)
            logger.info("cast: pull set to the mean |gradient| %.3g", self.pull)
        for name, layer in self.layers.items():
            if name in grads:
                adams_update(
                    parallel.local(layer.weight), grads[name], parallel.local(layer.mask),
                    self.moments[name].local(), index, settings.steps, lr, self.pull, settings.betas,
                    settings.eps,
                )  # fmt: skip
        self.update_others(lr)

    @torch.no_grad()
    def masked_sizes(self) -> tuple[Tensor, Tensor]:
        """Mean and largest |W| over masked weights."""
        pairs = [(parallel.local(la.weight), parallel.local(la.mask)) for la in self.layers.values()]
        sizes = [torch.where(mask, 0.0, weight.abs()) for weight, mask in pairs]
        total = torch.stack([s.sum(dtype=torch.float64) for s in sizes]).sum()
        masked = torch.stack([(~mask).sum() for _, mask in pairs]).sum()
        total, masked = parallel.summed(torch.stack([total, masked]))
        return total / masked, parallel.largest(torch.stack([s.max() for s in sizes]).max())

    def report(self) -> dict[str, Any]:
        """How nearly free the final prune is."""
        mean, largest = self.masked_sizes()
        return {
            "pull": self.pull,
            "decay_budget": decay_budget(self.recipe.optimiser),
            "masked_mean_before_prune": float(mean),
            "masked_max_before_prune": float(largest),
        }

    def state_dict(self) -> dict[str, Any]:
        """Weights, masks and scales, both optimisers' moments, the pull."""
        return super().state_dict() | {"pull": self.pull}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo of :meth:`state_dict`."""
        super().load_state_dict(state)
        self.pull = state["pull"]


def decay_budget(recipe: OptimiserRecipe) -> float:
    """How far the pull alone can move a weight: ``sum_t lr_t * alpha_t``, whatever lambda is."""
    return sum(lr_at(t, recipe) * t / recipe.steps for t in range(recipe.steps))


def check_budget(recipe: OptimiserRecipe, largest: float) -> str | None:
    """A warning when masked weights as large as ``largest`` may not reach zero."""
    budget = decay_budget(recipe)
    if budget >= SAFE_BUDGET * largest:
        return None
    verdict = "cannot" if budget < largest else "may not"
    return (
        f"decay budget sum(lr * alpha) = {budget:.3g} against a largest masked weight of {largest:.3g}: it "
        f"{verdict} be driven to zero. Raise lr or steps until the budget is {SAFE_BUDGET:.0f} times that."
    )


def run(context: Context, recipe: CastRecipe) -> Outcome:
    """Train the loaded model and prune it; its targets end as ``m * W * A``."""
    return retrain(
        context,
        recipe,
        lambda linear: ScaledLinear(linear, recipe.scale_blocks),
        lambda loss, layers: CastObjective(loss, layers, recipe),
    )
