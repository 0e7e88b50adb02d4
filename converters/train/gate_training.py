"""What methods that learn gates on a frozen model share: recipe, budgets, loop, and the cut at the end.

A unit has one trained number z. It gives a gate that multiplies the unit and a score of how much of the unit
is kept; what these two maps are is the method. The loss of a step is

    L = CE + eta * KL(teacher || student) + lambda1 * (kept - rho) + lambda2 * (kept - rho)^2   for each kind

with the model itself, gates off, as the teacher. The multipliers start at 0 and climb by gradient ascent in
the optimiser that z descends in. At the end gates are folded into the weights and the lowest z are cut.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from converters.train import parallel
from converters.train.context import CompressionRecipe, Context, Outcome
from converters.train.device import autocast, resolve_precision
from converters.train.distill import forward_kl
from converters.train.gates import GatedModel, GateKind, Units, check_multiple, keep_best, keep_shares
from converters.train.optim import lr_at, next_token_loss
from converters.train.recipes import Beta, Fraction, OptimiserRecipe
from converters.train.structured import (
    base_shape,
    block_parameters,
    read_layer_shapes,
    structured_config,
)
from converters.train.uniform import head_dim_of, shape_figures
from vllm_sparse.errors import FormatError

# Scores between these are neither kept nor gone.
AMBIGUOUS = (0.02, 0.98)


class GateRecipe(CompressionRecipe):
    """Keys of every method that learns gates."""

    sparsity: Fraction = Field(default=0.2, description="share of the gated units' weights to remove")
    prune: tuple[GateKind, ...] = Field(
        default=("heads", "channels"),
        description="heads are KV heads with their query heads, query-heads go one by one; mixtures gate "
        "their experts' channels",
    )
    budget: Literal["global", "layer", "expert"] = Field(
        default="global", description="one mean over all units of a kind, or one in each layer or expert"
    )
    channel_multiple: int = Field(
        default=64, ge=1, description="kept FFN channels a layer: a multiple of this"
    )
    optimiser: OptimiserRecipe = OptimiserRecipe(
        steps=1000, lr=2e-2, warmup=100, min_lr_ratio=0.1, betas=(0.9, 0.999), weight_decay=0.0
    )
    multiplier_lr: float = Field(default=2e-2, gt=0, description="of lambda1 (and DDP's lambda3)")
    quadratic_lr: float = Field(default=4e-1, gt=0, description="of lambda2")
    multiplier_betas: tuple[Beta, Beta] = Field(
        default=(0.9, 0.9), description="of the multipliers' AdamW; (0.9, 0.999) in DDP's code"
    )
    kl_weight: float = Field(default=2.0, ge=0, description="eta")

    @model_validator(mode="after")
    def _check_kinds(self) -> "GateRecipe":
        if not self.prune or len(set(self.prune)) < len(self.prune):
            raise ValueError(f"prune is {list(self.prune)}; name at least one kind of unit, each once")
        if {"heads", "query-heads"} <= set(self.prune):
            raise ValueError("prune has heads and query-heads; a head can have one gate: choose one of them")
        return self


class GateBudget:
    """Gates of one kind and the multipliers that hold their number.

    Args:
        units: of the kind.
        keep: rho, the share to keep.
        per_layer: average the Lagrangian over layers, each with its own mean, in place of one mean.
        start: first z, ``[total]``.
    """

    # What z is held to after every step.
    z_range: tuple[float, float | None]

    def __init__(self, units: Units, keep: float, per_layer: bool, start: Tensor) -> None:
        self.units = units
        self.keep = keep
        self.per_layer = per_layer
        self.z = nn.Parameter(start)
        self.linear, self.quadratic = (nn.Parameter(start.new_zeros(())) for _ in range(2))

    def gate(self) -> Tensor:
        """Multipliers of the units in training, ``[total]``."""
        raise NotImplementedError

    def final_gate(self) -> Tensor:
        """What is folded into the weights, ``[total]``."""
        raise NotImplementedError

    def multipliers(self) -> list[nn.Parameter]:
        """Those that climb at ``multiplier_lr``."""
        return [self.linear]

    def lagrangian(self, kept: Tensor, keep: float) -> Tensor:
        """``lambda1 * gap + lambda2 * gap^2`` of the mean of ``kept`` ``[total]`` against ``keep``."""
        parts = [p for p in self.units.split(kept) if len(p)] if self.per_layer else [kept]
        gap = torch.stack([part.mean() for part in parts]) - keep
        return (self.linear * gap + self.quadratic * gap.square()).mean()

    def state(self) -> list[Tensor]:
        """Everything that steps change."""
        return [p.detach() for p in (self.z, *self.multipliers(), self.quadratic)]

    @torch.no_grad()
    def load_state(self, values: Sequence[Tensor]) -> None:
        """Undo of :meth:`state`."""
        for parameter, value in zip((self.z, *self.multipliers(), self.quadratic), values, strict=True):
            parameter.copy_(value)


class GateOptimiser:
    """One AdamW: gates go down the loss, multipliers climb it; z stays in its range."""

    def __init__(self, budgets: Mapping[str, GateBudget], recipe: GateRecipe) -> None:
        self.budgets = budgets
        self.recipe = recipe
        every = list(budgets.values())
        settings = recipe.optimiser
        self._rates = (settings.lr, recipe.multiplier_lr, recipe.quadratic_lr)
        climbing = {"maximize": True, "betas": recipe.multiplier_betas}
        groups: list[dict[str, Any]] = [
            {"params": [b.z for b in every]},
            {"params": [m for b in every for m in b.multipliers()], **climbing},
            {"params": [b.quadratic for b in every], **climbing},
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
            budget.z.clamp_(*budget.z_range)
        return share * self._rates[0]


class Gated(Protocol):
    """A model whose units are multiplied by gates while asked to."""

    model: Any

    def gated(self, flat: dict[str, Tensor]) -> AbstractContextManager[None]:
        """Multiply by flat vectors by kind inside the block."""


BudgetT = TypeVar("BudgetT", bound=GateBudget)
RecipeT = TypeVar("RecipeT", bound=GateRecipe)


class GateObjective(Generic[BudgetT, RecipeT]):
    """One step: the :class:`~converters.train.loop.Objective` of a method, which adds three functions."""

    def __init__(
        self,
        gated: Gated,
        budgets: dict[str, BudgetT],
        recipe: RecipeT,
        device: torch.device,
        precision: Literal["bf16", "fp32"],
    ) -> None:
        self.gated = gated
        self.budgets = budgets
        self.recipe = recipe
        self.device = device
        self.precision = precision
        self.optimiser = GateOptimiser(budgets, recipe)

    def prepare(self, index: int) -> None:
        """Before step ``index``; nothing by default."""

    def penalty(self, budget: BudgetT, index: int) -> Tensor:
        """What a budget adds to the loss of a step."""
        raise NotImplementedError

    def describe(self, index: int) -> dict[str, Tensor | float]:
        """Figures of the gates for the log, after the update."""
        raise NotImplementedError

    def step(self, index: int, batch: Tensor) -> dict[str, Tensor | float]:
        """Teacher, gated student, losses, update."""
        self.prepare(index)
        sums = torch.zeros(3, device=self.device)
        for ids in batch.to(self.device).chunk(self.recipe.optimiser.accumulation):
            share = len(ids) / len(batch)
            sums += torch.stack(self._task(ids, share)).detach() * share
        for budget in self.budgets.values():
            parallel.average_gradient(budget.z)
        torch.stack([self.penalty(budget, index) for budget in self.budgets.values()]).sum().backward()
        lr = self.optimiser.step(index)
        figures: dict[str, Tensor | float] = {"loss": sums[0], "ce": sums[1], "kl": sums[2], "lr": lr}
        return figures | self.describe(index)

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

    def optimisers(self) -> list[torch.optim.Optimizer]:
        """For sharded checkpoints."""
        return [self.optimiser.adamw]

    def state_dict(self) -> dict[str, Any]:
        """Gates, multipliers and moments; the model is frozen."""
        return {
            "budgets": {kind: budget.state() for kind, budget in self.budgets.items()},
            "optimiser": self.optimiser.adamw.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo of :meth:`state_dict`."""
        self.optimiser.adamw.load_state_dict(state["optimiser"])
        for kind, values in state["budgets"].items():
            self.budgets[kind].load_state(values)


def prune_dense(
    context: Context,
    recipe: RecipeT,
    objective: type[GateObjective[BudgetT, RecipeT]],
    make: Callable[[int, Units, float], BudgetT],
) -> Outcome:
    """Train gates on a frozen dense model, fold them, slice it.

    Args:
        context: the model and its data.
        recipe: of the method.
        objective: of the method.
        make: a budget from the position of its kind in the recipe, its units and the share to keep.

    Raises:
        UnsupportedError: a family that cannot be served sliced.
        FormatError: a sparsity that the units cannot meet, or that ``channel_multiple`` rounds away.
    """
    loaded = context.loaded
    config = loaded.config
    if recipe.budget == "expert":
        raise FormatError(f"budget: expert is for mixtures of experts; {config.get('model_type')} has none")
    structured_config(config, [base_shape(config)])  # refuses families that cannot be served sliced
    precision = resolve_precision(recipe.run.precision, context.device)
    # Training mode is what turns gradient checkpointing on; nothing else here depends on it.
    loaded.model.requires_grad_(False).train(recipe.run.gradient_checkpointing)
    shapes, head_dim = read_layer_shapes(config), head_dim_of(config)
    gated = GatedModel(loaded.model, shapes, head_dim)
    shares = keep_shares(shapes, head_dim, recipe.prune, recipe.sparsity)
    if "channels" in shares:
        ffns = [shape.intermediate_size for shape in shapes if shape.intermediate_size]
        check_multiple("the FFNs", ffns, 1.0 - shares["channels"], recipe.channel_multiple, recipe.sparsity)
    budgets: dict[str, BudgetT] = {
        kind: make(position, gated.units[kind], shares[kind]) for position, kind in enumerate(recipe.prune)
    }
    before = block_parameters(loaded.model)
    several = parallel.size() > 1
    parallel.shard(loaded.model)
    figures = context.train(
        objective(gated, budgets, recipe, context.device, precision), recipe.optimiser, precision
    )
    context.collect(None, lambda: None)
    if several:
        loaded = context.loaded
        gated = GatedModel(loaded.model, shapes, head_dim)
    gates: dict[str, Tensor] = {kind: b.final_gate().detach() for kind, b in budgets.items()}
    kept: dict[str, Tensor] = {
        kind: keep_best(b.z.detach(), b.units, b.keep, recipe.channel_multiple if kind == "channels" else 1)
        for kind, b in budgets.items()
    }
    new = gated.fold_and_slice(gates, kept)
    figures |= shape_figures(before, block_parameters(loaded.model), new)
    figures["kept_share"] = {kind: float(mask.float().mean()) for kind, mask in kept.items()}
    figures["gate_range"] = {kind: [float(g[kept[kind]].min()), float(g.max())] for kind, g in gates.items()}
    return Outcome("structured", structured_config(config, new), figures)
