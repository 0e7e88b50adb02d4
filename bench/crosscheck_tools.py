"""The tools of a cross-check: each sends the same requests to the same server and reports every one of them.

Equal means equal: the same prompts in the same order, the same lengths, greedy sampling (``vllm bench serve``
and guidellm leave the temperature to the server otherwise, which is 1, and sampling costs it time), no
running token counts (guidellm asks for them otherwise), streams over the completions endpoint.
"""

import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from bench.client import normalise_base_url
from bench.crosscheck_guidellm import guidellm_command, read_guidellm
from bench.records import Outcome
from bench.runner import RunConfig, run
from bench.server import vllm_program
from bench.tokenizer import load_tokenizer
from bench.workloads import WorkloadSpec, build
from vllm_sparse.errors import UserError

Figures = dict[str, float]
Samples = dict[str, np.ndarray]
"""TTFT, TPOT and E2E of every request in milliseconds."""


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
        tolerance: Allowed relative difference.
        guidellm: The guidellm program, which usually lives in an environment of its own; None leaves it out.
        together: All tools at the same time, each with ``concurrency`` users, instead of in turns.
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
    together: bool = False

    def workload(self, repeat: int) -> WorkloadSpec:
        """What every tool sends in that repeat; text, as the others cannot send token ids."""
        return WorkloadSpec(
            num_requests=self.num_requests,
            input_len=self.input_len,
            output_len=self.output_len,
            ignore_eos=True,
            seed=repeat,
            as_text=True,
        )


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one tool.

    Attributes:
        seconds: From the first request to the last answer.
        tokens: Generated in all.
        samples: Latencies of every request.
        sent_s: When each was sent, on the machine's monotonic clock.
    """

    seconds: float
    tokens: int
    samples: Samples
    sent_s: np.ndarray

    def figures(self) -> Figures:
        """What is compared, by one set of definitions."""
        count = len(self.samples["TTFT"])
        found = {"requests/s": count / self.seconds, "output tokens/s": self.tokens / self.seconds}
        for name, values in self.samples.items():
            found[f"mean {name}"] = float(values.mean())
            found[f"p99 {name}"] = float(np.percentile(values, 99))
        return found

    def between(self, begin: float, end: float) -> "Run":
        """What was sent in that time, of answers of equal lengths."""
        kept = (self.sent_s >= begin) & (self.sent_s <= end)
        tokens = round(self.tokens * kept.mean())
        samples = {name: values[kept] for name, values in self.samples.items()}
        return Run(end - begin, tokens, samples, self.sent_s[kept])


Tool = Callable[[CrossCheckConfig, int], Run]


def at_once(config: CrossCheckConfig, repeat: int) -> dict[str, Run]:
    """All tools on the server at the same time; kept is what they sent while every one of them was sending.

    Each tool starts in its own time. Ours, the quickest, stays in this thread, which handles signals, and
    sends until the others are done.

    Raises:
        UserError: A tool failed, or was done before another one had begun.
    """
    others = {name: tool for name, tool in tools_of(config).items() if name != "ours"}
    with ThreadPoolExecutor(len(others) + 1) as pool:
        futures = {name: pool.submit(tool, config, repeat) for name, tool in others.items()}
        done = threading.Event()
        pool.submit(_set_after, futures.values(), done)
        runs = {"ours": ours(replace(config, num_requests=_MORE * config.num_requests), repeat, until=done)}
        runs |= {name: future.result() for name, future in futures.items()}
    return common(runs)


def _set_after(futures: Iterable[Future[Run]], done: threading.Event) -> None:
    wait(futures)
    done.set()


def common(runs: Mapping[str, Run]) -> dict[str, Run]:
    """The part of every run that lies in the time common to all.

    Raises:
        UserError: There is no such time.
    """
    begin = max(run.sent_s.min() for run in runs.values())
    end = min(run.sent_s.max() for run in runs.values())
    kept = {name: run.between(begin, end) for name, run in runs.items() if begin < end}
    if len(kept) < len(runs) or any(len(run.sent_s) < _FEWEST for run in kept.values()):
        raise UserError("the tools hardly ran at the same time; give them more requests with --num-requests.")
    return kept


_MORE = 100
"""Times as many requests at hand for our client, which begins before the others have started."""
_FEWEST = 8


def tools_of(config: CrossCheckConfig) -> dict[str, Tool]:
    """The tools that take part, ours first."""
    tools: dict[str, Tool] = {"ours": ours, "vllm": vllm}
    if config.guidellm is not None:
        tools["guidellm"] = guidellm
    return tools


def write_prompts(config: CrossCheckConfig, repeat: int, path: Path) -> None:
    """The prompts of our own run as JSON lines, with columns that both other tools understand."""
    spec = config.workload(repeat)
    requests = build(spec, load_tokenizer(config.tokenizer), None, chat=False).requests
    length = config.output_len
    rows = [{"prompt": request.prompt, "output_tokens_count": length} for request in requests]
    path.write_bytes(b"\n".join(orjson.dumps(row) for row in rows) + b"\n")


def ours(config: CrossCheckConfig, repeat: int, until: threading.Event | None = None) -> Run:
    """This client; ended early by ``until`` it reports what was answered by then."""
    result = run(
        RunConfig(
            config.base_url,
            model=config.model,
            workload=config.workload(repeat),
            concurrency=config.concurrency,
            tokenizer=config.tokenizer,
            num_warmups=config.concurrency,
            continuous_usage=False,
            scrape=False,
        ),
        until=until,
    )
    ended = until is not None and until.is_set() and not result.report["failures"]
    if not (result.ok or ended):
        raise UserError(f"our run had failed requests: {result.report['failures']}")
    start_s = result.load.result.start_ns / 1e9
    return _from_raw(result.report["raw"], result.report["metrics"]["duration_s"], start_s)


def _from_raw(raw: dict[str, Any], seconds: float, start_s: float) -> Run:
    sent, first, last, tokens = (
        np.asarray(raw[name], dtype=np.float64)
        for name in ("dispatched_ms", "first_token_ms", "last_token_ms", "output_tokens")
    )
    answered = np.asarray(raw["outcome"]) == Outcome.COMPLETED
    sent, first, last, tokens = (column[answered] for column in (sent, first, last, tokens))
    samples = _samples(first - sent, last - sent, tokens)
    return Run(seconds, int(tokens.sum()), samples, start_s + sent / 1000)


def _samples(ttft: np.ndarray, e2e: np.ndarray, tokens: np.ndarray) -> Samples:
    """TPOT from the other two; without a second token there is none."""
    found = {"TTFT": ttft, "E2E": e2e}
    if (tokens > 1).all():
        found["TPOT"] = (e2e - ttft) / (tokens - 1)
    return found


def vllm(config: CrossCheckConfig, repeat: int) -> Run:
    """``vllm bench serve``."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_prompts(config, repeat, folder / "prompts.jsonl")
        command = vllm_command(config, folder)
        done = subprocess.run(command, capture_output=True, text=True)
        results = list(folder.glob("*.json"))
        if done.returncode != 0 or not results:
            tail = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
            raise UserError(f"`vllm bench serve` ended with exit code {done.returncode}:\n{tail}")
        return read_vllm(orjson.loads(results[0].read_bytes()), config.num_requests)


def read_vllm(result: dict[str, Any], num_requests: int) -> Run:
    """A detailed result of ``vllm bench serve``; its own means stand beside ours, or the reading is wrong.

    Raises:
        UserError: Not all requests were completed, or their times do not give the tool's own figures.
    """
    if result["completed"] != num_requests:
        raise UserError(f"`vllm bench serve` completed {result['completed']} of {num_requests} requests.")
    ttft = 1000 * np.asarray(result["ttfts"])
    e2e = ttft + 1000 * np.asarray([sum(gaps) for gaps in result["itls"]])
    tokens = np.asarray(result["output_lens"], dtype=np.float64)
    samples, sent = _samples(ttft, e2e, tokens), np.asarray(result["start_times"])
    found = Run(float(result["duration"]), int(tokens.sum()), samples, sent)
    figures = found.figures()
    for figure, key in _VLLM_FIGURES.items():
        if figure in figures and not np.isclose(figures[figure], result[key], rtol=1e-3):
            raise UserError(f"`vllm bench serve` says {key} {result[key]}, its requests {figures[figure]}.")
    return found


_VLLM_FIGURES = {
    "requests/s": "request_throughput",
    "output tokens/s": "output_throughput",
    "mean TTFT": "mean_ttft_ms",
    "p99 TTFT": "p99_ttft_ms",
    "mean TPOT": "mean_tpot_ms",
    "p99 TPOT": "p99_tpot_ms",
    "mean E2E": "mean_e2el_ms",
    "p99 E2E": "p99_e2el_ms",
}


def vllm_command(config: CrossCheckConfig, folder: Path) -> Sequence[str]:
    """The ``vllm bench serve`` command for ``folder/prompts.jsonl``."""
    options = {
        "--backend": "openai",
        "--base-url": normalise_base_url(config.base_url),
        "--endpoint": "/v1/completions",
        "--model": config.model,
        "--tokenizer": str(config.tokenizer),
        "--dataset-name": "custom",
        "--dataset-path": str(folder / "prompts.jsonl"),
        "--custom-output-len": str(config.output_len),
        "--num-prompts": str(config.num_requests),
        "--max-concurrency": str(config.concurrency),
        "--num-warmups": str(config.concurrency),
        "--temperature": "0",
        "--percentile-metrics": "ttft,tpot,itl,e2el",
        "--metric-percentiles": "99",
        "--result-dir": str(folder),
    }
    words = [word for pair in options.items() for word in pair]
    flags = ["--ignore-eos", "--skip-chat-template", "--disable-shuffle", "--save-result", "--save-detailed"]
    return [vllm_program(), "bench", "serve", *words, *flags, "--disable-tqdm"]


def guidellm(config: CrossCheckConfig, repeat: int) -> Run:
    """guidellm."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_prompts(config, repeat, folder / "prompts.jsonl")
        command = guidellm_command(
            str(config.guidellm),
            normalise_base_url(config.base_url),
            config.model,
            config.tokenizer,
            prompts=folder / "prompts.jsonl",
            concurrency=config.concurrency,
            num_requests=config.num_requests,
            report=folder / "report.json",
        )
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise UserError(f"--guidellm {config.guidellm}: {error.strerror}.") from error
        if done.returncode != 0 or not (folder / "report.json").is_file():
            tail = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
            raise UserError(f"guidellm ended with exit code {done.returncode}:\n{tail}")
        times = read_guidellm(folder / "report.json", config.num_requests)
    samples = _samples(times.ttft, times.e2e, times.tokens)
    # It keeps the time of day.
    sent = times.sent - (time.time() - time.monotonic())
    return Run(times.seconds, int(times.tokens.sum()), samples, sent)
