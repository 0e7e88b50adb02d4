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
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from converters.train.context import CompressionRecipe, Context, Outcome
from converters.train.ddp import block_parameters, keep_share
from converters.train.device import autocast, resolve_precision
from converters.train.distill import forward_kl
from converters.train.gates import GatedModel, Units, keep_best
from converters.train.optim import lr_at, next_token_loss
from converters.train.recipes import Fraction, OptimiserRecipe
from converters.train.structured import base_shape, read_layer_shapes, structured_config

# The stretch interval, and ln(-HIGH / LOW): where the stretched sigmoid crosses 0.
LOW, HIGH, LN_STRETCH = -0.1, 1.1, math.log(11.0)
LOG_ALPHA_RANGE = (math.log(0.01), math.log(100.0))
# CoFi's factor in the gate that replaces draws at the end.
FINAL_SLOPE = 0.8
AMBIGUOUS = (0.02, 0.98)


class HardConcreteRecipe(CompressionRecipe):
    """DDP's budget and rates, so that the two compare; ``beta`` and the ramp are Sheared-LLaMA's."""

    method: Literal["hard-concrete"] = "hard-concrete"
    sparsity: Fraction = 0.2
    prune: tuple[Literal["heads", "channels"], ...] = ("heads", "channels")
    budget: Literal["global", "layer"] = "global"
    channel_multiple: int = Field(
        default=64, ge=1, description="kept FFN channels a layer: a multiple of this"
    )
    optimiser: OptimiserRecipe = OptimiserRecipe(
        steps=1000, lr=2e-2, warmup=100, min_lr_ratio=0.1, betas=(0.9, 0.999), weight_decay=0.0
    )
    multiplier_lr: float = Field(default=2e-2, gt=0, description="of lambda1")
    quadratic_lr: float = Field(default=4e-1, gt=0, description="of lambda2")
    multiplier_betas: tuple[float, float] = Field(
        default=(0.9, 0.9), description="of the multipliers' AdamW, as in DDP"
    )
    kl_weight: float = Field(default=2.0, ge=0, description="eta")
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


class StochasticBudget:
    """Gates of one kind and the Lagrangian on their expected number.

    Args:
        units: of the kind.
        keep: share to keep in the end.
        recipe: beta, initial value, ramp, and whether the budget holds per layer.
        device: of log_alpha.
        stream: number that sets the draws of this kind apart from the others'.
    """

    def __init__(
        self, units: Units, keep: float, recipe: HardConcreteRecipe, device: torch.device, stream: int
    ) -> None:
        self.units = units
        self.keep = keep
        self.recipe = recipe
        self._seed = recipe.run.seed * 1_000_003 + stream
        start = torch.randn(units.total, generator=torch.Generator().manual_seed(self._seed))
        self.z = nn.Parameter((recipe.log_alpha + 0.01 * start).to(device))
        self.linear, self.quadratic = (nn.Parameter(torch.zeros((), device=device)) for _ in range(2))
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

    def loss(self, step: int) -> Tensor:
        """``lambda1 * gap + lambda2 * gap^2`` of the expected share kept."""
        expected = kept_probability(self.z, self.recipe.beta)
        layers = self.recipe.budget == "layer"
        parts = [p for p in self.units.split(expected) if len(p)] if layers else [expected]
        gap = torch.stack([part.mean() for part in parts]) - keep_at(step, self.keep, self.recipe)
        return (self.linear * gap + self.quadratic * gap.square()).mean()

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


class StochasticOptimiser:
    """One AdamW: log_alpha goes down the loss, multipliers climb it."""

    def __init__(self, budgets: dict[str, StochasticBudget], recipe: HardConcreteRecipe) -> None:
        self.budgets = budgets
        self.recipe = recipe
        every = list(budgets.values())
        settings = recipe.optimiser
        self._rates = (settings.lr, recipe.multiplier_lr, recipe.quadratic_lr)
        groups: list[dict[str, Any]] = [
            {"params": [b.z for b in every]},
            {
                "params": [b.linear for b in every],
                "maximize": True,
                "betas": recipe.multiplier_betas,
            },
            {
                "params": [b.quadratic for b in every],
                "maximize": True,
                "betas": recipe.multiplier_betas,
            },
        ]
        self.adamw = torch.optim.AdamW(
            groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
        )

    @torch.no_grad()
    def step(self, index: int) -> float:
        """Apply the gradients of step ``index``; returns the gates' learning rate."""
        share = lr_at(index, self.recipe.optimiser) / self.recipe.optimiser.lr
        for group, rate in zip(self.adamw.param_groups, self._rates, strict=True):
            group["lr"] = rate * share
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        for budget in self.budgets.values():
            budget.z.clamp_(*LOG_ALPHA_RANGE)
        return share * self._rates[0]


class HardConcreteObjective:
    """One step: the :class:`~converters.train.loop.Objective` of the method."""

    def __init__(
        self,
        gated: GatedModel,
        budgets: dict[str, StochasticBudget],
        recipe: HardConcreteRecipe,
        device: torch.device,
        precision: Literal["bf16", "fp32"],
    ) -> None:
        self.gated = gated
        self.budgets = budgets
        self.recipe = recipe
        self.device = device
        self.precision = precision
        self.optimiser = StochasticOptimiser(budgets, recipe)

    def step(self, index: int, batch: Tensor) -> dict[str, Tensor | float]:
        """One draw for the whole batch, teacher, gated student, losses, update."""
        for budget in self.budgets.values():
            budget.draw(index)
        sums = torch.zeros(3, device=self.device)
        for ids in batch.to(self.device).chunk(self.recipe.optimiser.accumulation):
            share = len(ids) / len(batch)
            task, ce, kl = self._task(ids, share)
            sums += torch.stack([task, ce, kl]).detach() * share
        torch.stack([budget.loss(index) for budget in self.budgets.values()]).sum().backward()
        lr = self.optimiser.step(index)
        figures: dict[str, Tensor | float] = {"loss": sums[0], "ce": sums[1], "kl": sums[2], "lr": lr}
        for kind, budget in self.budgets.items():
            figures[f"{kind}.keep"] = keep_at(index, budget.keep, self.recipe)
            figures |= {f"{kind}.{name}": value for name, value in budget.figures().items()}
        return figures

    def _task(self, ids: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor]:
        """Losses of a part of the batch; leaves the gradient of ``share`` of them."""
        gates = {kind: budget.gate() for kind, budget in self.budgets.items()}
        with autocast(self.device, self.precision), torch.no_grad():
            teacher = self.gated.model(input_ids=ids, use_cache=False).logits
        # Backward inside: with gradient checkpointing it runs layers again, and they need their gates.
        with self.gated.gated(gates):
            with autocast(self.device, self.precision):
                student = self.gated.model(input_ids=ids, use_cache=False).logits
            ce = next_token_loss(student, ids)
            kl = forward_kl(student, teacher)
            task = ce + self.recipe.kl_weight * kl
            (task * share).backward()
        return task, ce, kl

    def state_dict(self) -> dict[str, Any]:
        """Gates, multipliers and moments; the model is frozen and draws depend on the step alone."""
        return {
            "budgets": {
                kind: [p.detach() for p in (b.z, b.linear, b.quadratic)] for kind, b in self.budgets.items()
            },
            "optimiser": self.optimiser.adamw.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo of :meth:`state_dict`."""
        self.optimiser.adamw.load_state_dict(state["optimiser"])
        with torch.no_grad():
            for kind, values in state["budgets"].items():
                b = self.budgets[kind]
                for parameter, value in zip((b.z, b.linear, b.quadratic), values, strict=True):
                    parameter.copy_(value)


def run(context: Context, recipe: HardConcreteRecipe) -> Outcome:
    """Train gates on the frozen model, fold what they end at, slice."""
    loaded = context.loaded
    config = loaded.config
    structured_config(config, [base_shape(config)])  # refuses families that cannot be served sliced
    precision = resolve_precision(recipe.run.precision, context.device)
    loaded.model.requires_grad_(False).train(recipe.run.gradient_checkpointing)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    gated = GatedModel(loaded.model, read_layer_shapes(config), head_dim)
    budgets: dict[str, StochasticBudget] = {
        kind: StochasticBudget(
            gated.units[kind],
            keep_share(kind, gated.units[kind], recipe.sparsity),
            recipe,
            context.device,
            stream,
        )
        for stream, kind in enumerate(recipe.prune)
    }
    before = block_parameters(loaded.model)
    objective = HardConcreteObjective(gated, budgets, recipe, context.device, precision)
    figures = context.train(objective, recipe.optimiser, precision)
    gates: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    for kind, budget in budgets.items():
        multiple = recipe.channel_multiple if kind == "channels" else 1
        gates[kind] = final_gates(budget.z.detach(), recipe.beta)
        kept[kind] = keep_best(budget.z.detach(), budget.units, budget.keep, multiple)
    shapes = gated.fold_and_slice(gates, kept)
    figures["block_sparsity"] = 1.0 - block_parameters(loaded.model) / before
    figures["layers"] = [
        {"kv_heads": shape.num_key_value_heads, "ffn_channels": shape.intermediate_size} for shape in shapes
    ]
    return Outcome("structured", structured_config(config, shapes), figures)
