"""ReQuant (arXiv:2503.01901): low-bit weights beside a few that stay exact, chosen by path integrals.

1. Prune to 2:4 (a model that is 2:4 already stays as it is) and round to int4 groups: w -> w~.
2. The layers' totals of the path-integral score share a global budget of *outliers*: each layer takes that
   many of its largest weights out, and what remains is pruned and rounded again, over a smaller range.
3. A few times: score again, take the *significant* weights, the highest scores of all layers, out too, and
   round the rest again.

Weights that are taken out keep their value, in a sparse matrix S beside the packed base: ``y = W x + S x``,
the ``outliers`` of the sparse24 format (version 2).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from converters.quantize import INT4_GROUPS, int4_group_size, pack_int4, quantize_int4
from converters.train.context import CalibratedRecipe, Context, Outcome
from converters.train.distill import replace_module
from converters.train.optim import next_token_loss
from converters.train.path_integral import Rule, path_integral
from converters.train.progress import RunProgress
from vllm_sparse.errors import UnsupportedError
from vllm_sparse.sparse24 import compress, topk_mask
from vllm_sparse.sparse24.csr import CsrMatrix

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RequantRecipe(CalibratedRecipe):
    """The paper: 32 right ends, 100 sequences of 2,048 tokens, two steps."""

    method: Literal["requant"] = "requant"
    samples: int = Field(default=32, ge=1, description="calibration sequences of data.sequence_length")
    points: int = Field(default=8, ge=1, description="gradients on the way from w to w~")
    rule: Rule = "midpoint"
    outliers: float = Field(default=0.0045, ge=0, lt=0.1, description="share of all weights, the largest")
    significant: float = Field(default=0.0005, ge=0, lt=0.1, description="share of all weights, by score")
    detach_steps: int = Field(default=2, ge=1, description="steps in which significant weights are taken out")


@dataclass
class Split:
    """A weight as int4 base and exact rest.

    Attributes:
        values: int8 storage in [-7, 7], 2:4, ``[out, in]``.
        scale: float32 ``[out, in / group]``.
        exact: bool ``[out, in]``, weights that are taken out.
    """

    values: Tensor
    scale: Tensor
    exact: Tensor

    @property
    def base(self) -> Tensor:
        """The base as numbers, float32 ``[out, in]``."""
        groups = self.values.float().unflatten(1, (self.scale.shape[1], -1))
        return (groups * self.scale.unsqueeze(-1)).flatten(1)


def split_weight(weight: Tensor, exact: Tensor, group_size: int) -> Split:
    """Prune and round what is not taken out.

    Args:
        weight: float32 ``[out, in]``.
        exact: bool, taken out; those places are zero in the base.
        group_size: input columns that share a scale.
    """
    rest = torch.where(exact, 0.0, weight)
    kept = torch.where(topk_mask(rest.abs()), rest, 0.0)
    return Split(*quantize_int4(kept, group_size), exact)


def layer_budgets(totals: Mapping[str, float], sizes: Mapping[str, int], share: float) -> dict[str, int]:
    """How many outliers each layer may have: in proportion to its total score, at most a tenth of it."""
    budget, total = share * sum(sizes.values()), sum(totals.values())
    return {
        name: min(sizes[name] // 10, round(budget * totals[name] / total)) if total else 0 for name in totals
    }


def largest(scores: Tensor, count: int) -> Tensor:
    """Bool mask of the ``count`` largest entries."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[scores.flatten().topk(count).indices] = True
    return mask.reshape(scores.shape)


class OutlierLinear(nn.Linear):
    """A finished linear: a 2:4 int4 base, held as numbers, and exact weights beside it."""

    split: Split
    outliers: Tensor

    @classmethod
    def of(cls, linear: nn.Linear, split: Split) -> "OutlierLinear":
        """``linear`` split; its bias stays."""
        new = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        new.bias = linear.bias
        new.split = split
        new.weight = nn.Parameter(split.base, requires_grad=False)
        exact = torch.where(split.exact, linear.weight.detach(), 0.0)
        new.register_buffer("outliers", exact, persistent=False)
        return new

    def forward(self, inputs: Tensor) -> Tensor:
        """``W x + S x``."""
        return F.linear(inputs, self.weight, self.bias) + F.linear(inputs, self.outliers.to(inputs.dtype))


class Scorer:
    """Path-integral scores of a model's linears on fixed sequences."""

    def __init__(
        self,
        model: Any,
        linears: Mapping[str, nn.Linear],
        sequences: Tensor,
        recipe: RequantRecipe,
        quiet: bool,
    ) -> None:
        self.model, self.linears, self.sequences = model, linears, sequences
        self.recipe, self.quiet = recipe, quiet
        model.requires_grad_(False)
        for linear in linears.values():
            linear.weight.requires_grad_(True)

    def _loss(self, sample: Tensor) -> Tensor:
        ids = sample.long().to(next(self.model.parameters()).device)
        return next_token_loss(self.model(input_ids=ids, use_cache=False).logits, ids)

    def _backward(self) -> None:
        for sample in self.sequences.split(1):
            (self._loss(sample) / len(self.sequences)).backward()

    def changes(self, splits: Mapping[str, Split]) -> dict[str, Tensor]:
        """``d = w~ - w``."""
        return {
            name: torch.where(split.exact, 0.0, split.base - self.linears[name].weight.detach())
            for name, split in splits.items()
        }

    def contributions(self, splits: Mapping[str, Split]) -> dict[str, Tensor]:
        """Signed contributions to the change of the loss."""
        changes = self.changes(splits)
        weights: list[nn.Parameter] = [self.linears[name].weight for name in changes]  # type: ignore[misc]
        with RunProgress("path integral", self.recipe.points, quiet=self.quiet) as progress:
            found = path_integral(
                weights, list(changes.values()), self._backward, self.recipe.points, self.recipe.rule,
                progress.update,
            )  # fmt: skip
        return dict(zip(changes, found, strict=True))

    @torch.no_grad()
    def measured_change(self, splits: Mapping[str, Split]) -> float:
        """``F(w~) - F(w)`` by evaluating both."""
        before = sum(float(self._loss(sample)) for sample in self.sequences.split(1))
        changes = self.changes(splits)
        for name, change in changes.items():
            self.linears[name].weight.add_(change)
        after = sum(float(self._loss(sample)) for sample in self.sequences.split(1))
        for name, change in changes.items():
            self.linears[name].weight.sub_(change)
        return (after - before) / len(self.sequences)


def requantise(
    scorer: Scorer, recipe: RequantRecipe, group_size: int
) -> tuple[dict[str, Split], dict[str, Any]]:
    """The algorithm; returns the splits and what was found on the way."""
    weights = {name: linear.weight.detach().clone() for name, linear in scorer.linears.items()}
    sizes = {name: weight.numel() for name, weight in weights.items()}

    def rounded(exact: Mapping[str, Tensor]) -> dict[str, Split]:
        return {name: split_weight(weight, exact[name], group_size) for name, weight in weights.items()}

    splits = rounded({name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in weights.items()})
    signed = scorer.contributions(splits)
    figures: dict[str, Any] = {
        "loss_change_without_outliers": {
            "predicted": sum(float(part.sum()) for part in signed.values()),
            "measured": scorer.measured_change(splits),
        }
    }
    totals = {name: float(part.abs().sum()) for name, part in signed.items()}
    budgets = layer_budgets(totals, sizes, recipe.outliers)
    splits = rounded({name: largest(weights[name].abs(), count) for name, count in budgets.items()})
    step = round(recipe.significant * sum(sizes.values()) / recipe.detach_steps)
    for _ in range(recipe.detach_steps if step else 0):
        scores = scorer.contributions(splits)
        flat = torch.cat([scores[name].abs().flatten() for name in splits])
        picked = largest(flat, step).split([sizes[name] for name in splits])
        splits = rounded(
            {
                name: split.exact | chosen.reshape(split.exact.shape)
                for (name, split), chosen in zip(splits.items(), picked, strict=True)
            }
        )
    figures["loss_change"] = scorer.measured_change(splits)
    figures["exact_share"] = sum(int(s.exact.sum()) for s in splits.values()) / sum(sizes.values())
    figures["layers"] = {
        name: {"score": totals[name], "outliers": budgets[name], "exact": int(split.exact.sum())}
        for name, split in splits.items()
    }
    return splits, figures


def _group_size(linears: Mapping[str, nn.Linear]) -> int:
    """Input columns sharing a scale.

    Raises:
        UnsupportedError: a linear's width takes no group.
    """
    try:
        return int4_group_size([linear.in_features for linear in linears.values()])
    except UnsupportedError as error:
        odd = [name for name, linear in linears.items() if linear.in_features % INT4_GROUPS[-1]]
        raise UnsupportedError(
            f"{odd[0]} has {linears[odd[0]].in_features} input features; requant's int4 needs multiples of "
            f"{INT4_GROUPS[-1]}. Keep such linears dense with ignore ({len(odd)} of {len(linears)} are), or "
            "use another method."
        ) from error


def run(context: Context, recipe: RequantRecipe) -> Outcome:
    """Score, split, and put the split linears into the model."""
    model = context.loaded.model
    linears = context.targets(recipe.ignore)
    group_size = _group_size(linears)
    sequences = context.calibration_sequences(recipe.samples)
    splits, figures = requantise(Scorer(model, linears, sequences, recipe, context.quiet), recipe, group_size)
    model.requires_grad_(False)
    for name, split in splits.items():
        replace_module(model, name, OutlierLinear.of(linears[name], split))
    figures |= {"group_size": group_size, "calibration_tokens": sequences.numel()}
    return Outcome("2:4", context.loaded.config, figures)


def pack_outliers(
    model: "PreTrainedModel", state: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Any] | None:
    """Put the packed tensors of split linears in place of ``state``'s dense ones.

    Args:
        model: what ``state`` is of.
        state: its tensors in ``dtype``, changed in place.
        dtype: of the exact weights on disk.

    Returns:
        The ``quantization_config`` of the ``sparse24`` format (version 2), None without split linears.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, OutlierLinear)}
    if not found:
        return None
    for name, module in found.items():
        del state[f"{name}.weight"]
        values, bitmask = compress(module.split.values.cpu())
        matrix = CsrMatrix.from_dense(module.outliers.cpu().to(dtype))
        state |= {
            f"{name}.compressed": pack_int4(values),
            f"{name}.bitmask": bitmask,
            f"{name}.shape": torch.tensor(module.weight.shape).reshape(2, 1),
            f"{name}.weight_scale": module.split.scale.cpu(),
            f"{name}.outlier_values": matrix.values,
            f"{name}.outlier_columns": matrix.columns,
            f"{name}.outlier_row_offsets": matrix.row_offsets,
        }
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    first = next(iter(found.values()))
    return {
        "quant_method": "sparse24",
        "format_version": 2,
        "linear": {
            "pattern": "2:4",
            "weights": "int4",
            "group_size": first.in_features // first.split.scale.shape[1],
            "activations": "none",
            "outliers": {"layout": "csr"},
        },
        "ignore": sorted({*linears - found.keys(), "lm_head"}),
    }
