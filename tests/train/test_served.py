"""What every method writes is served by vLLM with the perplexity that it reported."""

import gc
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from converters.convert import convert
from converters.train.compress import compress_model
from converters.train.corpus import load_corpus
from converters.train.evaluate import windows
from converters.train.loading import load_model
from converters.train.packing import encode_documents
from converters.train.structured import read_layer_shapes

from .conftest import make_moe

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

CONTEXT, TOKENS = 32, 2000
SHORT = {"steps": 20, "batch_size": 8, "warmup": 2}
HALF = {"sparsity": 0.5, "channel_multiple": 32}
# Method, options, and whether its result is packed before it is served.
DENSE_MODELS = [
    ("magnitude", {}, True),
    ("wanda", {"samples": 8}, True),
    ("sparsegpt", {"samples": 8}, True),
    ("gradual", {"optimiser": SHORT}, True),
    ("ast", {"optimiser": SHORT}, True),
    ("ast", {"optimiser": SHORT, "slorb": {"block": 16}}, False),
    ("cast", {"optimiser": SHORT}, True),
    ("maskllm", {"optimiser": SHORT, "prior": "magnitude"}, True),
    ("pretrain24", {"optimiser": SHORT, "start": "model", "masked_decay": 1e-3, "dense_tail": 0.0}, True),
    ("pretrain24", {"optimiser": SHORT, "start": "model", "rule": "s-ste"}, True),
    ("pretrain24", {"optimiser": SHORT, "start": "model", "masked_decay": 1e-3}, False),
    ("requant", {"samples": 4, "points": 2, "outliers": 0.02}, False),
    ("magnitude-sp", HALF, False),
    ("wanda-sp", {**HALF, "samples": 8}, False),
    ("llm-pruner", {**HALF, "samples": 4}, False),
    ("flap", {**HALF, "samples": 8}, False),
    ("shortgpt", {"sparsity": 0.5, "samples": 8}, False),
    ("ddp", {**HALF, "optimiser": SHORT}, False),
    ("ddp", {**HALF, "optimiser": SHORT, "budget": "layer"}, False),
    ("hard-concrete", {**HALF, "optimiser": SHORT}, False),
    ("structured-ffn", {}, False),
]
MOE_MODELS = [
    ("reap", {"sparsity": 0.5, "samples": 8}, False),
    ("heapr", {"sparsity": 0.5, "samples": 8, "channel_multiple": 16}, False),
    ("camera-p", {"sparsity": 0.25, "samples": 8, "channel_multiple": 16, "experts": "ragged"}, False),
]


@pytest.fixture(scope="module")
def moe_dir(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_moe(tmp_path_factory.mktemp("moe") / "m", tokenizer)


def served_perplexity(folder: Path, text_file: Path) -> float:
    """Teacher-forced over the windows that ``compress_model`` measured on."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    stream = encode_documents(load_corpus(str(text_file), 0.05).heldout, load_model(folder).tokenizer, TOKENS)
    prompts = [{"prompt_token_ids": piece.tolist()} for piece in windows(stream, CONTEXT)]
    llm: Any = LLM(
        str(folder), dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=8,
        kv_cache_memory_bytes=8 * 2**20, block_size=32, skip_tokenizer_init=True, disable_log_stats=True,
        enable_prefix_caching=False,
    )  # fmt: skip
    try:
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        outputs = llm.generate(prompts, params, use_tqdm=False)
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()
    found = [
        entry[token].logprob
        for output in outputs
        for token, entry in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    ]
    return math.exp(-sum(found) / len(found))


def check(
    model: Path, method: str, options: dict[str, Any], pack: bool, text_file: Path, where: Path
) -> None:
    torch.set_num_threads(1)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    result = compress_model(
        method, model, where / "out", str(text_file), quiet=True, eval_tokens=TOKENS, save_dtype="float32",
        data_options={"sequence_length": CONTEXT}, **{"run": {"device": "cpu"}, **options},
    )  # fmt: skip
    folder = where / "out"
    if pack:
        assert result.kind == "2:4"
        convert(folder, where / "packed")
        folder = where / "packed"
    served = served_perplexity(folder, text_file)
    assert served == pytest.approx(result.compressed.perplexity, rel=5e-3)


@pytest.mark.parametrize(("method", "options", "pack"), DENSE_MODELS)
def test_dense_families(method: str, options: dict, pack: bool, trained_dir: Path, text_file: Path, tmp_path):
    check(trained_dir, method, options, pack, text_file, tmp_path)


def test_query_heads_inside_kv_groups(gqa_dir: Path, text_file: Path, tmp_path: Path):
    """KV heads that kept unequal numbers of query heads, filled up with zero heads."""
    options = {"optimiser": {**SHORT, "lr": 5e-2}, "prune": ["query-heads"], "sparsity": 0.4}
    check(gqa_dir, "ddp", options, False, text_file, tmp_path)
    layers = read_layer_shapes(json.loads((tmp_path / "out" / "config.json").read_text()))
    assert sum(layer.num_attention_heads for layer in layers) > 10  # of 16 heads 6 went, padding came


@pytest.mark.parametrize(("method", "options", "pack"), MOE_MODELS)
def test_mixtures_of_experts(
    method: str, options: dict, pack: bool, moe_dir: Path, text_file: Path, tmp_path
):
    check(moe_dir, method, options, pack, text_file, tmp_path)
