"""Per-layer shapes of structurally pruned models, from the safetensors headers.

The headers are the truth: every projection's shape says how many heads, channels and experts its layer kept.
What config.json declares (:mod:`converters.readers.declared`) must agree with them.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from converters.readers.experts import ExpertsFound, Shapes, find_experts
from converters.safetensors_io import TensorSpec
from vllm_sparse.errors import FormatError, UnsupportedError
from vllm_sparse.models.families import FAMILIES, Family
from vllm_sparse.models.padding import QueryHeadPlan, plan_query_heads

LAYER = re.compile(r"^model\.layers\.(\d+)\.(.+)$")
# DeciLM is a Llama with layers of its own; its remote code is not needed and never run.
_MODEL_TYPES = {"nemotron-nas": "llama", "deci": "llama"}
_KNOWN = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "mixtral",
    "deepseek",
    "deepseek_v2",
    "deepseek_v3",
)


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
        experts: in place of a width.
        groups: how query heads that KV heads share unequally are padded; None where they need not be.
    """

    index: int
    heads: int
    kv_heads: int
    width: int
    o_bias: bool
    down_bias: bool
    experts: ExpertsFound | None = None
    groups: QueryHeadPlan | None = None

    @property
    def has_ffn(self) -> bool:
        """Whether there is a feed-forward block, dense or of experts."""
        return bool(self.width or self.experts)


def family_of(config: Mapping[str, Any]) -> Family:
    """The served family of a config.

    Raises:
        UnsupportedError: no structured class exists for it.
    """
    model_type = str(config.get("model_type"))
    name = _MODEL_TYPES.get(model_type, model_type)
    if name not in _KNOWN:
        raise UnsupportedError(
            f"structured models of type {model_type!r} are not converted; known: "
            f"{', '.join((*_KNOWN, *_MODEL_TYPES))}"
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


def found_layers(
    tensors: Mapping[str, TensorSpec],
    config: Mapping[str, Any],
    groups: Mapping[int, Sequence[int]] | None = None,
) -> list[LayerFound]:
    """Every layer that has tensors, by number.

    Args:
        tensors: of the checkpoint.
        config: its config.json.
        groups: query heads that each KV head kept, for layers in which they are unequal.

    Raises:
        FormatError: a block is incomplete, or shapes within a layer contradict each other.
        UnsupportedError: blocks of kinds that are not served.
    """
    refuse_sliced_residual(tensors)
    layers: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, spec in tensors.items():
        match = LAYER.match(name)
        if match:
            layers.setdefault(int(match[1]), {})[match[2]] = spec.shape
    if not layers:
        raise FormatError("no tensor is called model.layers.<number>.*; its layers cannot be told apart")
    _refuse_guessed_head_dim(layers, config)
    family = family_of(config)
    return [
        _layer(index, layers[index], config, family, (groups or {}).get(index)) for index in sorted(layers)
    ]


def _refuse_guessed_head_dim(layers: Mapping[int, Shapes], config: Mapping[str, Any]) -> None:
    """Without ``head_dim``, hidden size over heads is only right if ``num_attention_heads`` is unpruned.

    Torch-Pruning writes the pruned number there, FLAP leaves the old one; equal layers look the same.
    """
    rows = {
        shapes["self_attn.q_proj.weight"][0]
        for shapes in layers.values()
        if "self_attn.q_proj.weight" in shapes
    }
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if config.get("head_dim") is not None or len(rows) != 1 or type(heads) is not int or heads <= 0:
        return
    (found,) = rows
    if found != hidden and found % heads == 0:
        raise FormatError(
            f"config.json has no head_dim and {heads} attention heads, and every layer has {found} query "
            f"rows. If {heads} is the pruned number, head_dim is {found // heads}; if the unpruned one, "
            f"head_dim is hidden_size / {heads}. Add the right one to config.json."
        )


def refuse_sliced_residual(names: Iterable[str]) -> None:
    """SliceGPT (arXiv:2401.15024) rotates and cuts the residual stream itself.

    Raises:
        UnsupportedError: one of the tensor names is such a projection.
    """
    for name in names:
        match = LAYER.match(name)
        if match and name.endswith("_shortcut_Q"):
            raise UnsupportedError(
                f"layer {match[1]}: {match[2]} projects the residual stream between widths that differ by "
                "layer (SliceGPT). vLLM and this plugin keep one width for all layers: fused residual "
                "norms, pipeline stages and the output head share it. Prune heads, channels or layers."
            )


def _block(where: str, shapes: Shapes, names: Sequence[str]) -> bool:
    """Whether a block is there; incomplete ones are an error."""
    present = [name for name in names if f"{name}.weight" in shapes]
    if present and len(present) < len(names):
        missing = next(name for name in names if name not in present)
        raise FormatError(f"{where} has {present[0]}.weight but no {missing}.weight")
    return bool(present)


def _layer(
    index: int, shapes: Shapes, config: Mapping[str, Any], family: Family, kept: Sequence[int] | None
) -> LayerFound:
    where, hidden = f"layer {index}", config.get("hidden_size")
    replaced = [name for name in shapes if name.startswith(("self_attn.linear_attn", "mlp.linear_mlp"))]
    if replaced:
        raise UnsupportedError(
            f"{where}: {replaced[0]} replaces a block by a linear; such layers are not served"
        )
    heads = kv_heads = 0
    groups = None
    if family.latent_attention:
        heads = kv_heads = _latent_heads(where, shapes, config)
    elif _block(where, shapes, [f"self_attn.{part}_proj" for part in "qkvo"]):
        heads, kv_heads = _heads(where, shapes, head_dim_of(config), hidden, kept)
        if kept is not None:
            groups = plan_query_heads(kept)
            heads, kv_heads = groups.num_heads, groups.num_kv_heads
    experts = (
        find_experts(where, shapes, family, hidden) if family.experts_keys and type(hidden) is int else None
    )
    width = 0 if experts else _dense_width(where, shapes, hidden)
    extra_o = "self_attn.o_proj.bias" in shapes and "self_attn.q_proj.bias" not in shapes
    extra_down = "mlp.down_proj.bias" in shapes and "mlp.up_proj.bias" not in shapes
    return LayerFound(index, heads, kv_heads, width, extra_o, extra_down, experts, groups)


def _heads(
    where: str, shapes: Shapes, head_dim: int, hidden: Any, kept: Sequence[int] | None
) -> tuple[int, int]:
    q, k, v, o = (shapes[f"self_attn.{part}_proj.weight"] for part in "qkvo")
    if q[0] % head_dim or k[0] % head_dim or k != v or o[1] != q[0] or {q[1], k[1], o[0]} != {hidden}:
        raise FormatError(
            f"{where}: attention shapes q {list(q)}, k {list(k)}, v {list(v)}, o {list(o)} do not fit "
            "together with "
            f"head_dim {head_dim} and hidden_size {hidden}"
        )
    heads, kv_heads = q[0] // head_dim, k[0] // head_dim
    if kept is not None and (sum(kept), len(kept)) != (heads, kv_heads):
        raise FormatError(
            f"{where}: query heads per KV head are {list(kept)}, its tensors show {heads} query and "
            f"{kv_heads} KV heads"
        )
    return heads, kv_heads


def _latent_heads(where: str, shapes: Shapes, config: Mapping[str, Any]) -> int:
    direct = "self_attn.q_proj.weight" in shapes
    names = ["q_proj"] if direct else ["q_a_proj", "q_b_proj"]
    if not _block(
        where, shapes, [f"self_attn.{n}" for n in (*names, "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")]
    ):
        return 0
    value = config.get("v_head_dim")
    if type(value) is not int or value <= 0 or shapes["self_attn.o_proj.weight"][1] % value:
        raise FormatError(
            f"{where}: v_head_dim {value!r} does not divide the output projection "
            f"{list(shapes['self_attn.o_proj.weight'])} into heads"
        )
    return shapes["self_attn.o_proj.weight"][1] // value


def _dense_width(where: str, shapes: Shapes, hidden: Any) -> int:
    ffn = [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    if not _block(where, shapes, ffn):
        return 0
    gate, up, down = (shapes[f"{name}.weight"] for name in ffn)
    if gate != up or down != gate[::-1] or gate[1] != hidden:
        raise FormatError(
            f"{where}: feed-forward shapes gate {list(gate)}, up {list(up)}, down {list(down)} do not "
            "fit together "
            f"with hidden_size {hidden}"
        )
    return gate[0]
