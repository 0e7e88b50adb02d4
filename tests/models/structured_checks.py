"""Checks that run in a process of their own and are therefore importable by name."""

from pathlib import Path
from typing import Any

import structured_engine as engines
from structured_reference import Tensors


def check_ngram(folder: Path, config: dict[str, Any], tensors: Tensors) -> None:
    """Prompts that repeat themselves, so that the draft has something to propose."""
    speculation = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
    }
    with engines.engine(folder, speculative_config=speculation, disable_log_stats=False) as llm:
        for prompt in (engines.prompts(1)[0][:12] * 5, engines.prompts(1, seed=3)[0]):
            pairs, _ = engines.decode(llm, prompt, 24)
            engines.assert_decoded(pairs, prompt, config, tensors)
        drafted = {metric.name: metric for metric in llm.get_metrics()}["vllm:spec_decode_num_draft_tokens"]
        assert drafted.value > 0
