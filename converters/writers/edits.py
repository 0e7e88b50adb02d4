"""What a structured writer changes in a tensor on its way: its name, its rows, its columns."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from converters.readers.structure import LayerFound
from converters.writers.align import Growth
from vllm_sparse.models.padding import keep_kv_rows, pad_output_columns, pad_query_rows

Shape = tuple[int, ...]


def _same(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Edit:
    """A tensor's new name and shape, and how its data gets there."""

    name: str
    shape: Shape
    apply: Callable[[Tensor], Tensor] = _same


def edit_inside(
    layer: LayerFound, name: str, shape: Shape, head_dim: int, growth: Growth | None
) -> Edit | None:
    """What becomes of one tensor of a layer that stays.

    Args:
        layer: the layer.
        name: of the tensor, inside the layer.
        shape: of the tensor.
        head_dim: rows of one head.
        growth: of the layer's dense feed-forward block; None leaves its width.

    Returns:
        The edit, its name still inside the layer; None when the tensor's block or expert is gone.
    """
    if not layer.heads and name.startswith(("self_attn.", "input_layernorm.")):
        return None
    if not layer.has_ffn and name.startswith(("mlp.", "block_sparse_moe.", "post_attention_layernorm.")):
        return None
    if layer.groups is not None and name.startswith("self_attn."):
        return _regroup(layer, name, shape, head_dim)
    if layer.experts is not None:
        return _expert(layer, name, shape, growth)
    if growth is not None and name.startswith("mlp."):
        return grown(name, shape, growth)
    return Edit(name, shape)


def grown(name: str, shape: Shape, growth: Growth) -> Edit:
    """A feed-forward tensor with the channels that ``growth`` adds at its end."""
    down = ".down_proj." in name or ".w2." in name
    if down and name.endswith(".bias"):
        return Edit(name, shape)
    dim = 1 if down else 0
    new = (*shape[:dim], shape[dim] + growth.count, *shape[dim + 1 :])
    return Edit(name, new, lambda tensor: torch.cat([tensor, growth.channels(name, tensor, dim)], dim))


def _regroup(layer: LayerFound, name: str, shape: Shape, head_dim: int) -> Edit:
    plan = layer.groups
    if plan is None:
        return Edit(name, shape)
    part = name.split(".")[1]
    if part == "q_proj":
        return Edit(
            name, (plan.num_heads * head_dim, *shape[1:]), lambda t: pad_query_rows(t, plan, head_dim)
        )
    if part in ("k_proj", "v_proj"):
        return Edit(
            name, (plan.num_kv_heads * head_dim, *shape[1:]), lambda t: keep_kv_rows(t, plan, head_dim)
        )
    if part == "o_proj" and name.endswith(".weight"):
        new = (shape[0], plan.num_heads * head_dim)
        return Edit(name, new, lambda t: pad_output_columns(t, plan, head_dim))
    return Edit(name, shape)


def _expert(layer: LayerFound, name: str, shape: Shape, growth: Growth | None) -> Edit | None:
    """Renumber an expert and widen it to the layer's width; cut the router's rows with the experts."""
    found = layer.experts
    if found is None:
        return Edit(name, shape)
    if name.startswith(f"{found.block}.gate."):
        rows = found.rows
        if rows is None:
            return Edit(name, shape)
        return Edit(name, (len(rows), *shape[1:]), lambda tensor: tensor[list(rows)])
    prefix = f"{found.block}.experts."
    if not name.startswith(prefix):
        return Edit(name, shape)
    number, _, rest = name.removeprefix(prefix).partition(".")
    position = found.ids.index(int(number))
    renamed = f"{prefix}{position}.{rest}"
    extra = found.width - found.widths[position] + (growth.count if growth else 0)
    if not extra or not rest.endswith(".weight"):
        return Edit(renamed, shape)
    return replace(grown(name, shape, Growth(extra)), name=renamed)
