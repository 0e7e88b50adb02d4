"""One in-process vLLM engine at a time, asked for the logprobs of given tokens."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PROMPTS, LENGTH = 8, 96
# The smallest number of prompts with at least 4,000 scored positions.
MANY_PROMPTS = 43
KV_CACHE_BYTES = 1 << 24


@dataclass(frozen=True)
class Scores:
    """Teacher-forced results: ``logprobs [prompts, LENGTH - 1]`` and the model's own top-1 tokens."""

    logprobs: Tensor
    top1: Tensor


def prompts(vocab: int, count: int = PROMPTS) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, vocab, (count, LENGTH), generator=generator)
    return [{"prompt_token_ids": row} for row in tokens.tolist()]


@contextmanager
def unset(variable: str) -> Iterator[None]:
    """The environment without a variable; what is set meanwhile, by the plugin for instance, stays."""
    value = os.environ.pop(variable, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[variable] = value


@contextmanager
def engine(folder: Path, dtype: str = "float32", **options: Any) -> Iterator[Any]:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm: Any = None
    # vLLM collects garbage several times per engine; what is alive now need not be looked through each time.
    gc.freeze()
    try:
        # The variable would override kv_cache_memory_bytes.
        with unset("VLLM_CPU_KVCACHE_SPACE"):
            llm = LLM(
                str(folder),
                dtype=dtype,
                enforce_eager=options.pop("enforce_eager", True),
                max_model_len=256,
                max_num_seqs=8,
                kv_cache_memory_bytes=KV_CACHE_BYTES,
                skip_tokenizer_init=True,
                enable_prefix_caching=False,
                **options,
            )
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        else:
            # As the shutdown does: the next model may need groups that this one has not, for experts say.
            cleanup_dist_env_and_memory()
        # Something that vLLM imports keeps this frame alive, which must not keep the model.
        del llm
        gc.unfreeze()


def score(llm: Any, vocab: int, count: int = PROMPTS) -> Scores:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1, detokenize=False)
    outputs = llm.generate(prompts(vocab, count), params, use_tqdm=False)
    logprobs, top1 = [], []
    for output in outputs:
        positions = list(zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True))
        logprobs.append([entry[token].logprob for token, entry in positions])
        top1.append([next(t for t, lp in entry.items() if lp.rank == 1) for _, entry in positions])
    return Scores(torch.tensor(logprobs), torch.tensor(top1))


def packed_layers(llm: Any) -> dict[str, str]:
    """Module name -> backend, for every layer that holds a packed 2:4 weight."""
    model = llm.llm_engine.model_executor.driver_worker.worker.get_model()
    return {
        name: module.sparse_backend.name
        for name, module in model.named_modules()
        if hasattr(module, "sparse_backend")
    }


def serve_and_score(
    folder: Path, vocab: int, dtype: str = "float32", count: int = PROMPTS, **options: Any
) -> Scores:
    with engine(folder, dtype, **options) as llm:
        return score(llm, vocab, count)
