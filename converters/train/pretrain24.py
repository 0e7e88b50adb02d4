"""Pre-training with 2:4 FFNs (Hu et al., arXiv:2404.01847), and S-STE (arXiv:2409.09099) as an option.

The FFN's products run sparse while training: forward and input gradient under one transposable mask, the
weight gradient from an unbiased 2:4 estimate of dY. What keeps this as good as dense training is

- the flip rate, the share of mask entries that change at a refresh: it has to fall as training settles;
- masked decay, ``g <- g + lambda * (1 - m) * w`` *before* Adam, so that the pull is normalised like the
  loss's gradient and tames the flips; lambda is searched in short trials, where the flip rate must come out
  at 0.60 to 0.95 of a dense run's;
- a dense tail: the last sixth of the steps trains densely, and the final model is dense.

S-STE replaces mask and decay by a continuous map: in every group of 4 the second smallest ``|w|`` is
subtracted and what falls below zero is cut, then the tensor is scaled by a constant beta; what is served is
``beta * S(w)``, 2:4 along the input.
"""

import logging
import math
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from converters.train.calibration import decoder_layers
from converters.train.context import Context, Outcome, Sparse24Recipe
from converters.train.device import resolve_precision
from converters.train.distill import replace_module
from converters.train.gated import ACTIVATIONS, GatedFfn
from converters.train.loop import CHECKPOINT
from converters.train.packing import Batches
from converters.train.progress import RunProgress
from converters.train.recipes import OptimiserRecipe
from converters.train.sparse_products import SparseProduct, SparseProducts
from converters.train.trainer import LanguageModelling
from converters.train.transposable import BLOCK, transposable_mask
from vllm_sparse.errors import FormatError
from vllm_sparse.sparse24.mask import GROUP

logger = logging.getLogger(__name__)

# Flip rate of a trial over that of the dense trial, at which lambda is taken.
ACCEPTED = (0.60, 0.95)
_LAYER_STRIDE = 1_000_003


class Pretrain24Recipe(Sparse24Recipe):
    """The paper's GPT-2 runs: lambda 6e-5 to 2e-4, masks refreshed every 40 steps, 300,000 steps."""

    method: Literal["pretrain24"] = "pretrain24"
    ignore: tuple[str, ...] = Field(
        default=("*.self_attn.*",), description="patterns of linears to train densely; the paper's FFN alone"
    )
    start: Literal["scratch", "model"] = Field(
        default="scratch", description="fresh weights in the model's shape, or go on from its own"
    )
    rule: Literal["transposable", "s-ste"] = "transposable"
    optimiser: OptimiserRecipe = OptimiserRecipe()
    masked_decay: float | None = Field(default=None, ge=0, description="lambda; without one it is searched")
    decay_grid: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    search_steps: int = Field(default=60, ge=2, description="steps of each trial")
    refresh: int = Field(default=10, ge=1, description="steps between mask updates")
    prune_gradients: bool = Field(default=True, description="estimate products with dY from a 2:4 dY")
    dense_tail: float | None = Field(
        default=None, ge=0, lt=1, description="share of the steps; 1/6, and 0 with s-ste"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Pretrain24Recipe":
        if self.rule == "s-ste" and (self.dense_tail or self.masked_decay):
            raise ValueError("s-ste has no masked_decay and no dense_tail; leave both out")
        if self.searches:
            if not self.decay_grid or min(self.decay_grid) <= 0:
                raise ValueError("decay_grid needs at least one lambda, all above 0")
            if self.search_steps <= self.refresh:
                raise ValueError(
                    f"search_steps {self.search_steps} must exceed refresh {self.refresh}, or no flip is seen"
                )
            if self.search_steps > self.tail_start:
                raise ValueError(
                    f"search_steps {self.search_steps} exceeds the {self.tail_start} sparse steps; lower it, "
                    "or give masked_decay"
                )
        return self

    @property
    def searches(self) -> bool:
        """Whether lambda has to be found first."""
        return self.rule == "transposable" and self.masked_decay is None

    @property
    def tail_start(self) -> int:
        """The first step of the dense tail."""
        share = self.dense_tail if self.dense_tail is not None else (1 / 6 if self.rule != "s-ste" else 0.0)
        return self.optimiser.steps - round(share * self.optimiser.steps)


def flip_rate(old: Tensor, new: Tensor) -> Tensor:
    """``||m xor m'||_1 / D``."""
    return (old != new).float().mean()


def add_masked_decay(grad: Tensor, weight: Tensor, mask: Tensor, masked_decay: float) -> None:
    """``g <- g + lambda * (1 - m) * w``, in place."""
    grad.add_(torch.where(mask, 0.0, weight), alpha=masked_decay)


def soft_threshold(weight: Tensor) -> Tensor:
    """S(w): the second smallest ``|w|`` of each 4 along the input subtracted from all, cut at zero."""
    grouped = weight.reshape(*weight.shape[:-1], -1, GROUP)
    size = grouped.abs()
    low, high = size[..., ::2].minimum(size[..., 1::2]), size[..., ::2].maximum(size[..., 1::2])
    threshold = low.amax(-1, keepdim=True).minimum(high.amin(-1, keepdim=True))
    return (grouped.sign() * (size - threshold).clamp(min=0.0)).reshape(weight.shape)


def rescale(weight: Tensor) -> Tensor:
    """beta = <w, S(w)> / ||S(w)||^2, the scale at which S(w) is closest to w."""
    shrunk = soft_threshold(weight)
    return (weight * shrunk).sum() / shrunk.square().sum().clamp(min=torch.finfo(weight.dtype).tiny)


class PretrainLinear(nn.Module):
    """A linear that trains under a 2:4 rule; it holds the dense latent weight.

    Args:
        linear: its weight and bias are trained.
        rule: see :class:`Pretrain24Recipe`.
        prune_gradients: see there.
    """

    mask: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear, rule: str, prune_gradients: bool) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.rule, self.prune_gradients = rule, prune_gradients
        weight = linear.weight.detach()
        if rule == "transposable":
            self.register_buffer("mask", transposable_mask(weight))
        else:
            self.register_buffer("scale", rescale(weight))
        self.dense = False
        self._seed, self._calls = 0, 0
        self._products: SparseProducts | None = None

    def begin_step(self, seed: int) -> None:
        """Forget what was packed from the weights before the last update."""
        self._seed, self._calls, self._products = seed, 0, None

    def sparse_weight(self) -> Tensor:
        """Ws ``[out, in]``."""
        if self.rule == "transposable":
            return torch.where(self.mask, self.weight, 0.0)
        return self.scale * soft_threshold(self.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        """Dense in the tail, else sparse in all three products."""
        if self.dense:
            return F.linear(inputs, self.weight, self.bias)
        if not torch.is_grad_enabled():
            return F.linear(inputs, self.sparse_weight().to(inputs.dtype), self.bias)
        kind = inputs.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else inputs.dtype
        if self._products is None:
            with torch.no_grad():
                transposable = self.rule == "transposable"
                self._products = SparseProducts.of(
                    self.sparse_weight().to(dtype),
                    transposable,
                    self.prune_gradients,
                    self.prune_gradients and not transposable,
                )
        self._calls += 1
        flat = inputs.to(dtype).flatten(0, -2)
        product = SparseProduct.apply(flat, self.weight.to(dtype), self._products, self._seed + self._calls)
        output = product.unflatten(0, inputs.shape[:-1])
        return output if self.bias is None else output + self.bias.to(dtype)

    @torch.no_grad()
    def refresh(self) -> Tensor:
        """New mask; returns the flip rate."""
        new = transposable_mask(self.weight)
        rate = flip_rate(self.mask, new)
        self.mask.copy_(new)
        return rate

    @torch.no_grad()
    def finished(self, template: nn.Linear) -> nn.Linear:
        """``template`` with the weight that the last step's forward used."""
        template.weight.copy_(self.weight if self.dense else self.sparse_weight())
        return template


class PretrainObjective(LanguageModelling):
    """Next-token training with sparse FFNs: the :class:`~converters.train.loop.Objective` of the method."""

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, PretrainLinear],
        recipe: Pretrain24Recipe,
        device: torch.device,
        precision: Literal["bf16", "fp32"],
        masked_decay: float,
    ) -> None:
        super().__init__(model, recipe.optimiser, device, precision)
        self.layers = layers
        self.settings = recipe
        self.masked_decay = masked_decay
        # Dense trials refresh masks to compare flips, and compute without them.
        self.always_dense = False

    def step(self, index: int, batch: Tensor) -> dict[str, Tensor | float]:
        """Refresh masks when due, then one update."""
        figures: dict[str, Tensor | float] = {}
        tail = index >= self.settings.tail_start
        base = (self.settings.run.seed + index + 1) * _LAYER_STRIDE
        for number, layer in enumerate(self.layers.values()):
            layer.dense = tail or self.always_dense
            layer.begin_step(base + number * 1009)
        transposable = self.settings.rule == "transposable"
        if transposable and not tail and index % self.settings.refresh == 0:
            rates = torch.stack([layer.refresh() * layer.mask.numel() for layer in self.layers.values()])
            figures["flip_rate"] = rates.sum() / sum(layer.mask.numel() for layer in self.layers.values())
        return super().step(index, batch) | figures | {"dense": float(tail)}

    def before_update(self) -> None:
        """Masked decay, after clipping and before Adam."""
        for layer in self.layers.values():
            if self.settings.rule == "transposable" and not layer.dense and layer.weight.grad is not None:
                add_masked_decay(layer.weight.grad, layer.weight.detach(), layer.mask, self.masked_decay)

    def state_dict(self) -> dict[str, Any]:
        """Weights, masks, moments and the lambda that was found."""
        return {**super().state_dict(), "masked_decay": self.masked_decay}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo of :meth:`state_dict`."""
        super().load_state_dict({key: value for key, value in state.items() if key != "masked_decay"})
        self.masked_decay = state["masked_decay"]


def choose_decay(ratios: dict[float, float]) -> float:
    """The smallest lambda whose flip-rate ratio is accepted, else the one nearest to the interval.

    Args:
        ratios: lambda to its trial's flip rate over the dense trial's.
    """
    low, high = ACCEPTED
    accepted = [value for value, ratio in ratios.items() if low <= ratio <= high]
    if accepted:
        return min(accepted)
    chosen = min(ratios, key=lambda value: max(low - ratios[value], ratios[value] - high))
    logger.warning(
        "no lambda of the grid brings the flip rate to %.2f-%.2f of dense training (%s); taking %g",
        low,
        high,
        ", ".join(f"{value:g}: {ratio:.2f}" for value, ratio in ratios.items()),
        chosen,
    )
    return chosen


def search_decay(objective: PretrainObjective, batches: Batches, quiet: bool) -> dict[float, float]:
    """Flip-rate ratio of every lambda of the grid, from short trials that all start alike.

    The model ends as it began.
    """
    recipe = objective.settings
    start = {name: value.clone() for name, value in objective.model.state_dict().items()}
    rates: dict[float | None, float] = {}
    with RunProgress("search of lambda", len(recipe.decay_grid) + 1, quiet=quiet) as progress:
        for done, value in enumerate((None, *recipe.decay_grid), 1):
            trial = PretrainObjective(
                objective.model, objective.layers, recipe, objective.device, objective.precision, value or 0.0
            )
            trial.always_dense = value is None
            seen = []
            for index in range(recipe.search_steps):
                figures = trial.step(index, batches.batch(index))
                if index and "flip_rate" in figures:
                    seen.append(float(figures["flip_rate"]))
            rates[value] = sum(seen) / len(seen)
            objective.model.load_state_dict(start)
            progress.update(done)
    dense = rates.pop(None)
    if not dense or not math.isfinite(sum(rates.values())):
        raise FormatError(
            f"the dense trial flipped a share of {dense:g} of its masks in {recipe.search_steps} steps, so "
            "no lambda can be chosen; raise search_steps or the learning rate, or give masked_decay"
        )
    return {value: rate / dense for value, rate in rates.items() if value is not None}


def make_sparse(
    context: Context, recipe: Pretrain24Recipe
) -> tuple[dict[str, nn.Linear], dict[str, PretrainLinear]]:
    """Put sparse linears and the fused activation into the model; returns the old and the new linears."""
    model: Any = context.loaded.model
    linears = context.targets(recipe.ignore)
    for name, linear in linears.items():
        if recipe.rule == "transposable" and linear.out_features % BLOCK:
            raise FormatError(
                f"{name} has {linear.out_features} output features, not a multiple of {BLOCK}; "
                "keep it dense by adding it to ignore"
            )
    layers = {
        name: PretrainLinear(linear, recipe.rule, recipe.prune_gradients) for name, linear in linears.items()
    }
    for name, layer in layers.items():
        replace_module(model, name, layer)
    return linears, layers


def fuse_activations(model: Any) -> dict[str, nn.Module]:
    """Fused gated FFNs where the family's activation is known; returns the modules they stand for."""
    activation = ACTIVATIONS.get(getattr(model.config, "hidden_act", ""))
    replaced: dict[str, nn.Module] = {}
    if activation is None:
        return replaced
    for index, layer in enumerate(decoder_layers(model)):
        mlp: Any = layer.mlp
        if all(hasattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj")):
            replaced[f"model.layers.{index}.mlp"] = mlp
            layer.mlp = GatedFfn(mlp, activation)
    return replaced


def restart(model: Any, seed: int) -> None:
    """Fresh weights, as the family initialises them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(model)(model.config)
    model.load_state_dict(fresh.state_dict())


def run(context: Context, recipe: Pretrain24Recipe) -> Outcome:
    """Train, sparse for most of the run; the result is dense unless there is no tail."""
    model: Any = context.loaded.model
    precision = resolve_precision(recipe.run.precision, context.device)
    if recipe.start == "scratch":
        restart(model, recipe.run.seed)
    linears, layers = make_sparse(context, recipe)
    mlps = fuse_activations(model)
    figures: dict[str, Any] = {}
    objective = PretrainObjective(
        model, layers, recipe, context.device, precision, recipe.masked_decay or 0.0
    )
    resumed = context.resume and (context.work / CHECKPOINT).exists()
    if recipe.searches and not resumed:
        ratios = search_decay(objective, context.training_batches(recipe.optimiser), context.quiet)
        objective.masked_decay = choose_decay(ratios)
        figures["flip_rate_ratios"] = {f"{value:g}": ratio for value, ratio in ratios.items()}
        logger.info("masked decay %g", objective.masked_decay)
    figures |= context.train(objective, recipe.optimiser, precision)
    figures["masked_decay"] = objective.masked_decay
    model.eval()
    for name, layer in layers.items():
        replace_module(model, name, layer.finished(linears[name]))
    for name, mlp in mlps.items():
        gated: Any = model.get_submodule(name)
        for part in ("gate_proj", "up_proj", "down_proj"):
            setattr(mlp, part, getattr(gated, part))
        replace_module(model, name, mlp)
    tail = recipe.tail_start < recipe.optimiser.steps
    return Outcome("dense" if tail else "2:4", context.loaded.config, figures)
