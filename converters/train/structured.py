"""Models whose layers differ in heads and FFN width: build, slice, and write their config.

On disk such a model is ordinary safetensors under ordinary names; ``config.json`` keeps the family's
global values and adds Hugging Face's ``per_layer_config`` for the layers that differ. Transformers' own
classes cannot build it, so :func:`structured_class` derives one that can.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vllm_sparse.errors import FormatError, UnsupportedError
from vllm_sparse.models.families import FAMILIES
from vllm_sparse.models.layer_config import (
    ACCESS_FLAG,
    DOWN_PROJ_BIAS,
    O_PROJ_BIAS,
    FfnShape,
    read_model_shape,
)
from vllm_sparse.models.padding import pad_output_columns, pad_query_rows, plan_query_heads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHAPE_KEYS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
_SKIPS = ("attention", "mlp")
# Same module names and the same gated FFN, so one slicer serves them all.
STRUCTURED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class LayerShape:
    """What one decoder layer keeps. Zero heads or zero width means the block is skipped.

    The biases are on the projections back into the residual stream, in families that have none there.
    """

    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    o_proj_bias: bool = False
    down_proj_bias: bool = False

    @property
    def skip(self) -> list[str]:
        """Blocks that are gone, in ``per_layer_config``'s words."""
        empty = {"attention": self.num_attention_heads == 0, "mlp": self.intermediate_size == 0}
        return [name for name in _SKIPS if empty[name]]


def base_shape(config: dict[str, Any]) -> LayerShape:
    """The shape that layers without an entry of their own have."""
    heads = config["num_attention_heads"]
    return LayerShape(heads, config.get("num_key_value_heads") or heads, config["intermediate_size"])


def read_layer_shapes(config: dict[str, Any]) -> list[LayerShape]:
    """Per-layer shapes of a raw ``config.json``, validated as the vLLM plugin validates them."""
    shapes = []
    model = read_model_shape(config)
    # Qwen2 has biases on q, k and v alone, so one on the output is pruning's.
    alone = model.family.o_bias_key is None
    for layer in model.layers:
        attention, ffn = layer.attention, layer.ffn
        shapes.append(
            LayerShape(
                attention.num_heads if attention else 0,
                attention.num_kv_heads if attention else 0,
                ffn.intermediate_size if ffn else 0,
                bool(attention and attention.o_bias and (alone or not attention.qkv_bias)),
                bool(isinstance(ffn, FfnShape) and ffn.down_bias and not ffn.up_bias),
            )
        )
    return shapes


def structured_config(config: dict[str, Any], shapes: list[LayerShape]) -> dict[str, Any]:
    """The ``config.json`` of a model of these shapes; ``config`` is the unpruned model's.

    Raises:
        UnsupportedError: no served architecture exists for the family.
    """
    family = config.get("model_type")
    if family not in STRUCTURED_FAMILIES:
        raise UnsupportedError(
            f"models of type {family!r} cannot be pruned structurally here; "
            f"known: {', '.join(STRUCTURED_FAMILIES)}"
        )
    base = base_shape(config)
    entries: dict[str, dict[str, Any]] = {}
    for index, shape in enumerate(shapes):
        entry: dict[str, Any] = {
            name: getattr(shape, name)
            for name in _SHAPE_KEYS
            if getattr(shape, name) not in (0, getattr(base, name))
        }
        entry |= {name: True for name in (O_PROJ_BIAS, DOWN_PROJ_BIAS) if getattr(shape, name)}
        if shape.skip:
            entry["skip"] = shape.skip
        if entry:
            entries[str(index)] = entry
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    # Transformers wants a global value for every key that some layers set.
    biases = {
        name: False for name in (O_PROJ_BIAS, DOWN_PROJ_BIAS) if any(name in e for e in entries.values())
    }
    return {
        **biases,
        **config,
        "architectures": [FAMILIES[family].architecture],
        "head_dim": head_dim,
        "per_layer_config": entries,
        ACCESS_FLAG: True,
    }


def structured_class(stock: type["PreTrainedModel"], shapes: list[LayerShape]) -> type["PreTrainedModel"]:
    """A subclass of a transformers model class whose layers have these shapes from the start."""

    class Structured(stock):  # type: ignore[valid-type,misc]
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            for layer, shape in zip(self.model.layers, shapes, strict=True):
                reshape_attention(layer, shape, config.head_dim)
                reshape_ffn(layer, shape)

    return Structured


def reshape_attention(layer: Any, shape: LayerShape, head_dim: int) -> None:
    """Give a layer that is not loaded yet the projections of ``shape``, or no attention."""
    attention = layer.self_attn
    if shape.num_attention_heads == 0:
        layer.self_attn = NoAttention()
        layer.input_layernorm = nn.Identity()
    else:
        rows = shape.num_attention_heads * head_dim
        kv_rows = shape.num_key_value_heads * head_dim
        attention.q_proj = _like(attention.q_proj, attention.q_proj.in_features, rows)
        attention.k_proj = _like(attention.k_proj, attention.k_proj.in_features, kv_rows)
        attention.v_proj = _like(attention.v_proj, attention.v_proj.in_features, kv_rows)
        attention.o_proj = _like(attention.o_proj, rows, attention.o_proj.out_features, shape.o_proj_bias)
        attention.num_key_value_groups = shape.num_attention_heads // shape.num_key_value_heads


def reshape_ffn(layer: Any, shape: LayerShape) -> None:
    """Give a layer that is not loaded yet the FFN of ``shape``, or none."""
    mlp = layer.mlp
    if shape.intermediate_size == 0:
        layer.mlp = NoMlp()
        layer.post_attention_layernorm = nn.Identity()
    else:
        width = shape.intermediate_size
        mlp.gate_proj = _like(mlp.gate_proj, mlp.gate_proj.in_features, width)
        mlp.up_proj = _like(mlp.up_proj, mlp.up_proj.in_features, width)
        mlp.down_proj = _like(mlp.down_proj, width, mlp.down_proj.out_features, shape.down_proj_bias)


def _like(linear: nn.Linear, in_features: int, out_features: int, add_bias: bool = False) -> nn.Linear:
    weight = linear.weight
    bias = add_bias or linear.bias is not None
    return nn.Linear(in_features, out_features, bias=bias, dtype=weight.dtype, device=weight.device)


class NoAttention(nn.Module):
    """Adds nothing to the residual stream."""

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        """Zeros, and no attention weights."""
        return torch.zeros_like(hidden_states), None


class NoMlp(nn.Module):
    """Adds nothing to the residual stream."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Zeros."""
        return torch.zeros_like(hidden_states)


def keep_ffn_channels(mlp: Any, kept: Tensor) -> None:
    """Slice gate, up and down to the channels ``kept`` (int64, ascending), in place."""
    mlp.gate_proj = _slice(mlp.gate_proj, rows=kept)
    mlp.up_proj = _slice(mlp.up_proj, rows=kept)
    mlp.down_proj = _slice(mlp.down_proj, columns=kept)


def keep_heads(attention: Any, query_heads: Tensor, kv_heads: Tensor, head_dim: int) -> None:
    """Slice q, k, v rows and o columns to the given heads (int64, ascending), in place.

    Raises:
        FormatError: the kept query heads do not share the kept KV heads evenly and in order.
    """
    group = attention.num_key_value_groups
    kept_groups = query_heads // group
    per_kv = len(query_heads) // max(1, len(kv_heads))
    if not torch.equal(kept_groups, kv_heads.repeat_interleave(per_kv)):
        raise FormatError(
            f"query heads {query_heads.tolist()} do not use KV heads {kv_heads.tolist()} evenly "
            f"({group} query heads share one)"
        )
    attention.q_proj = _slice(attention.q_proj, rows=_head_rows(query_heads, head_dim))
    attention.k_proj = _slice(attention.k_proj, rows=_head_rows(kv_heads, head_dim))
    attention.v_proj = _slice(attention.v_proj, rows=_head_rows(kv_heads, head_dim))
    attention.o_proj = _slice(attention.o_proj, columns=_head_rows(query_heads, head_dim))
    attention.num_key_value_groups = per_kv


def keep_query_heads(attention: Any, kept: Tensor, head_dim: int) -> tuple[int, int]:
    """Slice attention to single query heads, in place; KV heads that lose all of theirs go.

    Where KV heads are left with unequal numbers, zero heads fill up the smaller groups
    (:mod:`vllm_sparse.models.padding`), which changes no output.

    Args:
        attention: of one layer.
        kept: bool ``[query heads]``, at least one.
        head_dim: rows of one head.

    Returns:
        Query heads, zero ones among them, and KV heads.
    """
    group = attention.num_key_value_groups
    plan = plan_query_heads(kept.reshape(-1, group).sum(1).tolist())
    rows = _head_rows(kept.nonzero().flatten(), head_dim)
    q, o = _slice(attention.q_proj, rows=rows), _slice(attention.o_proj, columns=rows)
    kv_rows = _head_rows(torch.tensor(plan.kv_heads, device=kept.device), head_dim)
    attention.k_proj = _slice(attention.k_proj, rows=kv_rows)
    attention.v_proj = _slice(attention.v_proj, rows=kv_rows)
    attention.q_proj = _like(q, q.in_features, plan.num_heads * head_dim)
    attention.o_proj = _like(o, plan.num_heads * head_dim, o.out_features)
    attention.q_proj.weight.data = pad_query_rows(q.weight.data, plan, head_dim)
    if q.bias is not None:
        attention.q_proj.bias.data = pad_query_rows(q.bias.data, plan, head_dim)
    attention.o_proj.weight.data = pad_output_columns(o.weight.data, plan, head_dim)
    if o.bias is not None:
        attention.o_proj.bias.data = o.bias.data
    attention.num_key_value_groups = plan.group_size
    return plan.num_heads, plan.num_kv_heads


def block_parameters(model: Any) -> int:
    """Weights of attention and FFN, the part that pruning shrinks."""
    return sum(p.numel() for p in model.model.layers.parameters())


def _head_rows(heads: Tensor, head_dim: int) -> Tensor:
    return (heads[:, None] * head_dim + torch.arange(head_dim, device=heads.device)).flatten()


def _slice(linear: nn.Linear, rows: Tensor | None = None, columns: Tensor | None = None) -> nn.Linear:
    weight = linear.weight.data
    bias = linear.bias.data if linear.bias is not None else None
    if rows is not None:
        weight = weight[rows.to(weight.device)]
        bias = bias[rows.to(bias.device)] if bias is not None else None
    if columns is not None:
        weight = weight[:, columns.to(weight.device)]
    new = _like(linear, weight.shape[1], weight.shape[0])
    new.weight.data = weight.contiguous()
    if bias is not None:
        new.bias.data = bias.contiguous()
    return new
