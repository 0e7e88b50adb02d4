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
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from converters.train import parallel
from converters.train.context import CompressionRecipe, Context, Outcome
from converters.train.device import autocast, resolve_precision
from converters.train.distill import forward_kl
from converters.train.gates import GatedModel, Units, keep_best
from converters.train.moe import MOE_FAMILIES
from converters.train.optim import lr_at, next_token_loss
from converters.train.recipes import Fraction, OptimiserRecipe
from converters.train.structured import base_shape, read_layer_shapes, structured_config
from vllm_sparse.errors import FormatError

# The stretch interval of the scores, and C0 = ln(-r/l) rounded as the paper has it.
LOW, HIGH, C0 = -0.1, 1.1, 2.4
LOWEST_Z = -0.1
AMBIGUOUS = (0.02, 0.98)


class DdpRecipe(CompressionRecipe):
    """The paper's run: 1,000 steps of 32,768 tokens, 2,048-token sequences.

    Two defaults differ from the paper's code, which has ``min_lr_ratio: 0`` and ``multiplier_betas: (0.9,
    0.999)``. Over a run of some hundred steps a second moment with 0.999 remembers the gap of the first
    steps, so that multipliers stop climbing long before the budget holds; and a rate that goes to 0 freezes
    z while mu still shrinks, which leaves gates just above zero.
    """

    method: Literal["ddp"] = "ddp"
    sparsity: Fraction = 0.2
    prune: tuple[Literal["heads", "channels"], ...] = Field(
        default=("heads", "channels"), description="of dense models; mixtures gate their experts' channels"
    )
    budget: Literal["global", "layer", "expert"] = Field(
        default="global", description="one mean over all units of a kind, or one in each layer or expert"
    )
    experts: Literal["equal", "ragged"] = Field(
        default="equal", description="of mixtures: one width a layer, or each expert's own filled with zeros"
    )
    channel_multiple: int = Field(
        default=64, ge=1, description="kept FFN channels a layer: a multiple of this"
    )
    optimiser: OptimiserRecipe = OptimiserRecipe(
        steps=1000, lr=2e-2, warmup=100, min_lr_ratio=0.1, betas=(0.9, 0.999), weight_decay=0.0
    )
    gates: Literal["extended", "clamped"] = Field(
        default="extended", description="range of gates: [0, inf), or [0, 1] for the paper's ablation"
    )
    multiplier_lr: float = Field(default=2e-2, gt=0, description="of lambda1 and lambda3")
    quadratic_lr: float = Field(default=4e-1, gt=0, description="of lambda2")
    multiplier_betas: tuple[float, float] = Field(
        default=(0.9, 0.9), description="of the multipliers' AdamW; (0.9, 0.999) in the paper's code"
    )
    binarise: bool = True
    kl_weight: float = Field(default=2.0, ge=0, description="eta")
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


class Budget:
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
        generator = torch.Generator().manual_seed(seed)
        self.clamped = clamped
        self.units = units
        self.keep = keep
        self.per_layer = per_layer
        self.z = nn.Parameter((1.0 + 0.01 * torch.randn(units.total, generator=generator)).to(device))
        self.linear, self.quadratic, self.binary = (
            nn.Parameter(torch.zeros((), device=device)) for _ in range(3)
        )

    def gate(self) -> Tensor:
        """Multipliers m, ``[total]``."""
        return straight_clamp(self.z) if self.clamped else straight_relu(self.z)

    def loss(self, mu: float, binarise: bool) -> Tensor:
        """Augmented Lagrangian and binarisation."""
        scores = retention(self.z, mu)
        parts = [p for p in self.units.split(scores) if len(p)] if self.per_layer else [scores]
        gap = torch.stack([part.mean() for part in parts]) - self.keep
        loss = (self.linear * gap + self.quadratic * gap.square()).mean()
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


class BudgetOptimiser:
    """One AdamW: gates go down the loss, multipliers climb it; z is kept above -0.1."""

    def __init__(self, budgets: dict[str, Budget], recipe: DdpRecipe) -> None:
        self.budgets = budgets
        self.recipe = recipe
        every = list(budgets.values())
        settings = recipe.optimiser
        multipliers = [m for b in every for m in (b.linear, b.binary)]
        self._rates = (settings.lr, recipe.multiplier_lr, recipe.quadratic_lr)
        groups: list[dict[str, Any]] = [
            {"params": [b.z for b in every]},
            {"params": multipliers, "maximize": True, "betas": recipe.multiplier_betas},
            {"params": [b.quadratic for b in every], "maximize": True, "betas": recipe.multiplier_betas},
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
            # A clamped gate's z would otherwise drift far above 1, where the task no longer sees it.
            budget.z.clamp_(LOWEST_Z, 1.0 if budget.clamped else None)
        return share * self._rates[0]


class Gated(Protocol):
    """A model whose units are multiplied by gates while asked to."""

    model: Any

    def gated(self, flat: dict[str, Tensor]) -> AbstractContextManager[None]:
        """Multiply by flat vectors by kind inside the block."""


class DdpObjective:
    """One DDP step: the :class:`~converters.train.loop.Objective` of the method."""

    def __init__(
        self,
        gated: Gated,
        budgets: dict[str, Budget],
        recipe: DdpRecipe,
        device: torch.device,
        precision: Any,
    ) -> None:
        self.gated = gated
        self.budgets = budgets
        self.recipe = recipe
        self.device = device
        self.precision = precision
        self.optimiser = BudgetOptimiser(budgets, recipe)

    def step(self, index: int, batch: Tensor) -> dict[str, Tensor | float]:
        """Teacher, gated student, losses, update."""
        mu = mu_at(index, self.recipe)
        sums = torch.zeros(3, device=self.device)
        for ids in batch.to(self.device).chunk(self.recipe.optimiser.accumulation):
            share = len(ids) / len(batch)
            task, ce, kl = self._task(ids, share)
            sums += torch.stack([task, ce, kl]).detach() * share
        for b in self.budgets.values():
            parallel.average_gradient(b.z)
        budget = torch.stack([b.loss(mu, self.recipe.binarise) for b in self.budgets.values()]).sum()
        budget.backward()
        lr = self.optimiser.step(index)
        figures: dict[str, Tensor | float] = {
            "loss": sums[0],
            "ce": sums[1],
            "kl": sums[2],
            "lr": lr,
            "mu": mu,
        }
        for kind, b in self.budgets.items():
            values = b.figures(mu)
            values |= {"lambda1": b.linear, "lambda2": b.quadratic, "lambda3": b.binary}
            # Multipliers change in place: what is logged is a copy.
            figures |= {f"{kind}.{name}": value.detach().clone() for name, value in values.items()}
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

    def optimisers(self) -> list[torch.optim.Optimizer]:
        """For sharded checkpoints."""
        return [self.optimiser.adamw]

    def state_dict(self) -> dict[str, Any]:
        """Gates, multipliers and moments; the model is frozen."""
        return {
            "budgets": {
                kind: [p.detach() for p in (b.z, b.linear, b.quadratic, b.binary)]
                for kind, b in self.budgets.items()
            },
            "optimiser": self.optimiser.adamw.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo of :meth:`state_dict`."""
        self.optimiser.adamw.load_state_dict(state["optimiser"])
        with torch.no_grad():
            for kind, values in state["budgets"].items():
                b = self.budgets[kind]
                for parameter, value in zip((b.z, b.linear, b.quadratic, b.binary), values, strict=True):
                    parameter.copy_(value)


def keep_share(kind: str, units: Units, sparsity: float) -> float:
    """rho: heads are too few for a fraction, so their pruned number is rounded down to whole groups."""
    if kind == "heads":
        return 1.0 - math.floor(sparsity * units.total) / units.total
    return 1.0 - sparsity


def run(context: Context, recipe: DdpRecipe) -> Outcome:
    """Train gates on the frozen model, fold them, slice it."""
    loaded = context.loaded
    config = loaded.config
    if config.get("model_type") in MOE_FAMILIES:
        from converters.train import ddp_experts  # that module builds on this one

        return ddp_experts.run(context, recipe)
    if recipe.budget == "expert":
        raise FormatError(f"budget: expert is for mixtures of experts; {config.get('model_type')} has none")
    structured_config(config, [base_shape(config)])  # refuses families that cannot be served sliced
    precision = resolve_precision(recipe.run.precision, context.device)
    # Training mode is what turns gradient checkpointing on; nothing else here depends on it.
    loaded.model.requires_grad_(False).train(recipe.run.gradient_checkpointing)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    gated = GatedModel(loaded.model, read_layer_shapes(config), head_dim)
    budgets: dict[str, Budget] = {
        kind: Budget(
            gated.units[kind],
            keep_share(kind, gated.units[kind], recipe.sparsity),
            recipe.budget != "global",
            context.device,
            recipe.run.seed,
            recipe.gates == "clamped",
        )
        for kind in recipe.prune
    }
    before = block_parameters(loaded.model)
    several = parallel.size() > 1
    parallel.shard(loaded.model)
    figures = context.train(
        DdpObjective(gated, budgets, recipe, context.device, precision), recipe.optimiser, precision
    )
    context.collect(None, lambda: None)
    if several:
        loaded = context.loaded
        gated = GatedModel(loaded.model, read_layer_shapes(config), head_dim)
    gates: dict[str, Tensor] = {kind: b.gate().detach() for kind, b in budgets.items()}
    kept: dict[str, Tensor] = {
        kind: keep_best(b.z.detach(), b.units, b.keep, recipe.channel_multiple if kind == "channels" else 1)
        for kind, b in budgets.items()
    }
    shapes = gated.fold_and_slice(gates, kept)
    figures["block_sparsity"] = 1.0 - block_parameters(loaded.model) / before
    figures["gate_range"] = {kind: [float(g[kept[kind]].min()), float(g.max())] for kind, g in gates.items()}
    figures["layers"] = [
        {"kv_heads": shape.num_key_value_heads, "ffn_channels": shape.intermediate_size} for shape in shapes
    ]
    return Outcome("structured", structured_config(config, shapes), figures)


def block_parameters(model: Any) -> int:
    """Weights of attention and FFN, the part that pruning shrinks."""
    return sum(p.numel() for p in model.model.layers.parameters())
