"""Gates on structural units of a frozen model: where they multiply, and how they are folded and sliced.

Units are KV groups (a KV head with the query heads that share it; in a model without GQA simply a head) or
single query heads, and FFN channels. A gate of heads multiplies their output before o_proj, a channel's
multiplies ``act(gate) * up`` before down_proj. Both enter linearly, so they fold into weights exactly.

KV groups shrink the KV cache. Single query heads do so only where all that share a KV head go; where KV heads
are left with unequal numbers, the smaller groups are filled up with zero heads, which is exact.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from converters.train.calibration import decoder_layers
from converters.train.structured import (
    LayerShape,
    keep_ffn_channels,
    keep_heads,
    keep_query_heads,
)
from converters.train.uniform import check_removal, group_price
from vllm_sparse.errors import FormatError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GateKind = Literal["heads", "query-heads", "channels"]


@dataclass(frozen=True)
class Units:
    """How many units of a kind each layer has; flat vectors over all layers are split by it."""

    per_layer: tuple[int, ...]

    @property
    def total(self) -> int:
        """Units over all layers."""
        return sum(self.per_layer)

    def split(self, flat: Tensor) -> Sequence[Tensor]:
        """A flat ``[total]`` vector as one vector a layer."""
        return flat.split(self.per_layer)


class GatedModel:
    """A model whose units are multiplied by gates while :attr:`multipliers` are set.

    Args:
        model: weights stay untouched until :meth:`fold_and_slice`.
        shapes: of its layers.
        head_dim: rows of q, k, v that belong to one head.
    """

    def __init__(self, model: "PreTrainedModel", shapes: Sequence[LayerShape], head_dim: int) -> None:
        self.model = model
        self.shapes = list(shapes)
        self.head_dim = head_dim
        self.layers = list(decoder_layers(model))
        self.units = {
            kind: Units(tuple(count_units(kind, shape) for shape in shapes))
            for kind in ("heads", "query-heads", "channels")
        }
        # kind -> one vector a layer; None runs the model as it is.
        self.multipliers: dict[str, Sequence[Tensor]] | None = None
        self._handles = [handle for index in range(len(self.layers)) for handle in self._hook_layer(index)]

    def _hook_layer(self, index: int) -> Iterator[Any]:
        layer: Any = self.layers[index]
        if self.shapes[index].num_attention_heads:
            for kind in ("heads", "query-heads"):
                yield layer.self_attn.o_proj.register_forward_pre_hook(self._hook(kind, index))
        if self.shapes[index].intermediate_size:
            yield layer.mlp.down_proj.register_forward_pre_hook(self._hook("channels", index))

    def _hook(self, kind: str, index: int) -> Any:
        def multiply(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
            if self.multipliers is None or kind not in self.multipliers:
                return None
            gate = self.multipliers[kind][index]
            if kind != "channels":
                gate = gate.repeat_interleave(args[0].shape[-1] // len(gate))
            return (args[0] * gate.to(args[0].dtype),)

        return multiply

    @contextlib.contextmanager
    def gated(self, flat: dict[str, Tensor]) -> Iterator[None]:
        """Multiply by flat vectors ``{kind: [total]}`` inside the block."""
        self.multipliers = {kind: self.units[kind].split(values) for kind, values in flat.items()}
        try:
            yield
        finally:
            self.multipliers = None

    @torch.no_grad()
    def fold_and_slice(self, flat: dict[str, Tensor], kept: dict[str, Tensor]) -> list[LayerShape]:
        """Multiply gates into weights, drop what is not kept; hooks are removed.

        Head gates go into o_proj's columns, channel gates into up_proj's rows and bias, in float32.

        Args:
            flat: gates by kind, ``[total]``; a kind without gates is left alone.
            kept: bool by kind, ``[total]``, at least one unit a layer.

        Returns:
            The layers' new shapes.
        """
        for handle in self._handles:
            handle.remove()
        gates = {kind: self.units[kind].split(values) for kind, values in flat.items()}
        masks = {kind: self.units[kind].split(values) for kind, values in kept.items()}
        shapes = []
        for index, shape in enumerate(self.shapes):
            layer: Any = self.layers[index]
            heads, kv_heads, channels = (
                shape.num_attention_heads,
                shape.num_key_value_heads,
                shape.intermediate_size,
            )
            for kind in ("heads", "query-heads"):
                if kind in gates and kv_heads:
                    heads, kv_heads = self._slice_heads(
                        kind, layer.self_attn, gates[kind][index], masks[kind][index]
                    )
            if "channels" in gates and channels:
                channels = _slice_channels(layer.mlp, gates["channels"][index], masks["channels"][index])
            shapes.append(LayerShape(heads, kv_heads, channels, shape.o_proj_bias, shape.down_proj_bias))
        return shapes

    def _slice_heads(self, kind: str, attention: Any, gate: Tensor, mask: Tensor) -> tuple[int, int]:
        """Fold and cut one layer's heads; returns its query and KV heads."""
        group = attention.num_key_value_groups
        columns = gate.repeat_interleave((group if kind == "heads" else 1) * self.head_dim)
        attention.o_proj.weight.copy_(attention.o_proj.weight.float() * columns)
        if kind == "query-heads":
            return keep_query_heads(attention, mask, self.head_dim)
        kv_heads = mask.nonzero().flatten()
        query = (kv_heads[:, None] * group + torch.arange(group, device=mask.device)).flatten()
        keep_heads(attention, query, kv_heads, self.head_dim)
        return len(query), len(kv_heads)


def _slice_channels(mlp: Any, gate: Tensor, mask: Tensor) -> int:
    mlp.up_proj.weight.copy_(mlp.up_proj.weight.float() * gate[:, None])
    if mlp.up_proj.bias is not None:
        mlp.up_proj.bias.copy_(mlp.up_proj.bias.float() * gate)
    kept = mask.nonzero().flatten()
    keep_ffn_channels(mlp, kept)
    return len(kept)


def count_units(kind: str, shape: LayerShape) -> int:
    """Units of a kind in a layer."""
    counts = {"heads": shape.num_key_value_heads, "query-heads": shape.num_attention_heads}
    return counts.get(kind, shape.intermediate_size)


def keep_shares(
    shapes: Sequence[LayerShape], head_dim: int, kinds: Sequence[GateKind], sparsity: float
) -> dict[str, float]:
    """Share of each kind to keep, so that ``sparsity`` of the weights of all gated units goes.

    Heads are few: their pruned number is ``sparsity`` of them rounded down, and each layer keeps one. FFN
    channels pay the rest, so the share is met whatever the rounding; heads alone meet it up to one head.

    Args:
        shapes: of the layers.
        head_dim: rows of one head.
        kinds: what has gates.
        sparsity: share of the gated units' weights, in [0, 1).

    Raises:
        FormatError: the units cannot meet it.
    """
    heads: GateKind | None = next((kind for kind in kinds if kind != "channels"), None)
    shares: dict[str, float] = {}
    rest = 0.0  # weights that heads leave to channels, in channels
    if heads is not None:
        counts = [count_units(heads, shape) for shape in shapes]
        # A query head alone has rows of q and columns of o; its KV head stays for the others.
        prices = [
            group_price(shape, head_dim) if heads == "heads" else 2 * head_dim / 3
            for shape in shapes
            for _ in range(count_units(heads, shape))
        ]
        total = sum(counts)
        pruned = min(math.floor(sparsity * total), total - sum(count > 0 for count in counts))
        if sparsity > 0 and pruned == 0 and "channels" not in kinds:
            raise FormatError(
                f"sparsity {sparsity} cannot be met: the {len(counts)} layers have {total} {heads} in all "
                f"({', '.join(map(str, counts[:8]))}{', ...' if len(counts) > 8 else ''}), and each layer "
                "keeps at least one; add channels to `prune`, or ask for more"
            )
        shares[heads] = 1.0 - pruned / total if total else 1.0
        rest = sparsity * sum(prices) - (pruned * sum(prices) / total if total else 0.0)
    if "channels" in kinds:
        channels = sum(shape.intermediate_size for shape in shapes)
        wanted = channels - sparsity * channels - rest
        if wanted < sum(shape.intermediate_size > 0 for shape in shapes):
            raise FormatError(
                f"sparsity {sparsity} would leave {max(0, round(wanted))} of {channels} FFN channels, "
                "fewer than one a layer; ask for less"
            )
        shares["channels"] = wanted / channels
    return shares


def keep_best(scores: Tensor, units: Units, keep_ratio: float, multiple_of: int) -> Tensor:
    """Keep the highest-scoring units over all layers, each layer's count a multiple.

    Every layer keeps its best multiple (or all it has when that is less); the rest of the budget goes to the
    highest scores wherever they are. Counts are then rounded to multiples by largest remainder, so that
    the total moves by less than one multiple, unless the layers' least is more than the budget.

    Args:
        scores: flat ``[total]``.
        units: split into layers.
        keep_ratio: of all units.
        multiple_of: 1 for none; a layer that keeps everything need not be a multiple.

    Returns:
        Bool ``[total]``.
    """
    wanted = max(1, round(keep_ratio * units.total))
    ranked = torch.cat([raised_to_keep(part, multiple_of) for part in units.split(scores)])
    top = torch.zeros_like(scores, dtype=torch.bool)
    top[ranked.topk(max(wanted, int(ranked.isinf().sum()))).indices] = True
    counts = [int(part.sum()) for part in units.split(top)]
    kept = []
    for part, count in zip(units.split(scores), rounded_counts(counts, units, multiple_of), strict=True):
        mask = torch.zeros_like(part, dtype=torch.bool)
        mask[part.topk(count).indices] = True
        kept.append(mask)
    return torch.cat(kept)


def raised_to_keep(scores: Tensor, least: int) -> Tensor:
    """A layer's scores with the ``least`` best at infinity, which no global ranking then cuts."""
    ranked = scores.clone()
    ranked[scores.topk(min(least, len(scores))).indices] = float("inf")
    return ranked


def rounded_counts(counts: Sequence[int], units: Units, multiple_of: int) -> list[int]:
    """Counts by layer rounded to multiples by largest remainder; see :func:`keep_best`."""
    low = [
        size if count == size else min(size, max(multiple_of, count // multiple_of * multiple_of))
        for count, size in zip(counts, units.per_layer, strict=True)
    ]
    order = sorted(range(len(counts)), key=lambda i: low[i] - counts[i])
    for index in order:
        room = min(multiple_of, units.per_layer[index] - low[index])
        if sum(counts) - sum(low) >= (multiple_of + 1) // 2 and room:
            low[index] += room
    return low


def check_multiple(
    what: str, sizes: Sequence[int], share: float, multiple_of: int, sparsity: float | None = None
) -> None:
    """Refuse a multiple that rounds the whole share of channels away, before any work is done.

    Args:
        what: whose channels they are, for the message.
        sizes: channels by layer.
        share: of them to remove.
        multiple_of: each layer keeps a multiple of it, or all it has.
        sparsity: what the recipe asks for, for the message; ``share`` without one.

    Raises:
        FormatError: every layer would keep all its channels.
    """
    units = Units(tuple(sizes))
    ends = [round((1.0 - share) * end) for end in (0, *itertools.accumulate(sizes))]
    counts = [end - start for start, end in itertools.pairwise(ends)]

    def shrinks(multiple: int) -> bool:
        return not units.total or sum(rounded_counts(counts, units, multiple)) < units.total

    check_removal(what, sizes, share if sparsity is None else sparsity, multiple_of, shrinks)
