"""Families whose linears are named, fused or laid out in another way than Llama's, dense and 2:4."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from converters.convert import convert
from converters.layers import Kind, kind_of
from tests.serving import checkpoints as ck
from tests.serving.engine import engine, packed_layers, score, serve_and_score
from tests.serving.test_serving import assert_twins
from vllm_sparse.sparse24 import topk_mask

pytestmark = pytest.mark.e2e

#: Heads of 32 without saying so, as older configs have no head_dim.
PLAIN = {key: value for key, value in ck.SHAPE.items() if key != "head_dim"} | {
    "hidden_size": 128,
    "pad_token_id": 0,
}
LATENT = {
    **{key: value for key, value in PLAIN.items() if key != "num_key_value_heads"},
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
MAMBA = {
    **PLAIN,
    "layer_types": ["mamba", "attention"],
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "position_embedding_type": "rope",
    "shared_intermediate_size": 64,
}
#: Class, config class, config, and the number of vLLM's layers that are 2:4.
FAMILIES: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "phi3": ("Phi3ForCausalLM", "Phi3Config", PLAIN, 8),
    "granite-hybrid": (
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeHybridConfig",
        {**MAMBA, "num_local_experts": 4, "num_experts_per_tok": 2},
        8,
    ),
    "mamba2": (
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {
            "vocab_size": ck.VOCAB,
            "num_hidden_layers": 2,
            "hidden_size": 64,
            "num_heads": 4,
            "head_dim": 32,
            "state_size": 16,
            "n_groups": 2,
        },
        4,
    ),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**ck.SHAPE, "sliding_window": 24}, 8),
    "glm4": ("Glm4ForCausalLM", "Glm4Config", {**ck.SHAPE, "pad_token_id": 0}, 8),
    "qwen2-moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**PLAIN, **EXPERTS, "num_experts": 6},
        8,
    ),
    "deepseek-v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {**LATENT, "q_lora_rank": 48, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
        12,
    ),
    "falcon": (
        "FalconForCausalLM",
        "FalconConfig",
        {
            "vocab_size": ck.VOCAB,
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
        },
        8,
    ),
}


def write_pruned(family: str, folder: Path) -> Path:
    """A dense checkpoint whose linears are 2:4; experts that share a tensor stay as they are."""
    class_name, config_class, config, _ = FAMILIES[family]
    torch.manual_seed(3)
    model = getattr(transformers, class_name)(getattr(transformers, config_class)(**config))
    model.bfloat16().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name, weight in tensors.items():
        if kind_of(name, weight.ndim) is Kind.LINEAR:
            tensors[name] = weight * topk_mask(weight.float().abs()) * 3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def quick(*names: str) -> list[Any]:
    """These in every run, the others among the slow tests."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]


@pytest.mark.parametrize("family", quick("phi3", "granite-hybrid"))
def test_answers_as_its_dense_twin(tmp_path: Path, family: str) -> None:
    dense = write_pruned(family, tmp_path / "d")
    convert(dense, tmp_path / "s")
    with engine(tmp_path / "s") as llm:
        assert len(packed_layers(llm)) == FAMILIES[family][3]
        ours = score(llm, ck.VOCAB)
    assert_twins(ours, serve_and_score(dense, ck.VOCAB))
