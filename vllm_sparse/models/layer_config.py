"""The shape of every decoder layer, read from config.json and validated before anything is built.

The form on disk is Hugging Face's ``per_layer_config``: a sparse mapping from the layer index
(a string, zero-based) to the values in which that layer differs from the global ones, for example::

    {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 512,
     "allow_global_per_layer_attribute_access": true,
     "per_layer_config": {"1": {"num_attention_heads": 4, "intermediate_size": 384},
                          "2": {"skip": ["attention"]}}}

``skip`` knows the words ``attention`` and ``mlp``. Two keys of our own, ``o_proj_bias`` and
``down_proj_bias`` (booleans, global or per layer), say that a layer has a bias on the projections
back into the residual stream and nowhere else, which is what FLAP adds (arXiv:2312.11983).
A third, ``shared_expert_intermediate_size``, is the width of DeepSeek's shared experts together where it is
not ``n_shared_experts`` times that of a routed one.

The module needs neither torch nor vLLM.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_sparse.errors import FormatError, UnsupportedError
from vllm_sparse.models.families import FAMILIES, Family

SKIP_WORDS = ("attention", "mlp")
O_PROJ_BIAS = "o_proj_bias"
DOWN_PROJ_BIAS = "down_proj_bias"
SHARED_WIDTH = "shared_expert_intermediate_size"
ACCESS_FLAG = "allow_global_per_layer_attribute_access"


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Attention of one layer: query heads, KV heads, their dimension, which biases exist."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    o_bias: bool = False

    def cached_per_token(self, ranks: int = 1) -> int:
        """Numbers that one token adds to the KV cache of one of ``ranks`` tensor-parallel ranks."""
        return 2 * max(1, self.num_kv_heads // ranks) * self.head_dim


@dataclass(frozen=True, slots=True)
class LatentShape(AttentionShape):
    """DeepSeek's latent attention: every head reads one cached vector of ``head_dim`` numbers.

    ``num_kv_heads`` is 1 and ``head_dim`` the latent with its rotary part; only ``num_heads`` can be pruned.

    Attributes:
        q_rank: Rank of the query's low-rank projection; None where queries are projected directly.
        kv_rank: Width of the latent without its rotary part.
        qk_nope_dim: Query and key dimensions of a head without rotary positions.
        v_dim: Value dimensions of a head.
    """

    q_rank: int | None = None
    kv_rank: int = 0
    qk_nope_dim: int = 0
    v_dim: int = 0

    @property
    def rope_dim(self) -> int:
        """Dimensions with rotary positions, shared by all heads' keys."""
        return self.head_dim - self.kv_rank

    def cached_per_token(self, ranks: int = 1) -> int:
        """The latent, which every rank holds whole."""
        del ranks
        return self.head_dim


@dataclass(frozen=True, slots=True)
class FfnShape:
    """Dense feed-forward block: ``up_bias`` covers gate and up, ``down_bias`` the way back."""

    intermediate_size: int
    up_bias: bool = False
    down_bias: bool = False


@dataclass(frozen=True, slots=True)
class MoeShape:
    """Mixture of experts: routed experts, how many a token takes, widths of one and of the shared ones.

    ``correction_bias`` says that the router adds a number per expert to the scores it chooses by.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    shared_width: int = 0
    correction_bias: bool = False


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One decoder layer; None stands for a skipped sub-layer."""

    index: int
    attention: AttentionShape | None
    ffn: FfnShape | MoeShape | None


@dataclass(frozen=True, slots=True)
class ModelShape:
    """All decoder layers of one model.

    Attributes:
        family: Names and constants of the model family.
        hidden_size: Width of the residual stream.
        layers: One shape per layer, in order.
    """

    family: Family
    hidden_size: int
    layers: tuple[LayerShape, ...]

    def attention_layers(self) -> Iterator[tuple[int, AttentionShape]]:
        """Yield ``(layer index, attention)`` of every layer that has attention."""
        for layer in self.layers:
            if layer.attention is not None:
                yield layer.index, layer.attention

    def kv_bytes_per_token(self, itemsize: int, tensor_parallel_size: int = 1) -> int:
        """Bytes of keys and values that one token occupies on one tensor-parallel rank.

        Args:
            itemsize: Bytes of one cached number, 2 for bf16.
            tensor_parallel_size: Ranks; fewer KV heads than ranks are replicated.
        """
        return itemsize * sum(
            attention.cached_per_token(tensor_parallel_size) for _, attention in self.attention_layers()
        )

    def summary(self) -> str:
        """One line for logs: how many layers, which range each size spans, what is missing."""
        attention = [a for _, a in self.attention_layers()]
        ffns = [layer.ffn for layer in self.layers if layer.ffn is not None]
        experts = [ffn for ffn in ffns if isinstance(ffn, MoeShape)]
        parts = [
            _span("query heads", [a.num_heads for a in attention]),
            _span("KV heads", [a.num_kv_heads for a in attention]),
            _span("feed-forward width", [f.intermediate_size for f in ffns if isinstance(f, FfnShape)]),
            _span("experts", [e.num_experts for e in experts]),
            _span("expert width", [e.intermediate_size for e in experts]),
        ]
        for what, count in (("attention", len(attention)), ("feed-forward block", len(ffns))):
            if count < len(self.layers):
                parts.append(f"{len(self.layers) - count} without {what}")
        return f"{len(self.layers)} {self.family.model_type} layers: " + ", ".join(filter(None, parts))


def _span(what: str, values: list[int]) -> str:
    if not values:
        return ""
    low, high = min(values), max(values)
    return f"{what} {low}" if low == high else f"{what} {low} to {high}"


def read_model_shape(config: Mapping[str, Any]) -> ModelShape:
    """Parse and validate a config.json (or ``PretrainedConfig.to_dict()``) into layer shapes.

    Args:
        config: The raw mapping. Without ``per_layer_config`` all layers are equal.

    Returns:
        The shape of every layer.

    Raises:
        FormatError: A value is missing, of the wrong type, or contradicts another one.
        UnsupportedError: The family, or a feature of it, is not supported.
    """
    if not isinstance(config, Mapping):
        raise FormatError(f"config.json: a JSON object is needed; found {type(config).__name__}.")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UnsupportedError(
            f"config.json: model_type {model_type!r} has no structured model class. "
            f"Supported: {', '.join(sorted(FAMILIES))}."
        )
    family = FAMILIES[model_type]
    if config.get("dual_chunk_attention_config"):
        raise UnsupportedError(
            "config.json: dual_chunk_attention_config is not supported for structurally pruned models. "
            "Remove it to serve the model without dual chunk attention."
        )
    reader = _Reader(config, "config.json")
    num_layers = reader.positive(family.layers_keys)
    overrides = _layer_overrides(config, family, num_layers)
    hidden_size = reader.positive(family.hidden_keys)
    layers = tuple(
        _read_layer(config, family, index, hidden_size, overrides.get(index, {}))
        for index in range(num_layers)
    )
    if all(layer.attention is None and layer.ffn is None for layer in layers):
        raise FormatError("config.json: every layer skips both attention and mlp; nothing is left to serve.")
    return ModelShape(family, hidden_size, layers)


class _Reader:
    """Typed look-ups that first ask the layer's own values, then the global ones."""

    def __init__(self, config: Mapping[str, Any], where: str, own: Mapping[str, Any] | None = None) -> None:
        self.where = where
        self._maps = (own or {}, config)

    def value(self, keys: tuple[str, ...]) -> Any:
        for mapping in self._maps:
            for key in keys:
                if mapping.get(key) is not None:
                    return mapping[key]
        return None

    def positive(self, keys: tuple[str, ...], default: int | None = None, hint: str = "") -> int:
        value = self.value(keys)
        if value is None:
            value = default
        if value is None:
            raise FormatError(f"{self.where}: {keys[0]} is missing. Add it to config.json.")
        if isinstance(value, bool) or not isinstance(value, int):
            raise FormatError(f"{self.where}: {keys[0]} is {value!r}; a positive integer is needed.")
        if value <= 0:
            raise FormatError(f"{self.where}: {keys[0]} is {value}; it must be at least 1.{hint}")
        return value

    def flag(self, key: str | None, default: bool) -> bool:
        if key is None:
            return default
        value = self.value((key,))
        if value is None:
            return default
        if not isinstance(value, bool):
            raise FormatError(f"{self.where}: {key} is {value!r}; true or false is needed.")
        return value


def _allowed_keys(family: Family) -> tuple[str, ...]:
    """Keys that a layer of this family may set for itself."""
    keys = [*family.heads_keys, family.kv_heads_key, family.ffn_key]
    keys += [None if family.latent_attention else "head_dim"]
    keys += [SHARED_WIDTH if family.shared_experts else None]
    keys += [*family.experts_keys, family.expert_width_key]
    keys += ["num_experts_per_tok" if family.experts_keys else None]
    keys += [family.qkv_bias_key, family.o_bias_key, family.mlp_bias_key]
    keys += [O_PROJ_BIAS, DOWN_PROJ_BIAS, "skip"]
    return tuple(dict.fromkeys(key for key in keys if key is not None))


def _layer_overrides(
    config: Mapping[str, Any], family: Family, num_layers: int
) -> dict[int, Mapping[str, Any]]:
    raw = config.get("per_layer_config")
    if raw is None:
        return {}
    if not isinstance(raw, Mapping):
        raise FormatError(
            f"config.json: per_layer_config is a {type(raw).__name__}; "
            'a mapping from layer index to values is needed, as in {"3": {"intermediate_size": 1024}}.'
        )
    allowed = _allowed_keys(family)
    overrides: dict[int, Mapping[str, Any]] = {}
    for key, values in raw.items():
        index = _layer_index(key, num_layers)
        if index in overrides:
            raise FormatError(f"config.json: per_layer_config names layer {index} twice. Merge the entries.")
        if not isinstance(values, Mapping):
            raise FormatError(f"config.json: per_layer_config[{key!r}] is {values!r}; a mapping is needed.")
        unknown = sorted(set(values) - set(allowed))
        if unknown:
            raise FormatError(
                f"config.json: per_layer_config[{key!r}] sets {', '.join(unknown)}, which cannot vary "
                f"by layer in a {family.model_type} model. Allowed: {', '.join(allowed)}."
                f"{_latent_hint(family)}"
            )
        empty = sorted(name for name, value in values.items() if value is None)
        if empty:
            raise FormatError(
                f"config.json: per_layer_config[{key!r}] sets {', '.join(empty)} to null. "
                'Give a value, leave the key out to keep the global one, or mark the part under "skip".'
            )
        overrides[index] = values
    for name, usual in (
        (O_PROJ_BIAS, "false"),
        (DOWN_PROJ_BIAS, "false"),
        (SHARED_WIDTH, "the other layers'"),
    ):
        setting = [values for values in overrides.values() if name in values]
        if setting and len(setting) < num_layers and config.get(name) is None:
            raise FormatError(
                f"config.json: some layers set {name} and the model does not, so Transformers refuses the "
                f'config. Add "{name}": {usual} beside per_layer_config.'
            )
    if any(set(values) - {"skip"} for values in overrides.values()) and config.get(ACCESS_FLAG) is not True:
        raise FormatError(
            f"config.json: per_layer_config is set but {ACCESS_FLAG} is not true, so Transformers refuses "
            f'to read the global values. Add "{ACCESS_FLAG}": true.'
        )
    return overrides


def _latent_hint(family: Family) -> str:
    if not family.latent_attention:
        return ""
    return (
        " All heads of all layers read one cached latent of the same size: there are no KV heads to prune, "
        "and its dimensions belong to the whole model."
    )


def _layer_index(key: object, num_layers: int) -> int:
    text = str(key)
    # int() also takes "1_0", " 1" and other scripts' digits; a key is plain decimal, zeros allowed.
    if not (text.isascii() and text.isdigit()) or not 0 <= int(text) < num_layers:
        raise FormatError(
            f"config.json: per_layer_config has the key {key!r}; the model has layers 0 to {num_layers - 1}. "
            "Renumber the layers that were kept and lower num_hidden_layers for those dropped."
        )
    return int(text)


def _skipped(values: Mapping[str, Any], where: str) -> frozenset[str]:
    raw = values.get("skip", [])
    if not isinstance(raw, list | tuple) or not all(isinstance(word, str) for word in raw):
        raise FormatError(
            f"{where}: skip is {raw!r}; a list is needed, with the words {' and '.join(SKIP_WORDS)}."
        )
    unknown = sorted(set(raw) - set(SKIP_WORDS))
    if unknown:
        raise FormatError(
            f"{where}: skip names {', '.join(map(repr, unknown))}; allowed are "
            f"{', '.join(map(repr, SKIP_WORDS))}. A layer dropped whole is renumbered away instead."
        )
    return frozenset(raw)


def _read_layer(
    config: Mapping[str, Any], family: Family, index: int, hidden_size: int, values: Mapping[str, Any]
) -> LayerShape:
    where = f"config.json: layer {index}"
    skipped = _skipped(values, where)
    reader = _Reader(config, where, values)
    attention = None
    if "attention" not in skipped:
        attention = (
            _read_latent(reader, family)
            if family.latent_attention
            else _read_attention(reader, family, hidden_size, values)
        )
    ffn: FfnShape | MoeShape | None = None
    if "mlp" not in skipped:
        ffn = _read_ffn(reader, config, family, index, hidden_size)
    return LayerShape(index, attention, ffn)


def _read_attention(
    reader: _Reader, family: Family, hidden_size: int, values: Mapping[str, Any]
) -> AttentionShape:
    hint = ' Mark a layer without attention as "skip": ["attention"].'
    heads = reader.positive(family.heads_keys, hint=hint)
    kv_heads = heads
    if family.kv_heads_key is not None:
        kv_heads = reader.positive((family.kv_heads_key,), default=heads, hint=hint)
    if heads % kv_heads:
        raise FormatError(
            f"{reader.where}: {heads} query heads do not divide into {kv_heads} KV heads. "
            f"Use a multiple of {kv_heads} query heads, padding the smaller groups with zero heads "
            "(vllm_sparse.models.padding), or prune the same number in every group."
        )
    if reader.value(("head_dim",)) is None:
        pruned = any(values.get(key) is not None for key in family.heads_keys)
        if pruned or hidden_size % heads:
            raise FormatError(
                f"{reader.where}: head_dim is missing, and {hidden_size} / {heads} heads does not give it "
                "once heads are pruned. Add the original head_dim to config.json."
            )
    head_dim = reader.positive(("head_dim",), default=hidden_size // heads)
    extra = reader.flag(O_PROJ_BIAS, default=False)
    return AttentionShape(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        qkv_bias=reader.flag(family.qkv_bias_key, family.qkv_bias),
        o_bias=reader.flag(family.o_bias_key, family.o_bias) or extra,
    )


def _read_latent(reader: _Reader, family: Family) -> LatentShape:
    hint = ' Mark a layer without attention as "skip": ["attention"].'
    kv_rank = reader.positive(("kv_lora_rank",))
    q_rank = reader.positive(("q_lora_rank",)) if reader.value(("q_lora_rank",)) is not None else None
    return LatentShape(
        num_heads=reader.positive(family.heads_keys, hint=hint),
        num_kv_heads=1,
        head_dim=kv_rank + reader.positive(("qk_rope_head_dim",)),
        o_bias=reader.flag(O_PROJ_BIAS, default=False),
        q_rank=q_rank,
        kv_rank=kv_rank,
        qk_nope_dim=reader.positive(("qk_nope_head_dim",)),
        v_dim=reader.positive(("v_head_dim",)),
    )


def _read_ffn(
    reader: _Reader, config: Mapping[str, Any], family: Family, index: int, hidden_size: int
) -> FfnShape | MoeShape:
    hint = ' Mark a layer without a feed-forward block as "skip": ["mlp"].'
    extra = reader.flag(DOWN_PROJ_BIAS, default=False)
    if family.experts_keys and _is_moe_layer(config, family, index):
        if extra:
            raise UnsupportedError(
                f"{reader.where}: {DOWN_PROJ_BIAS} is set on a layer of experts; the fused expert kernels "
                "take no such bias. Remove it, or fold it into a dense layer."
            )
        return _read_moe(reader, family, hint)
    if family.ffn_key is None:
        raise FormatError(f"{reader.where}: a {family.model_type} layer without experts has no definition.")
    # GPT-2 writes n_inner: null for the usual four times the hidden width.
    default = 4 * hidden_size if family.model_type == "gpt2" else None
    bias = reader.flag(family.mlp_bias_key, family.mlp_bias)
    return FfnShape(reader.positive((family.ffn_key,), default, hint), bias, bias or extra)


def _is_moe_layer(config: Mapping[str, Any], family: Family, index: int) -> bool:
    """Whether this layer of an MoE family holds experts, by Qwen's or DeepSeek's interleaving keys."""
    if family.shared_experts:
        first, every = config.get("first_k_dense_replace") or 0, config.get("moe_layer_freq") or 1
        if type(first) is not int or first < 0 or type(every) is not int or every < 1:
            raise FormatError(
                f"config.json: first_k_dense_replace is {first!r} and moe_layer_freq {every!r}; "
                "a number of layers and a positive integer are needed."
            )
        return config.get("n_routed_experts") is not None and index >= first and index % every == 0
    dense, step = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step") or 1
    if not isinstance(dense, list | tuple) or not isinstance(step, int) or step < 1:
        raise FormatError(
            f"config.json: mlp_only_layers is {dense!r} and decoder_sparse_step {step!r}; "
            "a list of layer indices and a positive integer are needed."
        )
    return index not in dense and (index + 1) % step == 0


def _read_moe(reader: _Reader, family: Family, hint: str) -> MoeShape:
    if family.expert_width_key is None:
        raise UnsupportedError(f"{reader.where}: {family.model_type} has no experts.")
    experts = reader.positive(family.experts_keys, hint=hint)
    top_k = reader.positive(("num_experts_per_tok",))
    if top_k > experts:
        raise FormatError(
            f"{reader.where}: num_experts_per_tok is {top_k} but only {experts} experts are left. "
            f"Keep at least {top_k} experts, or lower num_experts_per_tok for this layer."
        )
    width = reader.positive((family.expert_width_key,), hint=hint)
    if not family.shared_experts:
        return MoeShape(experts, top_k, width)
    _check_groups(reader, family, experts, top_k)
    shared = reader.positive(("n_shared_experts",)) * width if reader.value(("n_shared_experts",)) else 0
    if shared and reader.value((SHARED_WIDTH,)) is not None:
        shared = reader.positive((SHARED_WIDTH,), hint=" Set n_shared_experts to null where there are none.")
    return MoeShape(experts, top_k, width, shared, family.correction_bias)


def _check_groups(reader: _Reader, family: Family, experts: int, top_k: int) -> None:
    """DeepSeek routes within ``topk_group`` of ``n_group`` equal groups of experts."""
    methods: tuple[str, ...] = ("greedy", "group_limited_greedy")
    scorer = "softmax"
    if family.correction_bias:
        methods, scorer = ("noaux_tc",), "sigmoid"
    method = reader.value(("topk_method",)) or methods[0]
    scoring = reader.value(("scoring_func",)) or scorer
    if method not in methods or scoring != scorer:
        raise UnsupportedError(
            f"{reader.where}: topk_method {method!r} with scoring_func {scoring!r} is not served for "
            f"{family.model_type}; allowed: {' or '.join(methods)} with {scorer}."
        )
    groups = reader.positive(("n_group",), default=1)
    taken = reader.positive(("topk_group",), default=1)
    # V3 ranks a group by its best two.
    fewest = 2 if family.correction_bias else 1
    if experts % groups or taken > groups or top_k > taken * (experts // groups):
        raise FormatError(
            f"{reader.where}: {experts} experts in {groups} groups, of which a token may use {taken}, do not "
            f"give it {top_k} experts. Prune the same number from every group, and leave each enough."
        )
    if experts // groups < fewest:
        raise FormatError(
            f"{reader.where}: {experts} experts in {groups} groups; {family.model_type} ranks a group by its "
            f"best {fewest}. Leave at least {fewest} in every group."
        )
