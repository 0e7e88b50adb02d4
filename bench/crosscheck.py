"""Our client and ``vllm bench serve`` on the same server in turns: do they tell the same story?"""

import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from bench.client import normalise_base_url
from bench.runner import RunConfig, run
from bench.server import vllm_program
from bench.workloads import WorkloadSpec
from vllm_sparse.errors import UserError

SCHEMA = "vllm-sparse/bench-crosscheck/1"

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
    """Equal load for both tools.

    Attributes:
        base_url: Server root.
        model: Served name.
        tokenizer: Tokenizer directory, which vLLM's tool needs.
        input_len: Prompt tokens.
        output_len: Generated tokens.
        num_requests: Requests per run.
        concurrency: Users at a time.
        repeats: Runs of each tool, in turns.
        tolerance: Allowed relative difference of the medians over the repeats.
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


def cross_check(config: CrossCheckConfig, say: Callable[[str], None]) -> dict[str, Any]:
    """Run both tools in turns and compare the medians of their figures.

    Raises:
        UserError: vLLM's tool cannot be run, or a run of either had failed requests.
    """
    ours: list[dict[str, float]] = []
    theirs: list[dict[str, float]] = []
    for repeat in range(config.repeats):
        for side in ("ours", "vllm") if repeat % 2 == 0 else ("vllm", "ours"):
            say(f"repeat {repeat + 1} of {config.repeats}: {side}")
            if side == "ours":
                ours.append(_ours(config, repeat))
            else:
                theirs.append(_vllm(config, repeat))
    rows = [_row(name, ours, theirs) for name in FIGURES]
    return {
        "schema": SCHEMA,
        "tolerance": config.tolerance,
        "repeats": config.repeats,
        "rows": rows,
        "ok": all(abs(row["difference"]) <= config.tolerance for row in rows),
    }


def _row(name: str, ours: Sequence[dict[str, float]], theirs: Sequence[dict[str, float]]) -> dict[str, Any]:
    a, b = ([figures[name] for figures in side] for side in (ours, theirs))
    return {
        "figure": name,
        "ours": float(np.median(a)),
        "vllm": float(np.median(b)),
        "difference": float(np.median(a) / np.median(b) - 1),
        "range_ours": float(np.ptp(a)),
        "range_vllm": float(np.ptp(b)),
    }


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
