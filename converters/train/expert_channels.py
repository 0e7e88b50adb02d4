"""Choosing and cutting channels inside experts: what HEAPr and Camera-P share.

Both score every channel of every expert and rank them together, over all layers or inside each. Kernels for
experts want one width in a layer. By default the ranking decides how wide each *layer* is and every expert
keeps its best channels of that width (``equal``); with ``ragged`` every expert keeps exactly its ranked
channels and is filled up with zeros to its layer's widest: the papers' selection, at less saving.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from converters.train.context import CompressionRecipe, Context, Outcome
from converters.train.gates import Units, check_multiple, rounded_counts
from converters.train.moe import MoeLayer, keep_channels, with_widths
from converters.train.recipes import Fraction
from converters.train.structured import block_parameters


class ExpertChannelRecipe(CompressionRecipe):
    """Keys of methods that cut channels inside experts."""

    sparsity: Fraction = Field(default=0.2, description="share of the experts' channels to remove")
    samples: int = Field(default=128, ge=1, description="calibration sequences of data.sequence_length")
    experts: Literal["equal", "ragged"] = "equal"
    channel_multiple: int = Field(
        default=16, ge=1, description="width of a layer's experts: a multiple of this"
    )


def check_widths(layers: Sequence[MoeLayer], sparsity: float, multiple_of: int) -> None:
    """Refuse, before the work, a multiple that leaves the experts of every layer as wide as they are.

    Raises:
        FormatError: nothing would be removed.
    """
    check_multiple("the experts", [layer.width for layer in layers], sparsity, multiple_of)


def ranked(scores: Sequence[Tensor], sparsity: float, over: Literal["all", "layer"]) -> list[Tensor]:
    """Channels that stay when the lowest go.

    Args:
        scores: of each layer, ``[experts, width]``.
        sparsity: share to remove.
        over: rank all layers together, or each by itself.

    Returns:
        Bool masks like ``scores``.
    """
    groups = [torch.cat([s.flatten() for s in scores])] if over == "all" else [s.flatten() for s in scores]
    kept = []
    for group in groups:
        mask = torch.zeros_like(group, dtype=torch.bool)
        mask[group.topk(max(1, len(group) - round(sparsity * len(group)))).indices] = True
        kept.append(mask)
    parts = torch.cat(kept).split([s.numel() for s in scores])
    return [part.reshape(s.shape) for part, s in zip(parts, scores, strict=True)]


def widths(masks: Sequence[Tensor], experts: Literal["equal", "ragged"], multiple_of: int) -> list[int]:
    """The width of each layer's experts: the mean kept, or the widest, as a multiple."""
    full = [mask.shape[1] for mask in masks]
    if experts == "ragged":
        widest = [int(mask.sum(1).max()) for mask in masks]
        return [
            min(size, max(multiple_of, math.ceil(count / multiple_of) * multiple_of))
            for count, size in zip(widest, full, strict=True)
        ]
    means = [round(float(mask.sum()) / mask.shape[0]) for mask in masks]
    return rounded_counts(means, Units(tuple(full)), multiple_of)


def cut(
    context: Context,
    recipe: ExpertChannelRecipe,
    layers: Sequence[MoeLayer],
    scores: Sequence[Tensor],
    over: Literal["all", "layer"],
) -> Outcome:
    """Rank, slice every expert, write the new widths."""
    model: Any = context.loaded.model
    before = block_parameters(model)
    masks = ranked(scores, recipe.sparsity, over)
    found = widths(masks, recipe.experts, recipe.channel_multiple)
    live_share = []
    for layer, score, mask, width in zip(layers, scores, masks, found, strict=True):
        kept = score.topk(width, dim=1).indices.sort(dim=1).values
        live = mask.gather(1, kept) if recipe.experts == "ragged" else torch.ones_like(kept, dtype=torch.bool)
        keep_channels(layer, kept, live)
        live_share.append(float(live.float().mean()))
    by_layer = {layer.index: width for layer, width in zip(layers, found, strict=True)}
    if len(set(found)) == 1:
        model.config.moe_intermediate_size = found[0]
    figures = {
        "expert_widths": {str(index): width for index, width in by_layer.items()},
        "live_share": live_share,
        "block_sparsity": 1.0 - block_parameters(model) / before,
    }
    return Outcome("structured", with_widths(context.loaded.config, by_layer), figures)
