"""Every family, served by vLLM with layers that differ, against plain torch in float64."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import structured_checkpoints as checkpoints
import structured_engine as engines

FLAP = {"o_proj_bias": True, "down_proj_bias": True}


def gated(**changes: dict[str, Any]) -> dict[str, Any]:
    """The standard pruned layers, with further values for some of them."""
    layers = copy.deepcopy(checkpoints.GATED_LAYERS)
    for key, values in changes.items():
        layers.setdefault(key.removeprefix("layer"), {}).update(values)
    return layers


def _plain_heads(heads: str, width: str) -> dict[str, Any]:
    """Layers that differ in a family where every query head has its own KV head."""
    return {
        "1": {heads: 2, width: 192},
        "2": {heads: 1, width: 320},
        "3": {heads: 3, "skip": ["mlp"]},
        "4": {width: 64, "skip": ["attention"]},
    }


NO_BIAS = {"o_proj_bias": False, "down_proj_bias": False}


def _plain_heads(heads: str, width: str) -> dict[str, Any]:
    """Layers that differ in a family where every query head has its own KV head."""
    return {
        "1": {heads: 2, width: 192},
        "2": {heads: 1, width: 320},
        "3": {heads: 3, "skip": ["mlp"]},
        "4": {width: 64, "skip": ["attention"]},
    }


CASES: dict[str, dict[str, Any]] = {
    "llama": {
        "per_layer": gated(layer1=FLAP, layer3={"attention_bias": True, "mlp_bias": True}),
        "attention_bias": False,
        "mlp_bias": False,
        **NO_BIAS,
    },
    "mistral": {"per_layer": gated(layer1=FLAP), **NO_BIAS},
    "qwen2": {"per_layer": gated(layer2=FLAP), "tie_word_embeddings": True, **NO_BIAS},
    "qwen3": {
        "per_layer": gated(layer1=FLAP, layer3={"attention_bias": True}),
        "attention_bias": False,
        **NO_BIAS,
    },
    "qwen3_moe": {
        "per_layer": {
            "1": {"num_experts": 6, "num_key_value_heads": 2, "moe_intermediate_size": 32},
            "2": {"num_experts": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "o_proj_bias": True},
            "3": {"num_experts": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 96},
            "4": {"skip": ["attention"], "intermediate_size": 192},
            "5": {"skip": ["mlp"], "num_attention_heads": 3, "num_key_value_heads": 3},
        },
        "mlp_only_layers": [4],
        "o_proj_bias": False,
    },
    "mixtral": {
        "per_layer": {
            "1": {"num_local_experts": 6, "num_key_value_heads": 2, "intermediate_size": 32},
            "2": {"num_local_experts": 4, "num_attention_heads": 2, "num_key_value_heads": 1},
            "3": {"num_local_experts": 3, "skip": ["attention"]},
            "4": {"skip": ["mlp"], "o_proj_bias": True},
        },
        "o_proj_bias": False,
    },
    "opt": {"per_layer": _plain_heads("num_attention_heads", "ffn_dim")},
    "gpt2": {"per_layer": _plain_heads("n_head", "n_inner")},
}


@pytest.fixture(scope="module", params=CASES)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, ...]]:
    """One engine per family: (engine, config, tensors)."""
    family = request.param
    config = checkpoints.make_config(family, 6, **CASES[family])
    tensors = checkpoints.make_tensors(config)
    folder = checkpoints.save_checkpoint(tmp_path_factory.mktemp(family), config, tensors)
    with engines.engine(folder, enable_prefix_caching=True, max_num_batched_tokens=32) as llm:
        yield llm, config, tensors


@pytest.mark.e2e
def test_logprobs_equal_reference(served: tuple[Any, ...]) -> None:
    llm, config, tensors = served
    engines.assert_parity(engines.run(llm, engines.prompts()), config, tensors)
