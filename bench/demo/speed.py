"""Decode and prefill at a real size: the same random weights, dense and 2:4, served side by side in bf16.

A CPU without bf16 instructions is slow at dense bf16 products, so whoever serves several users densely there
takes float32. That is served as well then, and 2:4 is compared with the faster one of the two.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.compare import CompareConfig, Observer, compare_models
from bench.demo import real_size
from bench.demo.steps import Steps
from bench.entries import RATIO_METRICS
from bench.kernels_dense import has_bf16_instructions
from bench.scenarios import Scenario
from converters.convert import convert

REPEATS = 3
# The plugin and vLLM compile alike; without compilation the servers start in seconds rather than minutes.
FLAGS = "--enforce-eager --max-model-len 1024 --max-num-seqs 8 --no-enable-prefix-caching"
SCENARIOS = (
    Scenario("decode-1", "decode-bound, batch 1", "tpot_ms", 32, 24, 1, 1),
    Scenario("decode-8", "decode-bound, batch 8", "tpot_ms", 32, 16, 8, 8),
    Scenario("prefill", "prefill-bound, 512 tokens", "ttft_ms", 512, 1, 2, 1),
)
# Where dense bf16 takes half a second for eight tokens, the same loads would take twenty minutes.
SHORT_SCENARIOS = (
    Scenario("decode-1", "decode-bound, batch 1", "tpot_ms", 32, 16, 1, 1),
    Scenario("decode-8", "decode-bound, batch 8", "tpot_ms", 16, 8, 8, 8),
    Scenario("prefill", "prefill-bound, 128 tokens", "ttft_ms", 128, 1, 1, 1),
)
FLOAT32 = "--dtype float32"


class _Progress(Observer):
    """One line per load test."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._planned = self._done = 0

    def say(self, text: str) -> None:
        # A starting server's log lines come as "starting NAME: ..."; the log file has them.
        if ": " not in text:
            self._steps.say(text)

    def planned(self, runs: int) -> None:
        self._planned = runs

    def measured(self, scenario: Scenario, model: Any, reports: Any) -> None:
        self._done += 1
        metrics = reports[scenario.name, model.name][-1]["metrics"]
        headline = metrics[scenario.headline]
        shown = headline["p50"] if isinstance(headline, dict) else headline
        self._steps.say(
            f"[{self._done}/{self._planned}] {scenario.title}, {model.name}: {scenario.headline} {shown:.1f}"
        )


def measure(out: Path, tokenizer_from: Path, steps: Steps) -> dict[str, Any]:
    """Make the real-size pair, serve it, return the ``bench-compare/1`` report."""
    dense, sparse = out / "real-size" / "dense", out / "real-size" / "2of4"
    with steps.step(f"write a {real_size.NAME}, and convert it to sparse-24-bitmask"):
        real_size.write_dense(dense, tokenizer_from)
        if not (sparse / "config.json").is_file():
            shutil.rmtree(sparse, ignore_errors=True)
            report = convert(dense, sparse)
            steps.say(f"{report.source_bytes / 1e9:.2f} -> {report.destination_bytes / 1e9:.2f} GB on disk")
    float32_too = not torch.cuda.is_available() and not has_bf16_instructions()
    config = CompareConfig(
        dense=dense,
        baselines=(dense,) if float32_too else (),
        baseline_args=FLOAT32 if float32_too else "",
        compressed=(sparse,),
        scenarios=SHORT_SCENARIOS if float32_too else SCENARIOS,
        repeats=REPEATS,
        serve_args=FLAGS,
        quality=False,
        log_dir=out / "logs",
    )
    dense_too = ", dense in float32 too," if float32_too else ""
    with steps.step(f"serve both in bf16{dense_too} and load them in turns"):
        return compare_models(config, _Progress(steps))


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
