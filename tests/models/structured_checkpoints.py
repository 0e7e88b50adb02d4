"""Tiny random checkpoints whose layers differ, one builder per family."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from structured_reference import Layer, Tensors, layers_of

VOCAB, HIDDEN, HEAD_DIM = 256, 128, 32

#: Heads, KV heads and widths that differ; a layer without attention, one without a feed-forward block.
GATED_LAYERS = {
    "1": {"num_key_value_heads": 2, "intermediate_size": 192},
    "2": {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64},
    "3": {"num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 320},
    "4": {"skip": ["attention"]},
    "5": {"num_key_value_heads": 1, "skip": ["mlp"]},
}
#: The same freedom as far as two tensor-parallel ranks can split it; one layer's KV head is replicated.
EVEN_LAYERS = {
    "1": {"num_key_value_heads": 2, "intermediate_size": 192},
    "2": {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64},
    "3": {"skip": ["attention"]},
}

#: Experts that differ, the Qwen way; one dense layer needs mlp_only_layers.
MOE_LAYERS = {
    "1": {"num_experts": 6, "num_key_value_heads": 2, "moe_intermediate_size": 32},
    "2": {"num_experts": 4, "num_attention_heads": 2, "num_key_value_heads": 1},
    "3": {"num_experts": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 96},
    "4": {"skip": ["attention"]},
    "5": {"skip": ["mlp"], "num_attention_heads": 3, "num_key_value_heads": 3},
}
#: The same in Mixtral's words.
MIXTRAL_LAYERS = {
    "1": {"num_local_experts": 6, "num_key_value_heads": 2, "intermediate_size": 32},
    "2": {"num_local_experts": 4, "num_attention_heads": 2, "num_key_value_heads": 1},
    "3": {"num_local_experts": 3, "skip": ["attention"]},
    "4": {"skip": ["mlp"]},
}
#: DeepSeek: routed experts, their width, the shared ones' width; first_k_dense_replace makes layer 0 dense.
DEEPSEEK_LAYERS = {
    "0": {"intermediate_size": 192},
    "1": {"n_routed_experts": 6, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 96},
    "2": {"n_routed_experts": 4, "num_attention_heads": 2},
    "3": {"n_routed_experts": 2, "num_experts_per_tok": 1, "num_attention_heads": 3},
    "4": {"skip": ["attention"]},
    "5": {"skip": ["mlp"]},
}
#: What V1 can vary on top: its KV heads.
DEEPSEEK_KV = {
    "1": {"num_key_value_heads": 2},
    "2": {"num_key_value_heads": 1},
    "3": {"num_key_value_heads": 3},
}

_GATED: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": HEAD_DIM,
    "intermediate_size": 256,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "sliding_window": None,
}
ARCHITECTURES = {
    "llama": "SparseLlamaForCausalLM",
    "mistral": "SparseMistralForCausalLM",
    "qwen2": "SparseQwen2ForCausalLM",
    "qwen3": "SparseQwen3ForCausalLM",
    "qwen3_moe": "SparseQwen3MoeForCausalLM",
    "mixtral": "SparseMixtralForCausalLM",
    "deepseek": "SparseDeepseekForCausalLM",
    "deepseek_v2": "SparseDeepseekV2ForCausalLM",
    "deepseek_v3": "SparseDeepseekV3ForCausalLM",
    "opt": "SparseOPTForCausalLM",
    "gpt2": "SparseGPT2LMHeadModel",
}
FAMILIES = tuple(ARCHITECTURES)
#: Those whose attention caches one latent for all heads.
LATENT = ("deepseek_v2", "deepseek_v3")
_DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "shared_expert_intermediate_size": 128,
}
# vLLM's CPU kernel knows DeepSeek's own latent alone: 512 and 64 rotary numbers.
_LATENT_SIZES: dict[str, Any] = {
    "head_dim": None,
    "kv_lora_rank": 512,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "n_group": 2,
    "topk_group": 1,
}
_OWN: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 64},
    "deepseek": {**_DEEPSEEK},
    "deepseek_v2": {
        **_DEEPSEEK,
        **_LATENT_SIZES,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 1.5,
    },
    "deepseek_v3": {
        **_DEEPSEEK,
        **_LATENT_SIZES,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 0,
    },
    "opt": {
        "hidden_size": HIDDEN,
        "word_embed_proj_dim": HIDDEN,
        "num_attention_heads": 4,
        "head_dim": HEAD_DIM,
        "ffn_dim": 256,
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "tie_word_embeddings": True,
    },
    "gpt2": {
        "n_embd": HIDDEN,
        "n_head": 4,
        "head_dim": HEAD_DIM,
        "n_inner": 256,
        "activation_function": "gelu_new",
        "n_positions": 512,
        "tie_word_embeddings": True,
    },
}


def plain_layers(family: str) -> dict[str, Any]:
    """Layers that differ in a family where every query head has its own KV head."""
    heads, width = ("n_head", "n_inner") if family == "gpt2" else ("num_attention_heads", "ffn_dim")
    return {
        "1": {heads: 2, width: 192},
        "2": {heads: 1, width: 320},
        "3": {heads: 3, "skip": ["mlp"]},
        "4": {width: 64, "skip": ["attention"]},
    }


def layers_for(family: str) -> dict[str, Any]:
    """Six layers' worth of differences that the family can express."""
    special = {"qwen3_moe": MOE_LAYERS, "mixtral": MIXTRAL_LAYERS}
    if family == "deepseek":
        return {
            **DEEPSEEK_LAYERS,
            **{key: {**DEEPSEEK_LAYERS[key], **DEEPSEEK_KV[key]} for key in DEEPSEEK_KV},
        }
    if family == "deepseek_v2":
        return DEEPSEEK_LAYERS
    if family == "deepseek_v3":
        # A group is ranked by its best two experts, and there are two groups.
        return {**DEEPSEEK_LAYERS, "3": {**DEEPSEEK_LAYERS["3"], "n_routed_experts": 4}}
    if family in ("opt", "gpt2"):
        return plain_layers(family)
    return special.get(family, GATED_LAYERS)


_FLAP = {"o_proj_bias": True, "down_proj_bias": True}


def _changed(layers: dict[str, Any], **changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of ``layers`` with further values for some of them."""
    layers = copy.deepcopy(layers)
    for key, values in changes.items():
        layers.setdefault(key.removeprefix("layer"), {}).update(values)
    return layers


_NO_BIAS = {"o_proj_bias": False, "down_proj_bias": False}
#: Per family: layers that differ in all it allows, some with biases of their own, and what config.json adds.
CASES: dict[str, dict[str, Any]] = {
    "llama": {
        "per_layer": _changed(GATED_LAYERS, layer1=_FLAP, layer3={"attention_bias": True, "mlp_bias": True}),
        "attention_bias": False,
        "mlp_bias": False,
        **_NO_BIAS,
    },
    "mistral": {"per_layer": _changed(GATED_LAYERS, layer1=_FLAP), **_NO_BIAS},
    "qwen2": {"per_layer": _changed(GATED_LAYERS, layer2=_FLAP), "tie_word_embeddings": True, **_NO_BIAS},
    "qwen3": {
        "per_layer": _changed(GATED_LAYERS, layer1=_FLAP, layer3={"attention_bias": True}),
        "attention_bias": False,
        **_NO_BIAS,
    },
    "qwen3_moe": {
        "per_layer": _changed(MOE_LAYERS, layer2={"o_proj_bias": True}, layer4={"intermediate_size": 192}),
        "mlp_only_layers": [4],
        "o_proj_bias": False,
    },
    "mixtral": {
        "per_layer": _changed(MIXTRAL_LAYERS, layer4={"o_proj_bias": True}),
        "o_proj_bias": False,
    },
    "deepseek": {
        "per_layer": _changed(layers_for("deepseek"), layer2={"o_proj_bias": True}),
        "o_proj_bias": False,
    },
    "deepseek_v2": {
        "per_layer": _changed(layers_for("deepseek_v2"), layer2={"o_proj_bias": True}),
        "o_proj_bias": False,
    },
    "deepseek_v3": {
        "per_layer": _changed(layers_for("deepseek_v3"), layer2={"o_proj_bias": True}),
        "o_proj_bias": False,
    },
    "opt": {"per_layer": plain_layers("opt")},
    "gpt2": {"per_layer": plain_layers("gpt2")},
}


def even_layers_for(family: str) -> dict[str, Any]:
    """Four layers' worth of differences that two ranks can split."""
    if family in ("opt", "gpt2"):
        heads, width = ("n_head", "n_inner") if family == "gpt2" else ("num_attention_heads", "ffn_dim")
        return {"1": {heads: 2, width: 192}, "2": {"skip": ["mlp"]}, "3": {"skip": ["attention"]}}
    if family.startswith("deepseek"):
        layers = layers_for(family)
        return {key: layers[key] for key in ("0", "1", "2")}
    if family in ("qwen3_moe", "mixtral"):
        layers = MOE_LAYERS if family == "qwen3_moe" else MIXTRAL_LAYERS
        return {key: layers[key] for key in ("1", "2")}
    return EVEN_LAYERS


def make_config(
    family: str, layers: int, per_layer: dict[str, Any] | None = None, **extra: Any
) -> dict[str, Any]:
    """A config.json for ``family`` with ``layers`` layers."""
    base = {} if family in ("opt", "gpt2") else dict(_GATED)
    config = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": VOCAB,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "n_layer" if family == "gpt2" else "num_hidden_layers": layers,
        "max_position_embeddings": 512,
        **base,
        **_OWN.get(family, {}),
        **extra,
    }
    if family == "gpt2":
        del config["max_position_embeddings"]
    if family == "deepseek_v3":
        del config["head_dim"]  # Transformers derives it, and a null would win
    if per_layer is not None:
        config["per_layer_config"] = per_layer
        config["allow_global_per_layer_attribute_access"] = True
    return config


def make_tensors(config: dict[str, Any], seed: int = 0) -> Tensors:
    """Random float32 tensors in the family's naming, at the declared shapes."""
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        noise = torch.randn(shape, generator=generator)
        if "norm" in name or ".ln_" in name:
            return 1 + 0.1 * noise if name.endswith("weight") else 0.1 * noise
        if name.endswith("correction_bias"):
            # Enough to change who is chosen; corrected scores stay positive.
            return 0.1 * torch.rand(shape, generator=generator)
        if name.endswith("bias"):
            return 0.2 * noise
        if "embed" in name or name.endswith(("wte.weight", "wpe.weight")):
            return 0.5 * noise
        return noise * 1.5 / shape[-1] ** 0.5

    names = _opt_shapes if config["model_type"] == "opt" else _gated_shapes
    names = _gpt2_shapes if config["model_type"] == "gpt2" else names
    return {name: draw(name, shape) for name, shape in names(config)}


def save_checkpoint(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    """Write config.json and one safetensors file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def _gated_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    yield "model.norm.weight", (HIDDEN,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (VOCAB, HIDDEN)
    for i, layer in enumerate(layers_of(config)):
        if "attention" not in layer.skip:
            attention = _latent_attention if config["model_type"] in LATENT else _gated_attention
            for name, shape in attention(config["model_type"], layer):
                yield f"model.layers.{i}.{name}", shape
        if "mlp" not in layer.skip:
            yield f"model.layers.{i}.post_attention_layernorm.weight", (HIDDEN,)
            for name, shape in _gated_ffn(config["model_type"], layer, i):
                yield f"model.layers.{i}.{name}", shape


def _gated_attention(family: str, layer: Layer) -> Iterator[tuple[str, tuple[int, ...]]]:
    query = layer["num_attention_heads"] * layer["head_dim"]
    kv = layer["num_key_value_heads"] * layer["head_dim"]
    yield "input_layernorm.weight", (HIDDEN,)
    for part, rows in (("q", query), ("k", kv), ("v", kv)):
        yield f"self_attn.{part}_proj.weight", (rows, HIDDEN)
        if family == "qwen2" or layer["attention_bias"]:
            yield f"self_attn.{part}_proj.bias", (rows,)
        if family.startswith("qwen3") and part != "v":
            yield f"self_attn.{part}_norm.weight", (layer["head_dim"],)
    yield "self_attn.o_proj.weight", (HIDDEN, query)
    if layer["attention_bias"] or layer["o_proj_bias"]:
        yield "self_attn.o_proj.bias", (HIDDEN,)


def _latent_attention(_: str, layer: Layer) -> Iterator[tuple[str, tuple[int, ...]]]:
    heads, rope, rank = layer["num_attention_heads"], layer["qk_rope_head_dim"], layer["kv_lora_rank"]
    query = heads * (layer["qk_nope_head_dim"] + rope)
    yield "input_layernorm.weight", (HIDDEN,)
    if layer["q_lora_rank"] is None:
        yield "self_attn.q_proj.weight", (query, HIDDEN)
    else:
        yield "self_attn.q_a_proj.weight", (layer["q_lora_rank"], HIDDEN)
        yield "self_attn.q_a_layernorm.weight", (layer["q_lora_rank"],)
        yield "self_attn.q_b_proj.weight", (query, layer["q_lora_rank"])
    yield "self_attn.kv_a_proj_with_mqa.weight", (rank + rope, HIDDEN)
    yield "self_attn.kv_a_layernorm.weight", (rank,)
    expanded = heads * (layer["qk_nope_head_dim"] + layer["v_head_dim"])
    yield "self_attn.kv_b_proj.weight", (expanded, rank)
    yield "self_attn.o_proj.weight", (HIDDEN, heads * layer["v_head_dim"])
    if layer["o_proj_bias"]:
        yield "self_attn.o_proj.bias", (HIDDEN,)


def _deepseek_experts(layer: Layer) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "mlp.gate.weight", (layer["n_routed_experts"], HIDDEN)
    if layer["topk_method"] == "noaux_tc":
        yield "mlp.gate.e_score_correction_bias", (layer["n_routed_experts"],)
    blocks = {f"experts.{i}": layer["moe_intermediate_size"] for i in range(layer["n_routed_experts"])}
    if layer["n_shared_experts"]:
        blocks["shared_experts"] = layer["shared_expert_intermediate_size"]
    for block, width in blocks.items():
        for part in ("gate", "up"):
            yield f"mlp.{block}.{part}_proj.weight", (width, HIDDEN)
        yield f"mlp.{block}.down_proj.weight", (HIDDEN, width)


def _gated_ffn(family: str, layer: Layer, index: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    if family.startswith("deepseek") and index >= layer["first_k_dense_replace"]:
        yield from _deepseek_experts(layer)
        return
    if family in ("qwen3_moe", "mixtral") and index not in (layer["mlp_only_layers"] or []):
        mixtral = family == "mixtral"
        block = "block_sparse_moe" if mixtral else "mlp"
        count = layer["num_local_experts" if mixtral else "num_experts"]
        width = layer["intermediate_size" if mixtral else "moe_intermediate_size"]
        yield f"{block}.gate.weight", (count, HIDDEN)
        for expert in range(count):
            for part in ("w1", "w3") if mixtral else ("gate_proj", "up_proj"):
                yield f"{block}.experts.{expert}.{part}.weight", (width, HIDDEN)
            yield f"{block}.experts.{expert}.{'w2' if mixtral else 'down_proj'}.weight", (HIDDEN, width)
        return
    width = layer["intermediate_size"]
    for part in ("gate", "up"):
        yield f"mlp.{part}_proj.weight", (width, HIDDEN)
        if layer["mlp_bias"]:
            yield f"mlp.{part}_proj.bias", (width,)
    yield "mlp.down_proj.weight", (HIDDEN, width)
    if layer["mlp_bias"] or layer["down_proj_bias"]:
        yield "mlp.down_proj.bias", (HIDDEN,)


def _opt_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.decoder.embed_tokens.weight", (VOCAB, HIDDEN)
    yield "model.decoder.embed_positions.weight", (config["max_position_embeddings"] + 2, HIDDEN)
    yield from _norm("model.decoder.final_layer_norm")
    for i, layer in enumerate(layers_of(config)):
        name = f"model.decoder.layers.{i}"
        query = layer["num_attention_heads"] * layer["head_dim"]
        if "attention" not in layer.skip:
            yield from _norm(f"{name}.self_attn_layer_norm")
            for part in "qkv":
                yield f"{name}.self_attn.{part}_proj.weight", (query, HIDDEN)
                yield f"{name}.self_attn.{part}_proj.bias", (query,)
            yield f"{name}.self_attn.out_proj.weight", (HIDDEN, query)
            yield f"{name}.self_attn.out_proj.bias", (HIDDEN,)
        if "mlp" not in layer.skip:
            yield from _norm(f"{name}.final_layer_norm")
            yield f"{name}.fc1.weight", (layer["ffn_dim"], HIDDEN)
            yield f"{name}.fc1.bias", (layer["ffn_dim"],)
            yield f"{name}.fc2.weight", (HIDDEN, layer["ffn_dim"])
            yield f"{name}.fc2.bias", (HIDDEN,)


def _gpt2_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "transformer.wte.weight", (VOCAB, HIDDEN)
    yield "transformer.wpe.weight", (config["n_positions"], HIDDEN)
    yield from _norm("transformer.ln_f")
    for i, layer in enumerate(layers_of(config)):
        name = f"transformer.h.{i}"
        query = layer["n_head"] * layer["head_dim"]
        if "attention" not in layer.skip:
            yield from _norm(f"{name}.ln_1")
            yield f"{name}.attn.c_attn.weight", (HIDDEN, 3 * query)
            yield f"{name}.attn.c_attn.bias", (3 * query,)
            yield f"{name}.attn.c_proj.weight", (query, HIDDEN)
            yield f"{name}.attn.c_proj.bias", (HIDDEN,)
        if "mlp" not in layer.skip:
            yield from _norm(f"{name}.ln_2")
            yield f"{name}.mlp.c_fc.weight", (HIDDEN, layer["n_inner"])
            yield f"{name}.mlp.c_fc.bias", (layer["n_inner"],)
            yield f"{name}.mlp.c_proj.weight", (layer["n_inner"], HIDDEN)
            yield f"{name}.mlp.c_proj.bias", (HIDDEN,)


def _norm(name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (HIDDEN,)
    yield f"{name}.bias", (HIDDEN,)


def save_lora(
    folder: Path, tensors: Tensors, only: list[str] | None = None, rank: int = 4, seed: int = 9
) -> Tensors:
    """Write a PEFT adapter for all projections or those named; return the tensors with it merged in."""
    generator = torch.Generator().manual_seed(seed)
    adapter: Tensors = {}
    merged = dict(tensors)
    for name, weight in tensors.items():
        module = name.removesuffix(".weight")
        last = module.rpartition(".")[2]
        if not (last.endswith("_proj") if only is None else last in only):
            continue
        down = torch.randn(rank, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
        up = torch.randn(weight.shape[0], rank, generator=generator) / rank**0.5
        adapter[f"base_model.model.{module}.lora_A.weight"] = down
        adapter[f"base_model.model.{module}.lora_B.weight"] = up
        merged[name] = weight + up @ down
    folder.mkdir(parents=True)
    modules = sorted({name.split(".")[-3] for name in adapter})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": modules, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {name: tensor.contiguous() for name, tensor in adapter.items()}, folder / "adapter_model.safetensors"
    )
    return merged
