"""Exact zero-padding of what attention and expert kernels need equal inside one layer.

Layers may differ as they like; inside a layer, every KV head must serve the same number of query
heads, and every expert must have the same width. Where pruning left them unequal, the smaller ones
are filled up with zeros:

- A query head whose rows of the query projection (and query bias) are zero attends to something
  finite, and its zero columns of the output projection then drop it. The KV cache, which is what a
  long context pays for, keeps its pruned size; duplicating KV heads instead would enlarge it.
- A KV head that lost all its query heads is removed.
- A channel of an expert whose row of the up projection is zero is zero after the product with the
  gate, and meets a zero column of the down projection.

The functions take and return torch tensors; planning needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_sparse.errors import FormatError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class QueryHeadPlan:
    """Where each query head of a layer goes so that all KV heads serve equally many.

    Attributes:
        group_size: Query heads per KV head afterwards.
        kv_heads: Indices of the KV heads that stay.
        slots: For each query head afterwards, its index among those that pruning kept (counted
            group by group), or -1 for a zero head.
    """

    group_size: int
    kv_heads: tuple[int, ...]
    slots: tuple[int, ...]

    @property
    def num_heads(self) -> int:
        """Query heads afterwards: ``num_attention_heads`` of the layer."""
        return len(self.slots)

    @property
    def num_kv_heads(self) -> int:
        """KV heads afterwards: ``num_key_value_heads`` of the layer."""
        return len(self.kv_heads)

    @property
    def padded_heads(self) -> int:
        """Zero heads among them: the waste."""
        return self.slots.count(-1)


def plan_query_heads(kept_per_kv_head: Sequence[int]) -> QueryHeadPlan:
    """Plan the padding of a layer whose KV heads kept different numbers of query heads.

    Args:
        kept_per_kv_head: Query heads left to each KV head, in order; zero drops the KV head.

    Returns:
        The plan; without unequal groups it changes nothing.

    Raises:
        FormatError: A count is negative, or no query head is left at all.
    """
    counts = list(kept_per_kv_head)
    if not counts or min(counts) < 0 or max(counts) == 0:
        raise FormatError(
            f"query heads per KV head are {counts}; at least one must be left, and none may be negative. "
            'Mark a layer without attention as "skip": ["attention"].'
        )
    size = max(counts)
    slots: list[int] = []
    first = 0
    for count in counts:
        if count:
            slots += [*range(first, first + count), *([-1] * (size - count))]
        first += count
    return QueryHeadPlan(size, tuple(i for i, count in enumerate(counts) if count), tuple(slots))


def pad_query_rows(tensor: torch.Tensor, plan: QueryHeadPlan, head_dim: int) -> torch.Tensor:
    """Spread the query projection's rows, or its bias, over the planned heads.

    Args:
        tensor: [kept heads * head_dim, ...].
        plan: From :func:`plan_query_heads`.
        head_dim: Rows of one head.

    Returns:
        [plan.num_heads * head_dim, ...], zero where a head was added.
    """
    return _place(tensor.unflatten(0, (-1, head_dim)), plan, "query projection").flatten(0, 1)


def pad_output_columns(tensor: torch.Tensor, plan: QueryHeadPlan, head_dim: int) -> torch.Tensor:
    """Spread the output projection's columns over the planned heads.

    Args:
        tensor: [hidden, kept heads * head_dim].
        plan: From :func:`plan_query_heads`.
        head_dim: Columns of one head.

    Returns:
        [hidden, plan.num_heads * head_dim], zero where a head was added.
    """
    columns = tensor.unflatten(1, (-1, head_dim)).movedim(1, 0)
    return _place(columns, plan, "output projection").movedim(0, 1).flatten(1).contiguous()


def keep_kv_rows(tensor: torch.Tensor, plan: QueryHeadPlan, head_dim: int) -> torch.Tensor:
    """Drop key or value rows (or biases) of KV heads that no query head is left to read.

    Args:
        tensor: [all KV heads * head_dim, ...].
        plan: From :func:`plan_query_heads`.
        head_dim: Rows of one head.

    Returns:
        [plan.num_kv_heads * head_dim, ...].
    """
    return tensor.unflatten(0, (-1, head_dim))[list(plan.kv_heads)].flatten(0, 1)


def pad_expert(
    gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Widen one expert with zero channels to the width of its layer.

    Args:
        gate: [own width, hidden].
        up: [own width, hidden].
        down: [hidden, own width].
        width: Width of the layer's widest expert.

    Returns:
        Gate and up [width, hidden], down [hidden, width].

    Raises:
        FormatError: The expert is wider than ``width``, or its tensors disagree.
    """
    from torch.nn.functional import pad

    own = gate.shape[0]
    if up.shape[0] != own or down.shape[1] != own or own > width:
        raise FormatError(
            f"an expert has {own} gate rows, {up.shape[0]} up rows and {down.shape[1]} down columns; "
            f"all three must be equal and at most the layer's width {width}."
        )
    extra = width - own
    return pad(gate, (0, 0, 0, extra)), pad(up, (0, 0, 0, extra)), pad(down, (0, extra))


def _place(heads: torch.Tensor, plan: QueryHeadPlan, what: str) -> torch.Tensor:
    """Put kept heads [kept, ...] into their slots [planned, ...]; the others stay zero."""
    kept = plan.num_heads - plan.padded_heads
    if heads.shape[0] != kept:
        raise FormatError(
            f"the {what} holds {heads.shape[0]} heads, but the layer is said to have kept {kept}. "
            "Correct the number of query heads per KV head."
        )
    placed = heads.new_zeros((plan.num_heads, *heads.shape[1:]))
    filled = [slot for slot, source in enumerate(plan.slots) if source >= 0]
    placed[filled] = heads
    return placed
