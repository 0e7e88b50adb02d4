"""Per-layer shapes of structurally pruned models, whatever schema (or none) describes them.

The safetensors headers are the truth: every projection's shape says how many heads and channels its layer
kept. What config.json declares (``per_layer_config``, DeciLM's or Puzzletron's ``block_configs``, Qwen's
``layer_head_num`` and ``layer_inter_size``) must agree with them.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from converters.safetensors_io import TensorSpec
from vllm_sparse.errors import FormatError, UnsupportedError
from vllm_sparse.models.families import FAMILIES, Family
from vllm_sparse.models.layer_config import read_model_shape

LAYER = re.compile(r"^model\.layers\.(\d+)\.(.+)$")
# DeciLM is a Llama with layers of its own; its remote code is not needed and never run.
_MODEL_TYPES = {"nemotron-nas": "llama", "deci": "llama"}
_GATED = ("llama", "mistral", "qwen2", "qwen3")
_WHOLE = 256


@dataclass(frozen=True)
class LayerFound:
    """One layer as its tensors show it; 0 heads or width means the block is gone.

    Attributes:
        index: number in the source.
        heads: query heads.
        kv_heads: key-value heads.
        width: feed-forward channels.
        o_bias: whether the attention output has a bias.
        down_bias: whether the feed-forward output has one.
    """

    index: int
    heads: int
    kv_heads: int
    width: int
    o_bias: bool
    down_bias: bool


@dataclass(frozen=True)
class Declared:
    """What config.json says of one layer; None where it is silent."""

    heads: int | None = None
    kv_heads: int | None = None
    width: int | None = None


def family_of(config: Mapping[str, Any]) -> Family:
    """The served family of a config.

    Raises:
        UnsupportedError: no structured class exists for it.
    """
    model_type = str(config.get("model_type"))
    name = _MODEL_TYPES.get(model_type, model_type)
    if name not in _GATED:
        raise UnsupportedError(
            f"structured models of type {model_type!r} are not converted; known: "
            f"{', '.join((*_GATED, *_MODEL_TYPES))}"
        )
    return FAMILIES[name]


def head_dim_of(config: Mapping[str, Any]) -> int:
    """Explicit ``head_dim``, or hidden size over the (unpruned) number of heads.

    Raises:
        FormatError: neither gives a whole number.
    """
    explicit = config.get("head_dim")
    if type(explicit) is int and explicit > 0:
        return explicit
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if type(hidden) is int and type(heads) is int and hidden > 0 and heads > 0 and hidden % heads == 0:
        return hidden // heads
    raise FormatError(
        f"config.json has no head_dim, and hidden_size {hidden!r} over num_attention_heads {heads!r} does "
        "not give it; "
        "add the unpruned model's head_dim"
    )


def found_layers(tensors: Mapping[str, TensorSpec], config: Mapping[str, Any]) -> list[LayerFound]:
    """Every layer that has tensors, by number.

    Raises:
        FormatError: a block is incomplete, or shapes within a layer contradict each other.
    """
    layers: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, spec in tensors.items():
        match = LAYER.match(name)
        if match:
            layers.setdefault(int(match[1]), {})[match[2]] = spec.shape
    if not layers:
        raise FormatError("no tensor is called model.layers.<number>.*; its layers cannot be told apart")
    head_dim, hidden = head_dim_of(config), config.get("hidden_size")
    return [_layer(index, layers[index], head_dim, hidden) for index in sorted(layers)]


def _block(where: str, shapes: Mapping[str, tuple[int, ...]], names: Sequence[str]) -> bool:
    """Whether a block is there; incomplete ones are an error."""
    present = [name for name in names if f"{name}.weight" in shapes]
    if present and len(present) < len(names):
        missing = next(name for name in names if name not in present)
        raise FormatError(f"{where} has {present[0]}.weight but no {missing}.weight")
    return bool(present)


def _layer(index: int, shapes: Mapping[str, tuple[int, ...]], head_dim: int, hidden: Any) -> LayerFound:
    where = f"layer {index}"
    attention = [f"self_attn.{part}_proj" for part in "qkvo"]
    ffn = [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    replaced = [name for name in shapes if name.startswith(("self_attn.linear_attn", "mlp.linear_mlp"))]
    if replaced:
        raise UnsupportedError(
            f"{where}: {replaced[0]} replaces a block by a linear; such layers are not served"
        )
    heads = kv_heads = width = 0
    if _block(where, shapes, attention):
        q, k, v, o = (shapes[f"{name}.weight"] for name in attention)
        if q[0] % head_dim or k[0] % head_dim or k != v or o[1] != q[0] or {q[1], k[1], o[0]} != {hidden}:
            raise FormatError(
                f"{where}: attention shapes q {list(q)}, k {list(k)}, v {list(v)}, o {list(o)} do not fit "
                "together with "
                f"head_dim {head_dim} and hidden_size {hidden}"
            )
        heads, kv_heads = q[0] // head_dim, k[0] // head_dim
    if _block(where, shapes, ffn):
        gate, up, down = (shapes[f"{name}.weight"] for name in ffn)
        if gate != up or down != gate[::-1] or gate[1] != hidden:
            raise FormatError(
                f"{where}: feed-forward shapes gate {list(gate)}, up {list(up)}, down {list(down)} do not "
                "fit together "
                f"with hidden_size {hidden}"
            )
        width = gate[0]
    extra_o = "self_attn.o_proj.bias" in shapes and "self_attn.q_proj.bias" not in shapes
    extra_down = "mlp.down_proj.bias" in shapes and "mlp.up_proj.bias" not in shapes
    return LayerFound(index, heads, kv_heads, width, extra_o, extra_down)


def declared_layers(config: Mapping[str, Any]) -> list[tuple[str, list[Declared]]]:
    """Every schema in config.json that describes layers, parsed: ``(name, layers)``.

    Raises:
        FormatError: a malformed schema.
        UnsupportedError: blocks of kinds that are not served.
    """
    schemas = []
    if config.get("per_layer_config"):
        schemas.append(("per_layer_config", _from_per_layer_config(config)))
    if config.get("block_configs"):
        schemas.append(("block_configs", _from_blocks(config)))
    if config.get("layer_head_num") or config.get("layer_inter_size"):
        schemas.append(("layer_head_num and layer_inter_size", _from_lists(config)))
    return schemas


def _from_per_layer_config(config: Mapping[str, Any]) -> list[Declared]:
    shape = read_model_shape(config)
    return [
        Declared(
            layer.attention.num_heads if layer.attention else 0,
            layer.attention.num_kv_heads if layer.attention else 0,
            getattr(layer.ffn, "intermediate_size", 0) if layer.ffn else 0,
        )
        for layer in shape.layers
    ]


def _from_lists(config: Mapping[str, Any]) -> list[Declared]:
    lists = {key: config.get(key) for key in ("layer_head_num", "layer_inter_size")}
    lengths = set()
    for key, value in lists.items():
        if value is None:
            continue
        if not isinstance(value, list) or any(type(item) is not int or item < 0 for item in value):
            raise FormatError(f"config.json: {key} must be a list of whole numbers")
        lengths.add(len(value))
    if len(lengths) != 1:
        raise FormatError("config.json: layer_head_num and layer_inter_size must have one number per layer")
    count = lengths.pop()
    heads, widths = lists["layer_head_num"] or [None] * count, lists["layer_inter_size"] or [None] * count
    return [Declared(heads=head, width=width) for head, width in zip(heads, widths, strict=True)]


def _from_blocks(config: Mapping[str, Any]) -> list[Declared]:
    blocks = config["block_configs"]
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        raise FormatError("config.json: block_configs must be a list of objects")
    return [_from_block(index, block, config) for index, block in enumerate(blocks)]


def _from_block(index: int, block: Mapping[str, Any], config: Mapping[str, Any]) -> Declared:
    where = f"config.json: block_configs[{index}]"
    if "subblock_configs" in block:
        return _from_subblocks(where, block["subblock_configs"])
    attention, ffn = block.get("attention") or {}, block.get("ffn") or {}
    if not isinstance(attention, dict) or not isinstance(ffn, dict):
        raise FormatError(f"{where}: attention and ffn must be objects")
    for part, keys in (
        (attention, ("replace_with_linear", "mamba", "llama4")),
        (ffn, ("replace_with_linear", "moe")),
    ):
        for key in keys:
            if part.get(key):
                raise UnsupportedError(f"{where}: {key} is not served by this plugin")
    return Declared(*_block_heads(where, attention, config), _block_width(where, ffn, config))


def _block_heads(
    where: str, attention: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[int | None, int | None]:
    if attention.get("no_op"):
        return 0, 0
    heads = config.get("num_attention_heads")
    kv_heads = attention.get("num_key_value_heads")
    group = attention.get("n_heads_in_group")
    if group is not None:
        if type(group) is not int or type(heads) is not int or group <= 0 or heads % group:
            raise FormatError(f"{where}: n_heads_in_group {group!r} does not divide {heads!r} heads")
        kv_heads = heads // group
    if kv_heads is not None and (type(kv_heads) is not int or kv_heads <= 0):
        raise FormatError(f"{where}: num_key_value_heads is {kv_heads!r}")
    return (heads if type(heads) is int else None), kv_heads


def _block_width(where: str, ffn: Mapping[str, Any], config: Mapping[str, Any]) -> int | None:
    if ffn.get("no_op"):
        return 0
    width, factor = ffn.get("intermediate_size"), ffn.get("ffn_mult")
    if width is None and factor is not None:
        hidden = config.get("hidden_size")
        if not isinstance(factor, int | float) or not 0 < factor < 1000 or type(hidden) is not int:
            raise FormatError(f"{where}: ffn_mult is {factor!r}")
        # DeciLM rounds two thirds of the multiple up to whole tiles.
        width = -(-int(2 * factor * hidden / 3) // _WHOLE) * _WHOLE
    if width is not None and (type(width) is not int or width <= 0):
        raise FormatError(f"{where}: intermediate_size is {width!r}")
    return width


def _from_subblocks(where: str, blocks: Any) -> Declared:
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        raise FormatError(f"{where}: subblock_configs must be a list of objects")
    heads: int | None = 0
    kv_heads: int | None = 0
    width: int | None = 0
    for block in blocks:
        kind = block.get("kind")
        if kind == "attention":
            heads, kv_heads = block.get("num_query_heads"), block.get("num_kv_heads")
        elif kind == "ffn":
            width = block.get("intermediate_size")
        else:
            raise UnsupportedError(
                f"{where}: a sub-block of kind {kind!r} is not served; known: attention, ffn"
            )
    for value in (heads, kv_heads, width):
        if value is not None and (type(value) is not int or value < 0):
            raise FormatError(f"{where}: {value!r} is not a whole number")
    return Declared(heads, kv_heads, width)


def check_declared(schema: str, declared: Sequence[Declared], found: Sequence[LayerFound]) -> None:
    """A schema must say what the tensors show.

    Raises:
        FormatError: naming the first layer where they differ.
    """
    by_index = {layer.index: layer for layer in found}
    if any(index >= len(declared) for index in by_index):
        raise FormatError(
            f"config.json: {schema} describes {len(declared)} layers, the weights have layer {max(by_index)}"
        )
    for index, said in enumerate(declared):
        layer = by_index.get(index, LayerFound(index, 0, 0, 0, False, False))
        for what in ("heads", "kv_heads", "width"):
            value, actual = getattr(said, what), getattr(layer, what)
            if value is not None and value != actual:
                raise FormatError(
                    f"config.json: {schema} gives layer {index} {what.replace('_', ' ')} {value}, its "
                    "tensors show "
                    f"{actual}; config and weights are of different models"
                )
