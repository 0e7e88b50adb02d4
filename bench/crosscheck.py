"""Our client, ``vllm bench serve`` and guidellm on the same server in turns: do they tell the same story?

All send the same requests (:mod:`bench.crosscheck_tools`), and what is compared is computed from every
single request by one set of definitions.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bench import environment, server_metrics
from bench.client import normalise_base_url
from bench.crosscheck_tools import CrossCheckConfig, Figures, Run, at_once, tools_of
from vllm_sparse.errors import UserError

SCHEMA = "vllm-sparse/bench-crosscheck/3"

FIGURES = (
    "requests/s",
    "output tokens/s",
    *(f"{statistic} {latency}" for latency in ("TTFT", "TPOT", "E2E") for statistic in ("mean", "p99")),
)
_RESAMPLES = 1000
_STRETCHES = 10


def cross_check(
    config: CrossCheckConfig, say: Callable[[str], None], keep: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Run the tools in turns and compare their figures.

    Throughput and means are compared repeat by repeat, whose runs follow each other directly: the median of
    these differences decides, so a machine that gets slower from repeat to repeat does not enter, and neither
    does a single run gone wrong. A p99 rests on the slowest hundredth, so all repeats are pooled for it.
    Every latency's pooled difference has a 95 % interval (``pooled``); one that reaches beyond the tolerance
    says that the tools may agree or not, and that the check was too short. What the machine does to one
    run and not to the next one still enters; ``beside_server`` of a row is free of it: each tool's mean is
    divided by the server's own mean of the same run before they are compared.

    Args:
        config: The load and the tools.
        say: Told about every run.
        keep: Gets the report after every repeat, so that an interrupted check leaves what it has.

    Raises:
        UserError: Another tool cannot be run, a run of any had failed requests, or the server answered from
            its prefix cache, which flatters whoever comes second.
    """
    tools = tools_of(config)
    runs: dict[str, list[Run]] = {name: [] for name in tools}
    servers: dict[str, list[Figures]] = {name: [] for name in tools}
    for repeat in range(config.repeats):
        if config.together:
            say(f"repeat {repeat + 1} of {config.repeats}: all at once")
            with server_metrics.Watch(normalise_base_url(config.base_url), interval_s=3600.0) as watch:
                for name, run in at_once(config, repeat).items():
                    runs[name].append(run)
            _refuse_cached(watch.summary())
            if keep is not None:
                keep(_report(config, runs, servers))
            continue
        order = list(tools)
        # Every tool takes every place, so that a drifting machine favours nobody.
        order = order[repeat % len(order) :] + order[: repeat % len(order)]
        for name in order:
            say(f"repeat {repeat + 1} of {config.repeats}: {name}")
            # Read before and after only; once an hour is never.
            with server_metrics.Watch(normalise_base_url(config.base_url), interval_s=3600.0) as watch:
                runs[name].append(tools[name](config, repeat))
            summary = watch.summary()
            _refuse_cached(summary)
            servers[name].append(server_figures(summary, config.output_len))
        if keep is not None:
            keep(_report(config, runs, servers))
    return _report(config, runs, servers)


def _refuse_cached(summary: Mapping[str, Any] | None) -> None:
    hits = (summary or {}).get("prefix_cache_hits")
    if hits:
        raise UserError(
            f"the server had {hits:.0f} prompt tokens in its prefix cache, and all tools send the same ones; "
            "start it with --no-enable-prefix-caching."
        )


def server_figures(summary: Mapping[str, Any] | None, output_len: int) -> Figures:
    """The server's own means of a run in ms, warm-ups included; empty where it has no such page."""
    found = summary or {}
    if "ttft_ms" not in found or "e2e_ms" not in found:
        return {}
    ttft, e2e = found["ttft_ms"]["mean"], found["e2e_ms"]["mean"]
    figures = {"mean TTFT": ttft, "mean E2E": e2e}
    # All answers have the same length, so the mean of the quotients is the quotient of the means.
    return figures | ({"mean TPOT": (e2e - ttft) / (output_len - 1)} if output_len > 1 else {})


def _report(
    config: CrossCheckConfig, runs: Mapping[str, Sequence[Run]], servers: Mapping[str, Sequence[Figures]]
) -> dict[str, Any]:
    figures = {name: [run.figures() for run in found] for name, found in runs.items()}
    rows = [
        _row(
            name,
            tool,
            figures["ours"],
            figures[tool],
            pooled(name, runs["ours"], runs[tool], together=config.together),
        )
        | {"beside_server": _beside_server(name, figures, servers, tool)}
        for tool in runs
        if tool != "ours"
        for name in FIGURES
        if name in figures["ours"][0]
    ]
    return {
        "schema": SCHEMA,
        "tolerance": config.tolerance,
        "repeats": len(runs["ours"]),
        "load": {
            "input_len": config.input_len,
            "output_len": config.output_len,
            "num_requests": config.num_requests,
            "concurrency": config.concurrency,
            "together": config.together,
        },
        "environment": {**environment.describe(), "command": environment.command_line()},
        "rows": rows,
        "runs": figures,
        "servers": {name: list(found) for name, found in servers.items()},
        "samples_ms": {
            name: [
                {key: np.round(values, 3).tolist() for key, values in run.samples.items()} for run in found
            ]
            for name, found in runs.items()
        },
        "ok": all(abs(row["difference"]) <= config.tolerance for row in rows),
    }


def pooled(
    figure: str, ours: Sequence[Run], theirs: Sequence[Run], *, together: bool = False
) -> dict[str, Any] | None:
    """A latency's figure over the requests of all repeats, and the difference with its 95 % interval.

    The bootstrap draws repeats in pairs, and requests within each run for itself. Of tools that ran together
    it draws stretches of time, the same for both, because what happened to the machine then happened to both.
    None for throughput.
    """
    statistic, _, latency = figure.partition(" ")
    if latency not in ours[0].samples:
        return None

    def value(values: np.ndarray) -> float:
        return float(values.mean() if statistic == "mean" else np.percentile(values, 99))

    cut = _stretches if together else _whole
    units = [pair for a, b in zip(ours, theirs, strict=True) for pair in cut(a, b, latency)]
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(_RESAMPLES):
        chosen = [units[index] for index in rng.integers(0, len(units), len(units))]
        sides = [[pair[side] for pair in chosen] for side in (0, 1)]
        if not together:
            sides = [[rng.choice(values, len(values)) for values in side] for side in sides]
        a, b = (np.concatenate(side) for side in sides)
        if len(a) and len(b):
            ratios.append(value(a) / value(b) - 1)
    whole = [np.concatenate([run.samples[latency] for run in side]) for side in (ours, theirs)]
    low, high = np.percentile(ratios, [2.5, 97.5])
    return {
        "ours": value(whole[0]),
        "theirs": value(whole[1]),
        "difference": value(whole[0]) / value(whole[1]) - 1,
        "ci95": [float(low), float(high)],
        "requests": [len(values) for values in whole],
    }


Pair = tuple[np.ndarray, np.ndarray]


def _whole(ours: Run, theirs: Run, latency: str) -> list[Pair]:
    return [(ours.samples[latency], theirs.samples[latency])]


def _stretches(ours: Run, theirs: Run, latency: str) -> list[Pair]:
    """The values of both runs in equal stretches of their common time."""
    begin = min(ours.sent_s.min(), theirs.sent_s.min())
    length = (max(ours.sent_s.max(), theirs.sent_s.max()) - begin) / _STRETCHES
    places = [np.minimum((run.sent_s - begin) // length, _STRETCHES - 1) for run in (ours, theirs)]
    sides = (ours.samples[latency], theirs.samples[latency])
    return [(sides[0][places[0] == i], sides[1][places[1] == i]) for i in range(_STRETCHES)]


def _row(
    figure: str,
    tool: str,
    ours: Sequence[Figures],
    theirs: Sequence[Figures],
    over_all: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    a, b = (np.asarray([figures[figure] for figures in side]) for side in (ours, theirs))
    differences = a / b - 1
    decides = float(np.median(differences))
    if over_all is not None and figure.startswith("p99"):
        decides = over_all["difference"]
    return {
        "figure": figure,
        "tool": tool,
        "ours": float(np.median(a)),
        "theirs": float(np.median(b)),
        "difference": decides,
        "differences": [float(differences.min()), float(differences.max())],
        "range_ours": float(np.ptp(a)),
        "range_theirs": float(np.ptp(b)),
        "pooled": over_all,
    }


def _beside_server(
    figure: str, runs: Mapping[str, Sequence[Figures]], servers: Mapping[str, Sequence[Figures]], tool: str
) -> float | None:
    """Median difference of the two tools after each is divided by what the server said of the same run."""
    if not all(servers.values()) or not all(
        figure in found for name in ("ours", tool) for found in servers[name]
    ):
        return None
    ours, theirs = (
        np.asarray([run[figure] / own[figure] for run, own in zip(runs[name], servers[name], strict=True)])
        for name in ("ours", tool)
    )
    return float(np.median(ours / theirs - 1))
