"""Transformers models whose layers differ, each layer built from its own config: for checks, not for serving.

Transformers builds every layer from the global values. Here each is built again from the values its entry
of ``per_layer_config`` changes, and what a stock layer cannot say (a missing part, a bias on one projection,
heads that do not divide the hidden width) is put in afterwards.
"""

import copy
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from converters.train.structured import NoAttention, NoMlp
from vllm_sparse.errors import UnsupportedError
from vllm_sparse.models.layer_config import (
    AttentionShape,
    FfnShape,
    LayerShape,
    ModelShape,
    MoeShape,
    read_model_shape,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Where a family's layers keep what a skipped part takes with it: (attention, its norm, block, its norm).
_PARTS = {
    "gpt2": ("attn", "ln_1", "mlp", "ln_2"),
    "opt": ("self_attn", "self_attn_layer_norm", "fc2", "final_layer_norm"),
}
_USUAL = ("self_attn", "input_layernorm", "mlp", "post_attention_layernorm")
# Families whose attention derives its head dimension from the hidden width.
_DERIVED_HEADS = ("opt", "gpt2")
_EXPERT = re.compile(r"^(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight$")


def layered_class(stock: type["PreTrainedModel"], raw: Mapping[str, Any]) -> type["PreTrainedModel"]:
    """A subclass of a Transformers model class whose layers have the shapes of ``raw``, a config.json.

    Raises:
        FormatError: the shapes contradict each other.
        UnsupportedError: what Transformers' own blocks cannot compute.
    """
    shape = read_model_shape(raw)
    if shape.family.shared_experts and not shape.family.correction_bias and raw.get("norm_topk_prob"):
        raise UnsupportedError(
            f"norm_topk_prob is true: Transformers has no {shape.family.model_type} router that does that, "
            "so logits cannot be checked here. vLLM serves it."
        )
    entries = {int(key): entry for key, entry in (raw.get("per_layer_config") or {}).items()}

    class Layered(stock):  # type: ignore[valid-type,misc]
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            layers = _layers(self)
            for layer in shape.layers:
                own = entries.get(layer.index, {})
                layers[layer.index] = _build(type(layers[layer.index]), config, own, shape, layer)

    return Layered


def _layers(model: Any) -> Any:
    inner = getattr(model, "model", None) or model.transformer
    inner = getattr(inner, "decoder", inner)
    return inner.h if hasattr(inner, "h") else inner.layers


def _build(
    layer_class: Any, config: Any, own: Mapping[str, Any], shape: ModelShape, layer: LayerShape
) -> nn.Module:
    """One layer from its own values, then what they cannot express."""
    family = shape.family
    derived = family.model_type in _DERIVED_HEADS
    config = copy.copy(config)
    for key, value in own.items():
        if key != "skip" and not (derived and key in family.heads_keys):
            setattr(config, key, value)
    made = layer_class(config, layer_idx=layer.index)
    attention, attention_norm, block, block_norm = _PARTS.get(family.model_type, _USUAL)
    if layer.attention is None:
        setattr(made, attention, NoAttention())
        setattr(made, attention_norm, nn.Identity())
    else:
        _finish_attention(getattr(made, attention), family.model_type, layer.attention)
    if layer.ffn is None:
        setattr(made, block, NoMlp())
        setattr(made, block_norm, nn.Identity())
        if family.model_type == "opt":
            made.fc1 = nn.Identity()
    elif isinstance(layer.ffn, MoeShape) and family.shared_experts:
        _finish_experts(made, config, layer.ffn)
    elif isinstance(layer.ffn, FfnShape) and layer.ffn.down_bias and not layer.ffn.up_bias:
        made.mlp.down_proj = _with_bias(made.mlp.down_proj)
    return made


def _finish_attention(attention: Any, model_type: str, shape: AttentionShape) -> None:
    if model_type in _DERIVED_HEADS:
        rows = shape.num_heads * shape.head_dim
        attention.num_heads, attention.head_dim = shape.num_heads, shape.head_dim
        attention.scaling = shape.head_dim**-0.5
        if model_type == "opt":
            hidden = attention.embed_dim
            for part in ("q_proj", "k_proj", "v_proj"):
                setattr(attention, part, nn.Linear(hidden, rows, bias=shape.qkv_bias))
            attention.out_proj = nn.Linear(rows, hidden, bias=shape.o_bias)
        else:
            from transformers.pytorch_utils import Conv1D

            attention.split_size = rows
            attention.c_attn = Conv1D(3 * rows, attention.embed_dim)
            attention.c_proj = Conv1D(attention.embed_dim, rows)
    elif shape.o_bias and attention.o_proj.bias is None:
        attention.o_proj = _with_bias(attention.o_proj)


def _with_bias(linear: nn.Linear) -> nn.Linear:
    return nn.Linear(linear.in_features, linear.out_features, bias=True)


def _finish_experts(layer: Any, config: Any, shape: MoeShape) -> None:
    """DeepSeek's experts: V1 borrows V2's block, V3 has its own; the shared experts' width is set."""
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as stock
    from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config

    if not isinstance(layer.mlp, stock.DeepseekV2Moe) and not shape.correction_bias:
        config = DeepseekV2Config(
            hidden_size=config.hidden_size,
            hidden_act=config.hidden_act,
            n_routed_experts=shape.num_experts,
            n_shared_experts=1,
            moe_intermediate_size=shape.intermediate_size,
            num_experts_per_tok=shape.top_k,
            routed_scaling_factor=getattr(config, "routed_scaling_factor", None) or 1.0,
        )
        layer.mlp = stock.DeepseekV2Moe(config)
    if shape.shared_width:
        block: Any = type(layer.mlp.shared_experts) if shape.correction_bias else stock.DeepseekV2MLP
        layer.mlp.shared_experts = block(config, intermediate_size=shape.shared_width)
    else:
        layer.mlp.shared_experts = NoMlp()


def fuse_experts(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Experts as Transformers holds them in memory: all of a layer in one tensor a projection.

    Transformers does this by itself for the families it knows, and V1 of DeepSeek is not one.

    Args:
        state: tensors named ``...mlp.experts.3.up_proj.weight``; others pass through.

    Returns:
        ``experts.gate_up_proj`` [experts, 2 * width, hidden], ``experts.down_proj`` [experts, hidden, width].
    """
    fused: dict[str, Tensor] = {}
    experts: dict[str, dict[tuple[int, str], Tensor]] = {}
    for name, tensor in state.items():
        match = _EXPERT.match(name)
        if match:
            experts.setdefault(match[1], {})[int(match[2]), match[3]] = tensor
        else:
            fused[name] = tensor
    for block, parts in experts.items():
        numbers = sorted({number for number, _ in parts})
        gates = [torch.cat([parts[number, "gate"], parts[number, "up"]]) for number in numbers]
        fused[f"{block}.gate_up_proj"] = torch.stack(gates)
        fused[f"{block}.down_proj"] = torch.stack([parts[number, "down"] for number in numbers])
    return fused
