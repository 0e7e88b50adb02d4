"""FLAP (An et al., arXiv:2312.11983): structured pruning without training, by how much inputs fluctuate.

A unit whose input hardly varies can be replaced by its mean. With X the inputs of o_proj and down_proj,
column j scores ``Var(X_j) * ||W_:,j||^2``; a head scores the mean over its columns. Scores are standardised
within each layer and ranked globally, over heads and channels together, each unit at the price of its
weights. What goes is compensated by a bias, ``b = W_:,pruned @ mean(X_pruned)``.

With grouped-query attention a unit is a KV head with its query heads.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from converters.train.calibration import decoder_layers, sweep_layers
from converters.train.context import CompressionRecipe, Context, Outcome
from converters.train.gates import Units, check_multiple, raised_to_keep, rounded_counts
from converters.train.recipes import Fraction
from converters.train.structured import (
    LayerShape,
    base_shape,
    block_parameters,
    keep_ffn_channels,
    keep_heads,
    read_layer_shapes,
    structured_config,
)
from converters.train.uniform import check_removal, group_price, head_dim_of, shape_figures


class FlapRecipe(CompressionRecipe):
    """The paper uses 1,024 calibration sequences of 128 tokens."""

    method: Literal["flap"] = "flap"
    sparsity: Fraction = Field(default=0.2, description="share of attention and FFN weights to remove")
    samples: int = Field(default=128, ge=1, description="calibration sequences of data.sequence_length")
    compensate: bool = Field(default=True, description="add biases in place of what goes")
    channel_multiple: int = Field(
        default=64, ge=1, description="kept FFN channels a layer: a multiple of this"
    )


class InputMoments:
    """Mean and variance of each input feature, accumulated in float64."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self._sum = torch.zeros(in_features, dtype=torch.float64, device=device)
        self._squares = torch.zeros_like(self._sum)
        self._count = 0

    def add(self, inputs: Tensor) -> None:
        """Accumulate ``[tokens, in_features]``."""
        wide = inputs.double()
        self._sum += wide.sum(0)
        self._squares += wide.square().sum(0)
        self._count += len(inputs)

    @property
    def mean(self) -> Tensor:
        """float32 ``[in_features]``."""
        return (self._sum / self._count).float()

    @property
    def variance(self) -> Tensor:
        """float32 ``[in_features]``."""
        mean = self._sum / self._count
        return (self._squares / self._count - mean.square()).clamp(min=0.0).float()


def column_scores(weight: Tensor, moments: InputMoments) -> Tensor:
    """``Var(X_j) * ||W_:,j||^2`` of a linear ``[out, in]``."""
    return moments.variance * weight.float().square().sum(0)


def standardised(scores: Tensor) -> Tensor:
    """Zero mean, unit deviation; all zero when the scores are all alike."""
    return (scores - scores.mean()) / scores.std(correction=0).clamp(min=1e-12)


@dataclass
class LayerScores:
    """What calibration found out about one layer."""

    heads: Tensor
    channels: Tensor
    head_inputs: Tensor
    channel_inputs: Tensor


def choose(
    scores: list[LayerScores], head_price: float, sparsity: float, multiple_of: int = 1
) -> tuple[list[int], list[int]]:
    """How many units each layer keeps when the globally lowest go, as near to ``sparsity`` as they get.

    Where head groups are few, the share removed can miss ``sparsity`` by half a group. Every layer keeps its
    best head unit and its best multiple of channels.

    Args:
        scores: of each layer, standardised.
        head_price: weights of a head unit in units of one FFN channel's.
        sparsity: of the weights of all units.
        multiple_of: channels that a layer keeps at least.

    Returns:
        Head units and channels kept by layer, before rounding.
    """
    parts = [
        raised_to_keep(part, least)
        for layer in scores
        for part, least in ((layer.heads, 1), (layer.channels, multiple_of))
    ]
    prices = torch.cat(
        [torch.full_like(part, head_price if i % 2 == 0 else 1.0) for i, part in enumerate(parts)]
    )
    ranked = torch.cat(parts)
    order = ranked.argsort(stable=True)
    paid = prices[order].cumsum(0)
    # Nothing, or the lowest ones up to the sum nearest to the target.
    target = sparsity * float(prices.sum())
    count = int((torch.cat([paid.new_zeros(1), paid]) - target).abs().argmin())
    pruned = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    pruned[order[:count]] = True
    pruned &= ranked.isfinite()
    kept = [int((~part).sum()) for part in pruned.split([len(part) for part in parts])]
    return kept[::2], kept[1::2]


def check_target(shapes: list[LayerShape], head_price: float, sparsity: float, multiple_of: int) -> None:
    """Refuse, before the work, a share so small or a multiple so large that no ranking can remove a thing.

    Args:
        shapes: of the layers.
        head_price: weights of a head unit in units of one FFN channel's.
        sparsity: of the weights of all units.
        multiple_of: channels that a layer keeps are a multiple.

    Raises:
        FormatError: neither a head unit nor channels could go.
    """
    heads = sum(shape.num_key_value_heads for shape in shapes)
    sizes = [shape.intermediate_size for shape in shapes if shape.intermediate_size]
    target = sparsity * (heads * head_price + sum(sizes))
    if any(shape.num_key_value_heads > 1 for shape in shapes) and target >= head_price / 2:
        return
    check_multiple("the FFNs", sizes, min(1.0, target / max(1, sum(sizes))), multiple_of, sparsity)


@torch.no_grad()
def run(context: Context, recipe: FlapRecipe) -> Outcome:
    """Measure, rank, slice, compensate."""
    config, model = context.loaded.config, context.loaded.model
    structured_config(config, [base_shape(config)])  # refuses families that cannot be served sliced
    shapes = read_layer_shapes(config)
    head_dim = head_dim_of(config)
    price = group_price(base_shape(config), head_dim)
    check_target(shapes, price, recipe.sparsity, recipe.channel_multiple)
    found: list[LayerScores] = []

    def visit(index: int, layer: nn.Module, moments: Mapping[str, Any]) -> None:
        found.append(_scores(layer, shapes[index], moments))

    sequences = context.calibration_sequences(recipe.samples)
    sweep_layers(model, sequences, InputMoments, visit, title="flap", quiet=context.quiet)
    widths = Units(tuple(s.intermediate_size for s in shapes))

    def counts(multiple: int) -> tuple[list[int], list[int]]:
        heads, channels = choose(found, price, recipe.sparsity, multiple)
        return heads, rounded_counts(channels, widths, multiple)

    def removes(multiple: int) -> bool:
        return counts(multiple) != ([s.num_key_value_heads for s in shapes], list(widths.per_layer))

    # Whether a head unit goes is the ranking's choice, so this is known only now.
    check_removal("the FFNs", widths.per_layer, recipe.sparsity, recipe.channel_multiple, removes)
    heads, channels = counts(recipe.channel_multiple)
    before = block_parameters(model)
    kept = [
        _slice(layer, shape, scores, count, width, head_dim, recipe.compensate)
        for layer, shape, scores, count, width in zip(
            decoder_layers(model), shapes, found, heads, channels, strict=True
        )
    ]
    figures = {"calibration_tokens": sequences.numel()} | shape_figures(before, block_parameters(model), kept)
    return Outcome("structured", structured_config(config, kept), figures)


def _scores(layer: Any, shape: LayerShape, moments: Mapping[str, InputMoments]) -> LayerScores:
    empty = next(layer.parameters()).new_zeros(0, dtype=torch.float32)
    heads = channels = head_inputs = channel_inputs = empty
    if shape.num_key_value_heads:
        found = moments["self_attn.o_proj"]
        columns = column_scores(layer.self_attn.o_proj.weight, found)
        heads = standardised(columns.reshape(shape.num_key_value_heads, -1).mean(1))
        head_inputs = found.mean
    if shape.intermediate_size:
        found = moments["mlp.down_proj"]
        channels = standardised(column_scores(layer.mlp.down_proj.weight, found))
        channel_inputs = found.mean
    return LayerScores(heads, channels, head_inputs, channel_inputs)


def _slice(
    layer: Any,
    shape: LayerShape,
    scores: LayerScores,
    heads: int,
    channels: int,
    head_dim: int,
    compensate: bool,
) -> LayerShape:
    """Slice one layer to its best ``heads`` KV heads and ``channels``; returns its new shape."""
    new = shape
    if heads < shape.num_key_value_heads:
        kv_heads = scores.heads.topk(heads).indices.sort().values
        group = shape.num_attention_heads // shape.num_key_value_heads
        query = (kv_heads[:, None] * group + torch.arange(group, device=kv_heads.device)).flatten()
        columns = (query[:, None] * head_dim + torch.arange(head_dim, device=query.device)).flatten()
        bias = _lost_mean(layer.self_attn.o_proj, scores.head_inputs, columns)
        keep_heads(layer.self_attn, query, kv_heads, head_dim)
        added = compensate and _add_bias(layer.self_attn.o_proj, bias)
        new = replace(new, num_attention_heads=len(query), num_key_value_heads=heads)
        new = replace(new, o_proj_bias=added or shape.o_proj_bias)
    if channels < shape.intermediate_size:
        kept = scores.channels.topk(channels).indices.sort().values
        bias = _lost_mean(layer.mlp.down_proj, scores.channel_inputs, kept)
        keep_ffn_channels(layer.mlp, kept)
        added = compensate and _add_bias(layer.mlp.down_proj, bias)
        new = replace(new, intermediate_size=channels, down_proj_bias=added or shape.down_proj_bias)
    return new


def _lost_mean(linear: nn.Linear, mean: Tensor, kept: Tensor) -> Tensor:
    """Mean output of the columns that are not kept, ``[out]``."""
    lost = mean.clone()
    lost[kept] = 0.0
    return linear.weight.float() @ lost


def _add_bias(linear: nn.Linear, bias: Tensor) -> bool:
    """Add to the bias, or give the linear one; says whether it is new."""
    if linear.bias is not None:
        linear.bias.data.add_(bias)
        return False
    linear.bias = nn.Parameter(bias.to(linear.weight.dtype), requires_grad=False)
    return True
