"""What config.json says of each layer's shape, in every schema that was found in the wild.

``per_layer_config`` (ours and Hugging Face's), ``block_configs`` (DeciLM's, and both of Puzzletron's),
``layer_head_num`` and ``layer_inter_size`` (Qwen). None of them is believed: :func:`check_declared` holds
them against the tensors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from converters.readers.structure import LayerFound
from vllm_sparse.errors import FormatError, UnsupportedError
from vllm_sparse.models.layer_config import (
    AttentionShape,
    FfnShape,
    LatentShape,
    MoeShape,
    read_model_shape,
)

# Feed-forward widths of DeciLM are whole multiples of this.
_WHOLE = 256
# Puzzletron's blocks of experts, in the words of its revisions and families.
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_EXPERT_WIDTH = ("expert_intermediate_dim", "expert_intermediate_size")
_SHARED_WIDTH = ("shared_expert_intermediate_dim",)
_TOP_K = ("num_experts_per_tok",)
# A schema of this project's input side: query heads that each KV head kept, in order.
GROUP_KEY = "query_heads_per_kv_head"


@dataclass(frozen=True)
class Declared:
    """What config.json says of one layer; None where it is silent."""

    heads: int | None = None
    kv_heads: int | None = None
    width: int | None = None
    experts: int | None = None
    expert_width: int | None = None
    shared_width: int | None = None
    top_k: int | None = None


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


def group_sizes(config: Mapping[str, Any]) -> dict[int, tuple[int, ...]]:
    """Layers whose KV heads kept unequal numbers of query heads: layer -> query heads of each KV head.

    Raises:
        FormatError: not a list of whole numbers.
    """
    entries = config.get("per_layer_config")
    found: dict[int, tuple[int, ...]] = {}
    for key, entry in entries.items() if isinstance(entries, Mapping) else ():
        if not isinstance(entry, Mapping) or GROUP_KEY not in entry:
            continue
        kept = entry[GROUP_KEY]
        if not isinstance(kept, list) or not kept or any(type(n) is not int or n < 0 for n in kept):
            raise FormatError(
                f"config.json: per_layer_config[{key!r}] has {GROUP_KEY} {kept!r}; a list is needed, "
                "with the number of query heads that each KV head kept"
            )
        found[int(key)] = tuple(kept)
    return found


def _from_per_layer_config(config: Mapping[str, Any]) -> list[Declared]:
    if not isinstance(config["per_layer_config"], Mapping):
        raise FormatError("config.json: per_layer_config must be an object, layer numbers to values")
    uneven = group_sizes(config)
    plain = {
        key: {name: value for name, value in entry.items() if name != GROUP_KEY}
        if isinstance(entry, Mapping)
        else entry
        for key, entry in config["per_layer_config"].items()
    }
    return [
        Declared(
            None if layer.index in uneven else (layer.attention.num_heads if layer.attention else 0),
            None if layer.index in uneven else _kv_heads(layer.attention),
            layer.ffn.intermediate_size if isinstance(layer.ffn, FfnShape) else 0,
            layer.ffn.num_experts if isinstance(layer.ffn, MoeShape) else 0,
        )
        for layer in read_model_shape({**config, "per_layer_config": plain}).layers
    ]


def _kv_heads(attention: AttentionShape | None) -> int | None:
    if isinstance(attention, LatentShape):
        return None
    return attention.num_kv_heads if attention else 0


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
    if block.get("parallel_blocks"):
        raise UnsupportedError(f"{where}: parallel_blocks are not served by this plugin")
    attention, ffn = block.get("attention") or {}, block.get("ffn") or {}
    if not isinstance(attention, dict) or not isinstance(ffn, dict):
        raise FormatError(f"{where}: attention and ffn must be objects")
    for part, keys in (
        (attention, ("replace_with_linear", "mamba", "llama4")),
        (ffn, ("replace_with_linear",)),
    ):
        for key in keys:
            if part.get(key):
                raise UnsupportedError(f"{where}: {key} is not served by this plugin")
    heads, kv_heads = _block_heads(where, attention, config)
    if ffn.get("moe") and not ffn.get("no_op"):
        return Declared(heads, kv_heads, 0, **_block_experts(where, ffn["moe"]))
    return Declared(heads, kv_heads, _block_width(where, ffn, config))


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


def _block_experts(where: str, moe: Any) -> dict[str, int | None]:
    """Number, widths and choice of experts; only their number has to be there."""
    if not isinstance(moe, Mapping):
        raise FormatError(f"{where}: moe must be an object")
    found: dict[str, int | None] = {}
    for what, keys in (
        ("experts", _EXPERTS),
        ("expert_width", _EXPERT_WIDTH),
        ("shared_width", _SHARED_WIDTH),
        ("top_k", _TOP_K),
    ):
        values = {moe[key] for key in keys if type(moe.get(key)) is int and moe[key] >= 0}
        if len(values) > 1 or (what == "experts" and not any(values)):
            raise FormatError(f"{where}: the block of experts needs one positive {' or '.join(keys)}")
        found[what] = next(iter(values), None)
    return found


def _from_subblocks(where: str, blocks: Any) -> Declared:
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        raise FormatError(f"{where}: subblock_configs must be a list of objects")
    heads: int | None = 0
    kv_heads: int | None = 0
    width: int | None = 0
    experts: dict[str, int | None] = {}
    for block in blocks:
        kind = block.get("kind")
        if kind == "attention":
            heads, kv_heads = block.get("num_query_heads"), block.get("num_kv_heads")
        elif kind == "ffn":
            width = block.get("intermediate_size")
        elif kind == "moe":
            experts = _block_experts(where, block)
        else:
            raise UnsupportedError(
                f"{where}: a sub-block of kind {kind!r} is not served; known: attention, ffn, moe"
            )
    for value in (heads, kv_heads, width):
        if value is not None and (type(value) is not int or value < 0):
            raise FormatError(f"{where}: {value!r} is not a whole number")
    return Declared(heads, kv_heads, width, **experts)


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
        actuals = {"heads": layer.heads, "kv_heads": layer.kv_heads, "width": layer.width}
        experts = layer.experts
        actuals["experts"] = len(experts.ids) if experts else 0
        actuals["expert_width"] = experts.width if experts else 0
        actuals["shared_width"] = experts.shared_width if experts else 0
        for what, actual in actuals.items():
            value = getattr(said, what)
            if value is not None and value != actual:
                raise FormatError(
                    f"config.json: {schema} gives layer {index} {what.replace('_', ' ')} {value}, its "
                    "tensors show "
                    f"{actual}; config and weights are of different models"
                )
