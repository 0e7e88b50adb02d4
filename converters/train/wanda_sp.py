"""Wanda-sp and Mag-sp, the structured baselines of FLAP (arXiv:2312.11983): columns of the way back.

A unit leaves the residual stream alone once its columns of o_proj or down_proj are gone, so those score it.
Column j of a weight W with inputs X scores

- Wanda-sp: the mean over rows of ``|W_ij| * ||X_j||_2``;
- Mag-sp: ``||W_:,j||_2``, no data.

A KV group scores the sum over its columns. Every layer loses the same share of its weights; with Wanda-sp
each layer sees what the layers before it, already cut, produce. No weight is updated.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from converters.train.calibration import InputNorm, decoder_layers, sweep_layers
from converters.train.context import CompressionRecipe, Context, Outcome
from converters.train.recipes import Fraction
from converters.train.structured import (
    LayerShape,
    base_shape,
    block_parameters,
    read_layer_shapes,
    structured_config,
)
from converters.train.uniform import cut_layer, head_dim_of, planned_counts, shape_figures


class MagnitudeSpRecipe(CompressionRecipe):
    """No data."""

    method: Literal["magnitude-sp"] = "magnitude-sp"
    sparsity: Fraction = Field(default=0.2, description="share of attention and FFN weights to remove")
    channel_multiple: int = Field(
        default=64, ge=1, description="kept FFN channels a layer: a multiple of this"
    )


class WandaSpRecipe(CompressionRecipe):
    """The paper uses 128 calibration sequences of 2,048 tokens."""

    method: Literal["wanda-sp"] = "wanda-sp"
    sparsity: Fraction = Field(default=0.2, description="share of attention and FFN weights to remove")
    samples: int = Field(default=128, ge=1, description="calibration sequences of data.sequence_length")
    channel_multiple: int = Field(
        default=64, ge=1, description="kept FFN channels a layer: a multiple of this"
    )


def wanda_columns(weight: Tensor, sum_squares: Tensor) -> Tensor:
    """Column scores ``[in]`` of ``[out, in]``; ``sum_squares`` is ``||X_j||^2``."""
    return weight.float().abs().mean(0) * sum_squares.sqrt()


def magnitude_columns(weight: Tensor) -> Tensor:
    """Column norms ``[in]`` of ``[out, in]``."""
    return weight.float().norm(dim=0)


def _unit_scores(layer: Any, shape: LayerShape, norms: Mapping[str, Any] | None) -> tuple[Tensor, Tensor]:
    """Scores of KV groups and channels; without norms by magnitude."""

    def columns(linear: nn.Linear, name: str) -> Tensor:
        return (
            magnitude_columns(linear.weight)
            if norms is None
            else wanda_columns(linear.weight, norms[name].sum_squares)
        )

    groups = channels = torch.zeros(0)
    if shape.num_key_value_heads:
        found = columns(layer.self_attn.o_proj, "self_attn.o_proj")
        groups = found.reshape(shape.num_key_value_heads, -1).sum(1)
    if shape.intermediate_size:
        channels = columns(layer.mlp.down_proj, "mlp.down_proj")
    return groups, channels


@torch.no_grad()
def run(context: Context, recipe: MagnitudeSpRecipe | WandaSpRecipe) -> Outcome:
    """Score and cut layer after layer."""
    config, model = context.loaded.config, context.loaded.model
    structured_config(config, [base_shape(config)])  # refuses families that cannot be served sliced
    shapes, head_dim = read_layer_shapes(config), head_dim_of(config)
    by_layer = [recipe.sparsity] * len(shapes)
    counts = planned_counts(shapes, head_dim, recipe.sparsity, by_layer, recipe.channel_multiple)
    before = block_parameters(model)
    kept: list[LayerShape] = []

    def visit(index: int, layer: nn.Module, norms: Mapping[str, Any] | None) -> None:
        scores = _unit_scores(layer, shapes[index], norms)
        kept.append(cut_layer(layer, shapes[index], scores, counts[index], head_dim))

    figures: dict[str, Any] = {}
    if isinstance(recipe, WandaSpRecipe):
        sequences = context.calibration_sequences(recipe.samples)
        sweep_layers(model, sequences, InputNorm, visit, title=recipe.method, quiet=context.quiet)
        figures["calibration_tokens"] = sequences.numel()
    else:
        for index, layer in enumerate(decoder_layers(model)):
            visit(index, layer, None)
    figures |= shape_figures(before, block_parameters(model), kept)
    return Outcome("structured", structured_config(config, kept), figures)
