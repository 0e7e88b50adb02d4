"""A real vLLM engine in this process, and its log-probabilities."""

import contextlib
import gc
import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from structured_reference import Tensors, logprobs

#: KV memory given to every engine, in bytes.
KV_BYTES = 8 * 2**20


@contextlib.contextmanager
def engine(folder: Path, **options: Any) -> Iterator[Any]:
    """Start an engine on a checkpoint folder and take it down again."""
    import vllm

    _register(folder)
    # One thread: these models are tiny, and two threads that wait for each other on a busy machine
    # take ten times as long. The variable below would override the budget of KV_BYTES.
    torch.set_num_threads(1)
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    settings: dict[str, Any] = {
        "model": str(folder),
        "dtype": "float32",
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "max_model_len": 256,
        "max_num_seqs": 4,
        "kv_cache_memory_bytes": KV_BYTES,
        "block_size": 32,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        **options,
    }
    # vLLM collects garbage several times per engine; what is alive now need not be looked through each time.
    gc.freeze()
    llm: Any = None
    try:
        llm = vllm.LLM(**settings)
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        # Something that vLLM imports keeps this frame alive, which must not keep the model.
        del llm
        gc.unfreeze()


def _register(folder: Path) -> None:
    """Register as the plugin does, and all families but Llama once more by class.

    vLLM inspects a class registered by name in a fresh process, some 10 s each time; Llama's engines
    take that way, which is the users', and the others need not repeat it.
    """
    from vllm import ModelRegistry

    from vllm_sparse.models import register_models

    register_models()
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] != "llama":
        module = importlib.import_module(f"vllm_sparse.models.{config['model_type']}")
        (name,) = config["architectures"]
        ModelRegistry.register_model(name, getattr(module, name))


def prompts(count: int = 3, longest: int = 100, seed: int = 1) -> list[list[int]]:
    """Random prompts of unequal lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(longest // 2, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, 256, (n,), generator=generator).tolist() for n in lengths]


def run(
    llm: Any, ids: list[list[int]], new_tokens: int = 6, **request: Any
) -> list[tuple[list[int], list[float]]]:
    """Greedy generation: per prompt all ids, and the log-probability of each after the first."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0, max_tokens=new_tokens, prompt_logprobs=0, logprobs=0, detokenize=False, ignore_eos=True
    )
    outputs = llm.generate([{"prompt_token_ids": i} for i in ids], sampling, use_tqdm=False, **request)
    results = []
    for output in outputs:
        everything = list(output.prompt_token_ids) + list(output.outputs[0].token_ids)
        steps = list(output.prompt_logprobs)[1:] + list(output.outputs[0].logprobs)
        values = [step[token].logprob for step, token in zip(steps, everything[1:], strict=True)]
        results.append((everything, values))
    return results


def assert_parity(
    results: list[tuple[list[int], list[float]]],
    config: dict[str, Any],
    tensors: Tensors,
    new_tokens: int = 6,
) -> None:
    """Every log-probability within 1e-4 of the reference, every greedy token its arg max."""
    for ids, values in results:
        expected = logprobs(tensors, config, ids[:-1])
        actual = torch.tensor(values, dtype=torch.float64)
        wanted = expected.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert wanted.std() > 0.1, "a reference this flat could not tell a wrong model from a right one"
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-4)
        assert expected[-new_tokens:].argmax(-1).tolist() == ids[-new_tokens:]


def long_prompts(config: dict[str, Any]) -> list[list[int]]:
    """Random prompts of 20 x 220 tokens, with 4,380 positions to score."""
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(3, config["vocab_size"], (220,), generator=generator).tolist() for _ in range(20)]


def assert_contract(llm: Any, config: dict[str, Any], tensors: Tensors) -> None:
    """Over at least 4,000 positions: mean distance at most 1e-4, the same top token in 99.9 %.

    Teacher-forced, so that one differing token changes nothing after it; printed, so that documents can cite.
    """
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)
    ids = long_prompts(config)
    outputs = llm.generate([{"prompt_token_ids": i} for i in ids], sampling, use_tqdm=False)
    distances, agreements = [], []
    for prompt, output in zip(ids, outputs, strict=True):
        expected = logprobs(tensors, config, prompt[:-1])
        wanted = expected.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        steps = output.prompt_logprobs[1:]
        values = [step[token].logprob for step, token in zip(steps, prompt[1:], strict=True)]
        distances.append((torch.tensor(values, dtype=torch.float64) - wanted).abs())
        tops = [max(step, key=lambda token, step=step: step[token].logprob) for step in steps]
        agreements.append(expected.argmax(-1) == torch.tensor(tops))
    distance, agreement = torch.cat(distances), torch.cat(agreements).double().mean().item()
    sys.stdout.write(
        f"\n{config['model_type']}: {len(distance)} positions, mean |dlogprob| {distance.mean():.2e}, "
        f"max {distance.max():.2e}, top-1 {agreement:.4%}\n"
    )
    assert len(distance) >= 4000
    assert distance.mean() <= 1e-4
    assert agreement >= 0.999


def decode(
    llm: Any, prompt: list[int], new_tokens: int = 6, **request: Any
) -> tuple[list[tuple[int, float]], int]:
    """Greedy (token, log-probability) pairs of one prompt, and how many prompt tokens were cached.

    Asking for no prompt log-probabilities is what lets the engine read its prefix cache.
    """
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0, max_tokens=new_tokens, logprobs=0, detokenize=False, ignore_eos=True
    )
    (output,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False, **request)
    tokens = list(output.outputs[0].token_ids)
    pairs = [
        (token, step[token].logprob) for token, step in zip(tokens, output.outputs[0].logprobs, strict=True)
    ]
    return pairs, output.num_cached_tokens


def assert_decoded(
    pairs: list[tuple[int, float]], prompt: list[int], config: dict[str, Any], tensors: Tensors
) -> None:
    """Generated tokens and log-probabilities are the reference's."""
    tokens = [token for token, _ in pairs]
    expected = logprobs(tensors, config, (prompt + tokens)[:-1])[len(prompt) - 1 :]
    assert expected.argmax(-1).tolist() == tokens
    wanted = expected.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    torch.testing.assert_close(
        torch.tensor([v for _, v in pairs], dtype=torch.float64), wanted, rtol=0, atol=1e-4
    )
