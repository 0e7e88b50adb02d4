"""2:4 against the faster one of two dense servers, in bf16 and in float32.

A CPU without bf16 instructions is slow at dense bf16 products, so whoever serves several users densely there
takes float32.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bench.entries import RATIO_METRICS
from bench.kernels_dense import has_bf16_instructions

# Words for a baseline's ``vllm serve``.
FLOAT32 = "--dtype float32"


def is_float32_a_rival() -> bool:
    """Whether dense serving in float32 may be faster than in bf16 on this machine."""
    return not torch.cuda.is_available() and not has_bf16_instructions()


def against_best_dense(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One entry per scenario of a ``bench-compare/1`` report: 2:4 against the best dense server by metric.

    Each is the entry whose dense server has the better headline, with the figures of others where those are
    better; ``best_dense`` says whose a metric is.
    """
    candidates = {model["name"] for model in report["models"] if model["role"] == "compressed"}
    entries: dict[str, list[Mapping[str, Any]]] = {}
    for entry in report["scenarios"]:
        if entry["candidate"] in candidates:
            entries.setdefault(entry["name"], []).append(entry)
    return [_best_of(same) for same in entries.values()]


def _best_of(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Entries of one scenario, against several dense servers, as one."""
    best = {metric: min(entries, key=lambda e: _dense_rank(e, metric)) for metric in RATIO_METRICS}
    headline = best[entries[0]["headline"]]
    dense = {metric: entry["dense"][metric] for metric, entry in best.items()}
    ratios = {m: entry["ratio"][m] for m, entry in best.items() if m in entry["ratio"]}
    return {
        **headline,
        "dense": {**headline["dense"], **dense},
        "ratio": ratios,
        "best_dense": {metric: entry["baseline"] for metric, entry in best.items()},
    }


def _dense_rank(entry: Mapping[str, Any], metric: str) -> float:
    """The lower the better; a server that answered nothing is the last."""
    statistic, lower_is_better = RATIO_METRICS[metric]
    value = entry["dense"][metric]
    value = value if statistic is None else value[statistic]
    if value is None:
        return float("inf")
    return float(value) if lower_is_better else -float(value)


def dense_dtypes(models: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The dtype that each dense server of a ``bench-compare/1`` report ran in, by name."""
    dtypes = {"dense": "bf16", "baseline": "float32"}
    return {model["name"]: dtypes[model["role"]] for model in models if model["role"] in dtypes}
