"""DDP, Deterministic Differentiable Pruning (arXiv:2603.08065): structured, mask-only, weights frozen.

One parameter z per unit gives two things:

- the gate that multiplies the unit, ``m = ReLU(z)``, which may also grow above 1;
- the retention score, used in the sparsity and binarisation losses alone,
  ``s = clamp(1.2 * sigmoid((ReLU(z) - mu) * C0 / mu) - 0.1, 0, 1)``: a soft l0 whose width mu shrinks.

ReLU and clamp pass gradients through unchanged, so a pruned gate can come back. With rho the share to keep
and s_bar the mean score,

    L = CE + eta * KL(teacher || student)
        + lambda1 * (s_bar - rho) + lambda2 * (s_bar - rho)^2      for heads and channels separately
        + lambda3 * mean(s * (1 - s))

and the multipliers, all starting at 0, climb by gradient ascent in the same optimiser. The teacher is the
same model with its gates off.
"""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from converters.train.context import Context, Outcome
from converters.train.gate_training import (
    AMBIGUOUS,
    GateBudget,
    GateObjective,
    GateRecipe,
    prune_dense,
)
from converters.train.gates import Units
from converters.train.moe import MOE_FAMILIES

# The stretch interval of the scores, and C0 = ln(-r/l) rounded as the paper has it.
LOW, HIGH, C0 = -0.1, 1.1, 2.4
LOWEST_Z = -0.1


class DdpRecipe(GateRecipe):
    """The paper's run: 1,000 steps of 32,768 tokens, 2,048-token sequences.

    Two defaults differ from the paper's code, which has ``min_lr_ratio: 0`` and ``multiplier_betas: (0.9,
    0.999)``. Over a run of some hundred steps a second moment with 0.999 remembers the gap of the first
    steps, so that multipliers stop climbing long before the budget holds; and a rate that goes to 0 freezes
    z while mu still shrinks, which leaves gates just above zero.
    """

    method: Literal["ddp"] = "ddp"
    experts: Literal["equal", "ragged"] = Field(
        default="equal", description="of mixtures: one width a layer, or each expert's own filled with zeros"
    )
    gates: Literal["extended", "clamped"] = Field(
        default="extended", description="range of gates: [0, inf), or [0, 1] for the paper's ablation"
    )
    binarise: bool = True
    mu_start: float = Field(default=0.5, gt=0)
    mu_end: float = Field(default=0.1, gt=0, description="0.05 in the paper, 0.1 in its code")


def straight_relu(z: Tensor) -> Tensor:
    """``ReLU(z)`` whose gradient is 1 everywhere."""
    return z + (z.relu() - z).detach()


def straight_clamp(z: Tensor) -> Tensor:
    """``clamp(z, 0, 1)`` whose gradient is 1 everywhere."""
    return z + (z.clamp(0.0, 1.0) - z).detach()


def retention(z: Tensor, mu: float) -> Tensor:
    """Score s in [0, 1]: 0 at z <= 0, 1/2 at mu, 1 from 2 mu on; gradients pass the clamp."""
    v = torch.sigmoid((straight_relu(z) - mu) * (C0 / mu))
    stretched = v * (HIGH - LOW) + LOW
    return stretched + (stretched.clamp(0.0, 1.0) - stretched).detach()


def mu_at(step: int, recipe: DdpRecipe) -> float:
    """``mu_0 - (mu_0 - mu_T) * sqrt(t/T)``."""
    progress = math.sqrt(step / recipe.optimiser.steps)
    return recipe.mu_start - (recipe.mu_start - recipe.mu_end) * progress


class Budget(GateBudget):
    """Gates of one kind, their multipliers, and their share of the loss.

    Args:
        units: of the kind.
        keep: rho, the share to keep.
        per_layer: average the Lagrangian over layers, each with its own mean, in place of one mean.
        device: of z.
        seed: of ``z ~ N(1, 0.01)``.
        clamped: gates stay within [0, 1].
    """

    def __init__(
        self,
        units: Units,
        keep: float,
        per_layer: bool,
        device: torch.device,
        seed: int,
        clamped: bool = False,
    ) -> None:
        start = 1.0 + 0.01 * torch.randn(units.total, generator=torch.Generator().manual_seed(seed))
        super().__init__(units, keep, per_layer, start.to(device))
        self.clamped = clamped
        # A clamped gate's z would otherwise drift far above 1, where the task no longer sees it.
        self.z_range = (LOWEST_Z, 1.0 if clamped else None)
        self.binary = nn.Parameter(torch.zeros((), device=device))

    def multipliers(self) -> list[nn.Parameter]:
        """lambda1 and lambda3."""
        return [self.linear, self.binary]

    def gate(self) -> Tensor:
        """Multipliers m, ``[total]``."""
        return straight_clamp(self.z) if self.clamped else straight_relu(self.z)

    def final_gate(self) -> Tensor:
        """The same: nothing here is random."""
        return self.gate()

    def loss(self, mu: float, binarise: bool) -> Tensor:
        """Augmented Lagrangian and binarisation."""
        scores = retention(self.z, mu)
        loss = self.lagrangian(scores, self.keep)
        if binarise:
            loss = loss + self.binary * (scores * (1.0 - scores)).mean()
        return loss

    @torch.no_grad()
    def figures(self, mu: float) -> dict[str, Tensor]:
        """Soft and hard sparsity and the share of undecided gates."""
        scores = retention(self.z, mu)
        undecided = (scores > AMBIGUOUS[0]) & (scores < AMBIGUOUS[1])
        return {
            "soft_sparsity": 1.0 - scores.mean(),
            "hard_sparsity": (self.z <= 0).float().mean(),
            "ambiguous": undecided.float().mean(),
        }


class DdpObjective(GateObjective[Budget, DdpRecipe]):
    """One DDP step: the :class:`~converters.train.loop.Objective` of the method."""

    def penalty(self, budget: Budget, index: int) -> Tensor:
        """Lagrangian and binarisation at this step's mu."""
        return budget.loss(mu_at(index, self.recipe), self.recipe.binarise)

    def describe(self, index: int) -> dict[str, Tensor | float]:
        """mu; of each kind sparsities, undecided gates and the three multipliers."""
        mu = mu_at(index, self.recipe)
        figures: dict[str, Tensor | float] = {"mu": mu}
        for kind, b in self.budgets.items():
            values = b.figures(mu)
            values |= {"lambda1": b.linear, "lambda2": b.quadratic, "lambda3": b.binary}
            # Multipliers change in place: what is logged is a copy.
            figures |= {f"{kind}.{name}": value.detach().clone() for name, value in values.items()}
        return figures


def run(context: Context, recipe: DdpRecipe) -> Outcome:
    """Train gates on the frozen model, fold them, slice it."""
    if context.loaded.config.get("model_type") in MOE_FAMILIES:
        from converters.train import ddp_experts  # that module builds on this one

        return ddp_experts.run(context, recipe)

    def make(_: int, units: Units, keep: float) -> Budget:
        return Budget(
            units,
            keep,
            recipe.budget != "global",
            context.device,
            recipe.run.seed,
            recipe.gates == "clamped",
        )

    return prune_dense(context, recipe, DdpObjective, make)
