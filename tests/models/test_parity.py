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


NO_BIAS = {"o_proj_bias": False, "down_proj_bias": False}
CASES: dict[str, dict[str, Any]] = {
    "llama": {
        "per_layer": gated(layer1=FLAP, layer3={"attention_bias": True, "mlp_bias": True}),
        "attention_bias": False,
        "mlp_bias": False,
        **NO_BIAS,
    },
    "mistral": {"per_layer": gated(layer1=FLAP), **NO_BIAS},
    "qwen2": {"per_layer": gated(layer2=FLAP), "tie_word_embeddings": True, **NO_BIAS},
    "qwen3": {"per_layer": gated(layer1=FLAP, layer3={"attention_bias": True}), "attention_bias": False, **NO_BIAS},
}


@pytest.fixture(scope="module", params=CASES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, ...]]:
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
