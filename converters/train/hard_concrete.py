"""Hard-concrete gates (Louizos et al., arXiv:1712.01312), as CoFi and Sheared-LLaMA prune with them.

The stochastic relaxation of l0 that DDP is compared with, under DDP's own budget, data, distillation and
frozen weights. A unit has one parameter, ``log_alpha``. In training its gate is drawn anew every step,

    z = clamp(1.2 * sigmoid((logit(u) + log_alpha) / beta) - 0.1, 0, 1),    u ~ U(0, 1),

which is exactly 0 or exactly 1 with positive probability and never above 1. The expected number of kept
units has a closed form, ``P(z > 0) = sigmoid(log_alpha + beta * ln 11)``, and an augmented Lagrangian holds
its mean at a share that falls linearly from 1 to the target (the ramp). At the end the gates are
``sigmoid(0.8 * log_alpha / beta)``, those of the lowest log_alpha are cut, and the rest folded in.
"""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from converters.train.context import Context, Outcome
from converters.train.gate_training import (
    AMBIGUOUS,
    GateBudget,
    GateObjective,
    GateRecipe,
    prune_dense,
)
from converters.train.gates import Units

# The stretch interval, and ln(-HIGH / LOW): where the stretched sigmoid crosses 0.
LOW, HIGH, LN_STRETCH = -0.1, 1.1, math.log(11.0)
LOG_ALPHA_RANGE = (math.log(0.01), math.log(100.0))
# CoFi's factor in the gate that replaces draws at the end.
FINAL_SLOPE = 0.8


class HardConcreteRecipe(GateRecipe):
    """DDP's budget and rates, so that the two compare; ``beta`` and the ramp are Sheared-LLaMA's."""

    method: Literal["hard-concrete"] = "hard-concrete"
    beta: float = Field(default=2 / 3, gt=0, description="temperature of the gates")
    log_alpha: float = Field(
        default=2.0, ge=LOG_ALPHA_RANGE[0], le=LOG_ALPHA_RANGE[1], description="initial value"
    )
    ramp: float = Field(default=0.2, ge=0, le=1, description="share of the steps until the target holds")


def draw_gates(log_alpha: Tensor, uniform: Tensor, beta: float) -> Tensor:
    """Gates z in [0, 1] for noise ``uniform`` in (0, 1), both ``[units]``."""
    soft = torch.sigmoid((torch.logit(uniform) + log_alpha) / beta)
    return (soft * (HIGH - LOW) + LOW).clamp(0.0, 1.0)


def kept_probability(log_alpha: Tensor, beta: float) -> Tensor:
    """``P(z > 0)``."""
    return torch.sigmoid(log_alpha + beta * LN_STRETCH)


def final_gates(log_alpha: Tensor, beta: float) -> Tensor:
    """What replaces draws after training."""
    return torch.sigmoid(FINAL_SLOPE * log_alpha / beta)


def keep_at(step: int, keep: float, recipe: HardConcreteRecipe) -> float:
    """The share to keep at a step: linear from 1 down to ``keep`` over the ramp."""
    length = recipe.ramp * recipe.optimiser.steps
    return 1.0 - (1.0 - keep) * (1.0 if length == 0 else min(1.0, step / length))


class StochasticBudget(GateBudget):
    """Gates of one kind and the Lagrangian on their expected number.

    Args:
        units: of the kind.
        keep: share to keep in the end.
        recipe: beta, initial value, ramp, and whether the budget holds per layer.
        device: of log_alpha.
        stream: number that sets the draws of this kind apart from the others'.
    """

    z_range = LOG_ALPHA_RANGE

    def __init__(
        self, units: Units, keep: float, recipe: HardConcreteRecipe, device: torch.device, stream: int
    ) -> None:
        self.recipe = recipe
        self._seed = recipe.run.seed * 1_000_003 + stream
        start = torch.randn(units.total, generator=torch.Generator().manual_seed(self._seed))
        start = (recipe.log_alpha + 0.01 * start).to(device)
        super().__init__(units, keep, recipe.budget == "layer", start)
        self._noise = torch.full((units.total,), 0.5, device=device)

    def draw(self, step: int) -> None:
        """Take the noise of a step; it depends on seed and step alone, so a resumed run draws the same."""
        generator = torch.Generator().manual_seed(self._seed + 7919 * (step + 1))
        # Away from 0 and 1, where the logit is infinite.
        uniform = torch.rand(self.units.total, generator=generator).clamp(1e-6, 1.0 - 1e-6)
        self._noise = uniform.to(self.z.device)

    def gate(self) -> Tensor:
        """Multipliers under the noise of this step, ``[total]``."""
        return draw_gates(self.z, self._noise, self.recipe.beta)

    def final_gate(self) -> Tensor:
        """What replaces draws after training."""
        return final_gates(self.z, self.recipe.beta)

    def loss(self, step: int) -> Tensor:
        """Lagrangian of the expected share kept."""
        expected = kept_probability(self.z, self.recipe.beta)
        return self.lagrangian(expected, keep_at(step, self.keep, self.recipe))

    @torch.no_grad()
    def figures(self) -> dict[str, Tensor]:
        """Expected sparsity, share of units more likely gone than kept, and share of undecided ones."""
        probability = kept_probability(self.z, self.recipe.beta)
        undecided = (probability > AMBIGUOUS[0]) & (probability < AMBIGUOUS[1])
        return {
            "soft_sparsity": 1.0 - probability.mean(),
            "hard_sparsity": (probability < 0.5).float().mean(),
            "ambiguous": undecided.float().mean(),
            # Copies: multipliers change in place before the log is written.
            "lambda1": self.linear.detach().clone(),
            "lambda2": self.quadratic.detach().clone(),
        }


class HardConcreteObjective(GateObjective[StochasticBudget, HardConcreteRecipe]):
    """One step: the :class:`~converters.train.loop.Objective` of the method."""

    def prepare(self, index: int) -> None:
        """One draw for the whole batch."""
        for budget in self.budgets.values():
            budget.draw(index)

    def penalty(self, budget: StochasticBudget, index: int) -> Tensor:
        """The Lagrangian at this step's target."""
        return budget.loss(index)

    def describe(self, index: int) -> dict[str, Tensor | float]:
        """Of each kind the target, expected sparsity, undecided gates and multipliers."""
        figures: dict[str, Tensor | float] = {}
        for kind, budget in self.budgets.items():
            figures[f"{kind}.keep"] = keep_at(index, budget.keep, self.recipe)
            figures |= {f"{kind}.{name}": value for name, value in budget.figures().items()}
        return figures


def run(context: Context, recipe: HardConcreteRecipe) -> Outcome:
    """Train gates on the frozen model, fold what they end at, slice."""

    def make(stream: int, units: Units, keep: float) -> StochasticBudget:
        return StochasticBudget(units, keep, recipe, context.device, stream)

    return prune_dense(context, recipe, HardConcreteObjective, make)
