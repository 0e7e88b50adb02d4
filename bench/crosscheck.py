"""Our client, ``vllm bench serve`` and guidellm on the same server in turns: do they tell the same story?"""

import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from bench import environment, server_metrics
from bench.client import normalise_base_url
from bench.crosscheck_guidellm import guidellm_command, read_guidellm
from bench.runner import RunConfig, run
from bench.server import vllm_program
from bench.workloads import WorkloadSpec
from vllm_sparse.errors import UserError

SCHEMA = "vllm-sparse/bench-crosscheck/2"

# Our figure (metric, statistic) against vLLM's key.
FIGURES: dict[str, tuple[str, str | None, str]] = {
    "requests/s": ("requests_per_s", None, "request_throughput"),
    "output tokens/s": ("output_tokens_per_s", None, "output_throughput"),
    "mean TTFT": ("ttft_ms", "mean", "mean_ttft_ms"),
    "p99 TTFT": ("ttft_ms", "p99", "p99_ttft_ms"),
    "mean TPOT": ("tpot_ms", "mean", "mean_tpot_ms"),
    "p99 TPOT": ("tpot_ms", "p99", "p99_tpot_ms"),
    "mean E2E": ("e2e_ms", "mean", "mean_e2el_ms"),
    "p99 E2E": ("e2e_ms", "p99", "p99_e2el_ms"),
}


@dataclass(frozen=True, slots=True)
class CrossCheckConfig:
    """Equal load for all tools.

    Attributes:
        base_url: Server root.
        model: Served name.
        tokenizer: Tokenizer directory, which vLLM's tool needs.
        input_len: Prompt tokens.
        output_len: Generated tokens.
        num_requests: Requests per run.
        concurrency: Users at a time.
        repeats: Runs of each tool, in turns.
        tolerance: Allowed relative difference, in the median over the repeats.
        guidellm: The guidellm program, which usually lives in an environment of its own; None leaves it out.
    """

    base_url: str
    model: str
    tokenizer: Path
    input_len: int = 128
    output_len: int = 64
    num_requests: int = 64
    concurrency: int = 8
    repeats: int = 3
    tolerance: float = 0.03
    guidellm: str | None = None


Figures = dict[str, float]
Tool = Callable[[CrossCheckConfig, int], Figures]


def cross_check(
    config: CrossCheckConfig, say: Callable[[str], None], keep: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Run the tools in turns and compare their figures repeat by repeat.

    What decides is the median of the differences within a repeat, whose runs follow each other directly: a
    machine that gets slower from repeat to repeat does not enter, and neither does a single run gone wrong.
    What the machine does to one run and not to the next one still enters; ``beside_server`` of a row is free
    of it: each tool's mean is divided by the server's own mean of the same run before they are compared.

    Args:
        config: The load and the tools.
        say: Told about every run.
        keep: Gets the report after every repeat, so that an interrupted check leaves what it has.

    Raises:
        UserError: Another tool cannot be run, or a run of any had failed requests.
    """
    tools: dict[str, Tool] = {"ours": _ours, "vllm": _vllm}
    if config.guidellm is not None:
        tools["guidellm"] = guidellm_figures
    runs: dict[str, list[Figures]] = {name: [] for name in tools}
    servers: dict[str, list[Figures]] = {name: [] for name in tools}
    for repeat in range(config.repeats):
        order = list(tools)
        # Every tool takes every place, so that a drifting machine favours nobody.
        order = order[repeat % len(order) :] + order[: repeat % len(order)]
        for name in order:
            say(f"repeat {repeat + 1} of {config.repeats}: {name}")
            # Read before and after only; once an hour is never.
            with server_metrics.Watch(normalise_base_url(config.base_url), interval_s=3600.0) as watch:
                runs[name].append(tools[name](config, repeat))
            servers[name].append(server_figures(watch.summary(), config.output_len))
        if keep is not None:
            keep(_report(config, runs, servers))
    return _report(config, runs, servers)


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
    config: CrossCheckConfig, runs: dict[str, list[Figures]], servers: dict[str, list[Figures]]
) -> dict[str, Any]:
    rows = [
        _row(name, tool, runs["ours"], runs[tool])
        | {"beside_server": _beside_server(name, runs, servers, tool)}
        for tool in runs
        if tool != "ours"
        for name in FIGURES
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
        },
        "environment": {**environment.describe(), "command": environment.command_line()},
        "rows": rows,
        "runs": {name: list(figures) for name, figures in runs.items()},
        "servers": {name: list(figures) for name, figures in servers.items()},
        "ok": all(abs(row["difference"]) <= config.tolerance for row in rows),
    }


def _row(figure: str, tool: str, ours: Sequence[Figures], theirs: Sequence[Figures]) -> dict[str, Any]:
    a, b = (np.asarray([figures[figure] for figures in side]) for side in (ours, theirs))
    differences = a / b - 1
    return {
        "figure": figure,
        "tool": tool,
        "ours": float(np.median(a)),
        "theirs": float(np.median(b)),
        "difference": float(np.median(differences)),
        "differences": [float(differences.min()), float(differences.max())],
        "range_ours": float(np.ptp(a)),
        "range_theirs": float(np.ptp(b)),
    }


def _beside_server(
    figure: str, runs: dict[str, list[Figures]], servers: dict[str, list[Figures]], tool: str
) -> float | None:
    """Median difference of the two tools after each is divided by what the server said of the same run."""
    if not all(figure in found for name in ("ours", tool) for found in servers[name]):
        return None
    ours, theirs = (
        np.asarray([run[figure] / own[figure] for run, own in zip(runs[name], servers[name], strict=True)])
        for name in ("ours", tool)
    )
    return float(np.median(ours / theirs - 1))


def _ours(config: CrossCheckConfig, repeat: int) -> dict[str, float]:
    spec = WorkloadSpec(
        num_requests=config.num_requests,
        input_len=config.input_len,
        output_len=config.output_len,
        ignore_eos=True,
        seed=repeat,
        # vLLM's tool sends text, so the server has to tokenize it; ours sends ids unless told.
        as_text=True,
    )
    result = run(
        RunConfig(
            config.base_url,
            model=config.model,
            workload=spec,
            concurrency=config.concurrency,
            tokenizer=config.tokenizer,
            num_warmups=config.concurrency,
            # vLLM's tool asks for neither, and both cost the server something.
            continuous_usage=False,
            scrape=False,
        )
    )
    if not result.ok:
        raise UserError(f"our run had failed requests: {result.report['failures']}")
    metrics = result.report["metrics"]
    return {
        name: float(metrics[metric] if statistic is None else metrics[metric][statistic])
        for name, (metric, statistic, _) in FIGURES.items()
    }


def _vllm(config: CrossCheckConfig, repeat: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        command = vllm_command(config, repeat, Path(folder))
        done = subprocess.run(command, capture_output=True, text=True)
        results = list(Path(folder).glob("*.json"))
        if done.returncode != 0 or not results:
            tail = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
            raise UserError(f"`vllm bench serve` ended with exit code {done.returncode}:\n{tail}")
        figures = orjson.loads(results[0].read_bytes())
    if figures["completed"] != config.num_requests:
        raise UserError(
            f"`vllm bench serve` completed {figures['completed']} of {config.num_requests} requests."
        )
    return {name: float(figures[key]) for name, (_, _, key) in FIGURES.items()}


def vllm_command(config: CrossCheckConfig, repeat: int, folder: Path) -> Sequence[str]:
    """The ``vllm bench serve`` command with the same load."""
    options = {
        "--backend": "openai",
        "--base-url": normalise_base_url(config.base_url),
        "--endpoint": "/v1/completions",
        "--model": config.model,
        "--tokenizer": str(config.tokenizer),
        "--dataset-name": "random",
        "--random-input-len": str(config.input_len),
        "--random-output-len": str(config.output_len),
        "--num-prompts": str(config.num_requests),
        "--max-concurrency": str(config.concurrency),
        "--num-warmups": str(config.concurrency),
        # Another seed than ours, or the server's prefix cache would serve the second tool.
        "--seed": str(1000 + repeat),
        "--percentile-metrics": "ttft,tpot,itl,e2el",
        "--metric-percentiles": "99",
        "--result-dir": str(folder),
    }
    words = [word for pair in options.items() for word in pair]
    return [vllm_program(), "bench", "serve", *words, "--ignore-eos", "--save-result", "--disable-tqdm"]


def guidellm_figures(config: CrossCheckConfig, repeat: int) -> Figures:
    """One run of guidellm; its per-request times, summarised by our definitions."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        # Another seed again, so that no tool's prompts are in the prefix cache.
        command = guidellm_command(
            str(config.guidellm),
            normalise_base_url(config.base_url),
            config.model,
            config.tokenizer,
            lengths=(config.input_len, config.output_len),
            concurrency=config.concurrency,
            num_requests=config.num_requests,
            seed=2000 + repeat,
            report=path,
        )
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise UserError(f"--guidellm {config.guidellm}: {error.strerror}.") from error
        if done.returncode != 0 or not path.is_file():
            tail = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
            raise UserError(f"guidellm ended with exit code {done.returncode}:\n{tail}")
        return read_guidellm(path, config.num_requests)
