"""Structured FFN pruning by magnitude: whole channels go, and the model gets smaller shapes.

Channel j of a gated FFN is row j of gate and up and column j of down. Its score is the joint L2 norm of
the three; the lowest-scoring channels of each layer are sliced away.
"""

from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from converters.train.calibration import decoder_layers
from converters.train.context import CompressionRecipe, Context, Outcome
from converters.train.structured import base_shape, keep_ffn_channels, read_layer_shapes, structured_config
from vllm_sparse.errors import FormatError


class StructuredFfnRecipe(CompressionRecipe):
    """``keep_ratio`` is one number for all layers, or one a layer."""

    method: Literal["structured-ffn"] = "structured-ffn"
    keep_ratio: float | tuple[float, ...] = 0.5
    multiple_of: int = Field(default=64, gt=0, description="kept channels are rounded to a multiple of this")


def channel_scores(gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Joint L2 norm of each channel: gate and up ``[channels, in]``, down ``[out, channels]``."""
    squares = gate.float().square().sum(1) + up.float().square().sum(1) + down.float().square().sum(0)
    return squares.sqrt()


def kept_count(channels: int, keep_ratio: float, multiple_of: int) -> int:
    """Channels to keep: the nearest multiple, at least one multiple, at most all.

    Raises:
        FormatError: the ratio is not in (0, 1], or the multiple exceeds the layer.
    """
    if not 0.0 < keep_ratio <= 1.0:
        raise FormatError(f"keep_ratio {keep_ratio} must lie in (0, 1]")
    if multiple_of > channels:
        raise FormatError(f"multiple_of {multiple_of} exceeds the layer's {channels} channels")
    return min(channels, max(multiple_of, round(keep_ratio * channels / multiple_of) * multiple_of))


@torch.no_grad()
def run(context: Context, recipe: StructuredFfnRecipe) -> Outcome:
    """Slice every layer's FFN."""
    loaded = context.loaded
    layers = decoder_layers(loaded.model)
    base = base_shape(loaded.config)
    # Refuse an unknown family, and know what an already pruned model's layers have, before any slicing.
    structured_config(loaded.config, [base] * len(layers))
    shapes = read_layer_shapes(loaded.config)
    ratios = recipe.keep_ratio if isinstance(recipe.keep_ratio, tuple) else (recipe.keep_ratio,) * len(layers)
    if len(ratios) != len(layers):
        raise FormatError(f"keep_ratio has {len(ratios)} values; the model has {len(layers)} layers")
    counts = [
        kept_count(shape.intermediate_size, ratio, recipe.multiple_of) if shape.intermediate_size else 0
        for shape, ratio in zip(shapes, ratios, strict=True)
    ]
    if min(ratios) < 1.0 and counts == [shape.intermediate_size for shape in shapes]:
        raise FormatError(
            f"keep_ratio {recipe.keep_ratio} would remove nothing: rounded to a multiple of multiple_of "
            f"{recipe.multiple_of}, every layer keeps all its channels; lower either"
        )
    for layer, count in zip(layers, counts, strict=True):
        if count:
            mlp: Any = layer.mlp
            scores = channel_scores(mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
            keep_ffn_channels(mlp, scores.topk(count).indices.sort().values)
    kept = [replace(shape, intermediate_size=count) for shape, count in zip(shapes, counts, strict=True)]
    return Outcome("structured", structured_config(loaded.config, kept), {"ffn_channels": counts})
