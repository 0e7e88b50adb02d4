"""Every family, served by vLLM with layers that differ, against plain torch in float64."""

from collections.abc import Iterator
from typing import Any

import pytest
import structured_checkpoints as checkpoints
import structured_engine as engines
from structured_reference import layers_of

from vllm_sparse.models.layer_config import read_model_shape

CASES = checkpoints.CASES

#: vLLM's CPU kernels for latent attention do neither chunked prefill nor prefix caching, and turn both off.
WHOLE_PREFILL = checkpoints.LATENT
chunking = pytest.mark.parametrize("served", [f for f in CASES if f not in WHOLE_PREFILL], indirect=True)


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


@pytest.mark.slow
@pytest.mark.e2e
def test_contract(served: tuple[Any, ...]) -> None:
    """Chunks of 32 tokens, so that most positions attend to keys read back from the cache."""
    engines.assert_contract(*served)


@pytest.mark.e2e
@chunking
def test_chunked_prefill_was_needed(served: tuple[Any, ...]) -> None:
    llm, _, _ = served
    budget = llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    assert all(len(prompt) > budget for prompt in engines.prompts())


@pytest.mark.e2e
@chunking
def test_prefix_cache_is_hit_and_changes_nothing(served: tuple[Any, ...]) -> None:
    llm, config, tensors = served
    prompt = engines.prompts(1, seed=7)[0]
    cold, cold_hits = engines.decode(llm, prompt)
    warm, warm_hits = engines.decode(llm, prompt)
    assert cold_hits == 0
    assert warm_hits == len(prompt) // 32 * 32 > 0
    engines.assert_decoded(warm, prompt, config, tensors)
    assert [token for token, _ in cold] == [token for token, _ in warm]


@pytest.mark.e2e
@pytest.mark.parametrize("served", WHOLE_PREFILL, indirect=True)
def test_latent_attention_prefills_whole(served: tuple[Any, ...]) -> None:
    """What vLLM's CPU backend turns off for it, although the fixture asks for both."""
    llm, _, _ = served
    config = llm.llm_engine.vllm_config
    assert not config.scheduler_config.enable_chunked_prefill
    assert not config.cache_config.enable_prefix_caching


@pytest.mark.e2e
def test_kv_cache_shrinks_exactly_with_the_heads(served: tuple[Any, ...]) -> None:
    llm, config, _ = served
    kv_key = {"opt": "num_attention_heads", "gpt2": "n_head"}.get(config["model_type"], "num_key_value_heads")
    layers = [layer for layer in layers_of(config) if "attention" not in layer.skip]
    numbers = sum(2 * layer[kv_key] * checkpoints.HEAD_DIM for layer in layers)
    if config["model_type"] in checkpoints.LATENT:
        numbers = len(layers) * (512 + 64)
    token_bytes = numbers * 4
    cache = llm.llm_engine.vllm_config.cache_config
    assert cache.block_size == (16 if config["model_type"] in checkpoints.LATENT else 32)
    assert cache.num_gpu_blocks == engines.KV_BYTES // (cache.block_size * token_bytes)
    assert read_model_shape(config).kv_bytes_per_token(4) == token_bytes
