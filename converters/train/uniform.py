"""The same share off every layer: how many KV groups and FFN channels that is, and cutting them.

A unit costs what it holds of weights. With d the head dimension and g the query heads of a KV group, a group
holds ``(2g + 2) * d`` rows or columns of the residual width, an FFN channel 3; so a group is priced at
``(2g + 2) * d / 3`` channels. Groups are few and go in whole numbers, rounded down; channels pay the rest,
so that the share of weights removed is the one asked for.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from converters.train.structured import LayerShape, keep_ffn_channels, keep_heads
from vllm_sparse.errors import FormatError


def head_dim_of(config: Mapping[str, Any]) -> int:
    """Explicit, or hidden size over heads."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def group_price(shape: LayerShape, head_dim: int) -> float:
    """Weights of a KV group in FFN channels; 0 without attention."""
    if not shape.num_key_value_heads:
        return 0.0
    return (2 * shape.num_attention_heads / shape.num_key_value_heads + 2) * head_dim / 3


def uniform_counts(shape: LayerShape, head_dim: int, sparsity: float, multiple_of: int) -> tuple[int, int]:
    """KV groups and channels that a layer keeps.

    Args:
        shape: of the layer now.
        head_dim: rows of one head.
        sparsity: share of the layer's attention and FFN weights to remove, in [0, 1).
        multiple_of: kept channels are rounded to a multiple, but a layer may keep all it has.

    Raises:
        FormatError: what is to go does not leave one group and one multiple of channels.
    """
    groups, channels, price = (
        shape.num_key_value_heads,
        shape.intermediate_size,
        group_price(shape, head_dim),
    )
    kept_groups = groups - math.floor(sparsity * groups)
    if not channels:
        return kept_groups, 0
    removed = sparsity * (groups * price + channels) - (groups - kept_groups) * price
    wanted = channels - removed
    kept = channels if removed < multiple_of / 2 else round(wanted / multiple_of) * multiple_of
    if not 0 < kept <= channels:
        raise FormatError(
            f"sparsity {sparsity:.3g} would leave {max(0, round(wanted))} of a layer's {channels} FFN "
            f"channels beside {kept_groups} of its {groups} KV groups, fewer than one multiple of "
            f"{multiple_of}; ask for less, or lower channel_multiple"
        )
    return kept_groups, kept


def planned_counts(
    shapes: Sequence[LayerShape],
    head_dim: int,
    sparsity: float,
    by_layer: Sequence[float],
    multiple_of: int,
) -> list[tuple[int, int]]:
    """KV groups and channels that every layer keeps, known before any work is done.

    Args:
        shapes: of the layers now.
        head_dim: rows of one head.
        sparsity: as asked for, for the message.
        by_layer: share of each layer's weights to remove.
        multiple_of: see :func:`uniform_counts`.

    Raises:
        FormatError: a layer cannot lose that much, or no layer would lose anything.
    """

    def counts(multiple: int) -> list[tuple[int, int]]:
        return [
            uniform_counts(shape, head_dim, share, multiple)
            for shape, share in zip(shapes, by_layer, strict=True)
        ]

    def removes(multiple: int) -> bool:
        return counts(multiple) != [(s.num_key_value_heads, s.intermediate_size) for s in shapes]

    found = counts(multiple_of)
    check_removal("the FFNs", [s.intermediate_size for s in shapes], sparsity, multiple_of, removes)
    return found


def check_removal(
    what: str, sizes: Sequence[int], sparsity: float, multiple_of: int, removes: Callable[[int], bool]
) -> None:
    """Refuse a multiple that rounds everything away that was to be removed.

    Args:
        what: whose channels they are, for the message.
        sizes: channels by layer.
        sparsity: share to remove.
        multiple_of: each layer keeps a multiple of it, or all it has.
        removes: whether anything goes with a multiple.

    Raises:
        FormatError: nothing does; it names a multiple that is fine enough.
    """
    if removes(multiple_of):
        return
    finer = next((m for m in (64, 32, 16, 8, 4, 2, 1) if m < multiple_of and removes(m)), None)
    widths = ", ".join(map(str, sorted({size for size in sizes if size})))
    raise FormatError(
        f"sparsity {sparsity:.3g} would remove nothing: {what} have {widths} channels, of which each layer "
        f"keeps a multiple of channel_multiple {multiple_of} or all; "
        + (f"set channel_multiple to {finer} or less, or ask for more" if finer else "ask for more")
    )


@torch.no_grad()
def cut_layer(
    layer: Any, shape: LayerShape, scores: tuple[Tensor, Tensor], counts: tuple[int, int], head_dim: int
) -> LayerShape:
    """Slice one layer to its best units, in place.

    Args:
        layer: a decoder layer.
        shape: of it now.
        scores: of its KV groups ``[groups]`` and channels ``[channels]``, higher is more important.
        counts: of groups and channels to keep.
        head_dim: rows of one head.

    Returns:
        Its new shape.
    """
    groups, channels = counts
    heads = shape.num_attention_heads
    if groups < shape.num_key_value_heads:
        per_group = heads // shape.num_key_value_heads
        kept = scores[0].topk(groups).indices.sort().values
        query = (kept[:, None] * per_group + torch.arange(per_group, device=kept.device)).flatten()
        keep_heads(layer.self_attn, query, kept, head_dim)
        heads = len(query)
    if channels < shape.intermediate_size:
        keep_ffn_channels(layer.mlp, scores[1].topk(channels).indices.sort().values)
    return LayerShape(heads, groups, channels, shape.o_proj_bias, shape.down_proj_bias)


def shape_figures(before: int, after: int, shapes: Sequence[LayerShape]) -> dict[str, Any]:
    """What a structured method reports: share of block weights gone, and what each layer kept."""
    return {
        "block_sparsity": 1.0 - after / before,
        "layers": [
            {
                "heads": shape.num_attention_heads,
                "kv_heads": shape.num_key_value_heads,
                "ffn_channels": shape.intermediate_size,
            }
            for shape in shapes
        ],
    }
