"""Runs of a scenario on two models as one entry of a comparison: averaged figures and their ratios."""

from collections.abc import Mapping, Sequence
from typing import Any

from bench.scenarios import Scenario
from bench.statistics import paired_ratio, summarise

RATIO_METRICS: dict[str, tuple[str | None, bool]] = {
    "ttft_ms": ("p50", True),
    "tpot_ms": ("p50", True),
    "e2e_ms": ("p50", True),
    "output_tokens_per_s": (None, False),
    "total_tokens_per_s": (None, False),
    "requests_per_s": (None, False),
}
"""Metrics that get a ratio: the statistic used (None: the number itself), and whether lower is better."""


def is_complete(report: Mapping[str, Any]) -> bool:
    """Whether every planned request of a run was answered."""
    return _not_completed(report) == 0


def scenario_entry(
    scenario: Scenario, dense: Sequence[Mapping[str, Any]], compressed: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """One entry of ``scenarios``: averaged metrics of both, ratios, and the values behind them.

    Args:
        scenario: What was run.
        dense: Run reports of the baseline, one per repeat.
        compressed: Run reports of the candidate, same order and seeds.
    """
    pairs = [[report["metrics"] for report in reports] for reports in (dense, compressed)]
    repeats = {role: _repeat_values(side) for role, side in zip(("dense", "compressed"), pairs, strict=True)}
    return {
        "name": scenario.name,
        "title": scenario.title,
        "headline": scenario.headline,
        "settings": scenario.as_json(),
        "dense": average(pairs[0]),
        "compressed": average(pairs[1]),
        "ratio": _ratios(repeats["dense"], repeats["compressed"]),
        "repeats": len(dense),
        "repeat_values": repeats,
        "samples": {"dense": _samples(dense), "compressed": _samples(compressed)},
        "failed": sum(_not_completed(report) for report in (*dense, *compressed)),
        "valid": all(report["validity"]["valid"] for report in (*dense, *compressed)),
    }


def _not_completed(report: Mapping[str, Any]) -> int:
    return int(report["requests"]["planned"] - report["requests"]["completed"])


def _repeat_values(metrics: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """The figure each ratio is made of, per repeat."""
    values: dict[str, list[float | None]] = {}
    for name, (statistic, _) in RATIO_METRICS.items():
        values[name] = [entry[name] if statistic is None else entry[name][statistic] for entry in metrics]
    return values


def _ratios(
    dense: Mapping[str, Sequence[float | None]], compressed: Mapping[str, Sequence[float | None]]
) -> dict[str, Any]:
    ratios: dict[str, Any] = {}
    for name, (statistic, lower_is_better) in RATIO_METRICS.items():
        pairs = [(a, b) for a, b in zip(dense[name], compressed[name], strict=True) if a and b]
        if pairs:
            estimate = paired_ratio(*zip(*pairs, strict=True), lower_is_better=lower_is_better)
            ratios[name] = {**estimate.as_json(), "statistic": statistic or "value", "pairs": len(pairs)}
    return ratios


def _samples(reports: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Latencies of single requests over all repeats, for distribution plots."""
    samples: dict[str, list[float]] = {"ttft_ms": [], "e2e_ms": []}
    for report in reports:
        raw = report["raw"]
        for name, moment in (("ttft_ms", "first_token_ms"), ("e2e_ms", "last_token_ms")):
            pairs = zip(raw["dispatched_ms"], raw[moment], raw["outcome"], strict=True)
            samples[name] += [round(b - a, 3) for a, b, how in pairs if how == "completed" and b is not None]
    return samples


def average(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Metrics of several repeats as one: numbers averaged, counts ``n`` added, texts of the first."""
    merged: dict[str, Any] = {}
    for name in metrics[0]:
        values = [entry[name] for entry in metrics if entry.get(name) is not None]
        if not values:
            merged[name] = None
        elif isinstance(values[0], Mapping):
            merged[name] = average(values)
        elif name == "n":
            merged[name] = sum(values)
        elif isinstance(values[0], int | float):
            merged[name] = summarise(values)["mean"]
        else:
            merged[name] = values[0]
    return merged
