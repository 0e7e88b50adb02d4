"""The soak itself: serve, warm up, rest, load for long, rest, terminate under load."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench import environment, output, server_metrics
from bench.client import Request, Target
from bench.server import Server
from bench.soak import verdict
from bench.soak.drain import drain
from bench.soak.load import MixedLoad, Shape
from bench.soak.watch import Sample, sample
from bench.tokenizer import load_tokenizer
from vllm_sparse.errors import UserError

SCHEMA = "vllm-sparse/soak/1"
# Longer than the server (5 s) or our client (4 s) keep an idle connection.
REST_S = 7.0
DRAIN_TIMEOUT_S = 120
# Long enough to be in flight when the signal comes, short enough to end in time on a slow machine.
DRAIN_TOKENS = 160
REPORT_EVERY_S = 60.0
# A request that hangs is found at the end; one that waits for a suspended machine is no failure.
REQUEST_TIMEOUT_S = 3600.0
# Looking at the processes takes far less; a longer gap means that the soak itself did not run.
SUSPENDED_S = 10.0
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class SoakConfig:
    """A soak.

    Attributes:
        model: compressed checkpoint with a tokenizer.
        minutes: of load, warm-up included.
        users: most requests in flight.
        rate: requests per second, all users together; None sends without a pause.
        max_len: context length of the server.
        serve_args: further words for ``vllm serve``.
        seed: of the load.
        limits: what counts as flat.
    """

    model: Path
    minutes: float = 60.0
    users: int = 4
    rate: float | None = None
    max_len: int = 512
    serve_args: tuple[str, ...] = ("--enforce-eager",)
    seed: int = 0
    limits: verdict.Limits = field(default_factory=verdict.Limits)

    def check(self) -> None:
        """Raise :class:`UserError` for a soak that cannot be run."""
        if not self.minutes > 0:
            raise UserError(f"--minutes is {self.minutes}; it must be positive.")
        if self.users < 1:
            raise UserError(f"--users is {self.users}; it must be at least 1.")
        if self.rate is not None and not self.rate > 0:
            raise UserError(f"--rate is {self.rate}; it must be positive.")
        if self.max_len < 256:
            raise UserError(f"--max-len is {self.max_len}; the mix of requests needs at least 256.")

    @property
    def seconds(self) -> float:
        """Length in seconds."""
        return 60 * self.minutes

    @property
    def warmup_s(self) -> float:
        """A fifth, at most ten minutes: caches fill, allocators reach their high-water mark."""
        return min(600.0, 0.2 * self.seconds)

    @property
    def interval_s(self) -> float:
        """Between samples."""
        return min(15.0, max(0.5, self.seconds / 240))


@dataclass(slots=True)
class _State:
    config: SoakConfig
    load: MixedLoad
    started: float
    samples: list[Sample] = field(default_factory=list)
    rested: Sample | None = None
    ended: Sample | None = None
    suspended_s: float = 0.0


_ENGINE_STOPPED = "[shutdown] MPClient: cleaning up background resources"
"""What vLLM's API process logs when it has ended the engine."""
_ANSWERS_TASK = "[async_llm.py:"
"""Every line of its task that waits for the engine's answers has this."""


def run(config: SoakConfig, json_path: Path | None, say: Say) -> dict[str, Any]:
    """Run a soak; a report of what is known so far is written every minute.

    Raises:
        UserError: The configuration is wrong, or the server does not start or dies.
    """
    config.check()
    output.check_writable(json_path)
    tokenizer = load_tokenizer(config.model)
    flags = ["--max-model-len", str(config.max_len), "--max-num-seqs", str(2 * config.users)]
    flags += ["--shutdown-timeout", str(DRAIN_TIMEOUT_S), "--chat-template", _CHAT_TEMPLATE]
    say(f"serving {config.model}")
    with Server(config.model, flags=[*flags, *config.serve_args], start_timeout_s=1800.0) as server:
        say(f"answers after {server.start_seconds:.0f} s; log: {server.log_path}")
        target = Target(server.base_url, server.name, timeout_s=REQUEST_TIMEOUT_S)
        load = MixedLoad(target, tokenizer, Shape(config.max_len), config.users, config.seed, config.rate)
        state = _State(config, load, time.monotonic())
        asyncio.run(_load(server, state, json_path, say))
        say("SIGTERM with streams in flight")
        long = min(DRAIN_TOKENS, config.max_len - 32)
        requests = [Request(i, [1 + i] * 8, long, ignore_eos=True) for i in range(config.users)]
        plugin = _plugin_metrics(server)
        drained = asyncio.run(drain(server, target, requests, DRAIN_TIMEOUT_S))
        drained["left_behind"] = server.left_behind()
        errors = error_lines(server.log_path.read_text(errors="replace") if server.log_path else "")
    report = _report(state, drained, plugin, errors)
    output.write_json(report, json_path)
    return report


# One line, and every family of tokenizers takes it.
_CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


async def _load(server: Server, state: _State, json_path: Path | None, say: Say) -> None:
    """Load and watch; whichever fails first ends both."""
    watching = asyncio.create_task(_watch(server, state, json_path, say))
    loading = asyncio.create_task(_phases(server, state))
    try:
        await asyncio.wait({watching, loading}, return_when=asyncio.FIRST_COMPLETED)
        if watching.done():
            watching.result()
        await loading
    finally:
        for task in (watching, loading):
            task.cancel()
        await asyncio.gather(watching, loading, return_exceptions=True)
    server.check()


async def _phases(server: Server, state: _State) -> None:
    config = state.config
    await state.load.run(state.started + config.warmup_s)
    state.rested = await _rest(server, state)
    await state.load.run(state.started + config.seconds)
    state.ended = await _rest(server, state)


async def _rest(server: Server, state: _State) -> Sample:
    await asyncio.sleep(REST_S)
    return sample(server.pid or 0, state.started)


async def _watch(server: Server, state: _State, json_path: Path | None, say: Say) -> None:
    told = looked = state.started
    while True:
        await asyncio.sleep(state.config.interval_s)
        gap = time.monotonic() - looked - state.config.interval_s
        if gap > SUSPENDED_S:
            state.suspended_s += gap
            say(f"nothing ran for {gap:.0f} s: the machine, or this soak, was suspended or starved")
        server.check()
        state.samples.append(sample(server.pid or 0, state.started))
        await asyncio.to_thread(server_metrics.fetch, server.base_url)
        looked = time.monotonic()
        if time.monotonic() - told >= REPORT_EVERY_S:
            told = time.monotonic()
            say(_progress(state))
            output.write_json(_report(state, None, None, None), json_path)


def _progress(state: _State) -> str:
    tally, last = state.load.tally, state.samples[-1]
    return (
        f"{last.at_s / 60:5.1f} min: {sum(tally.sent.values())} requests, "
        f"{sum(tally.failed.values())} failed, "
        f"RSS {last.rss_bytes / verdict.MIB:.0f} MiB, {last.fds} descriptors, {last.threads} threads"
    )


def _plugin_metrics(server: Server) -> dict[str, float]:
    page = server_metrics.fetch(server.base_url) or b""
    return {
        " ".join([name, *labels.values()]): value
        for name, labels, value in server_metrics.parse(page)
        if name.startswith("vllm_sparse:")
    }


def error_lines(log: str) -> tuple[list[str], list[str]]:
    """Lines of a server's log that tell of an error, and those of them that do not count.

    Refused requests are warnings or less there. When its API process has ended the engine, vLLM cancels the
    task that waits for the engine's answers, and that task may still report the engine as dead
    (``output_handler failed``), depending on who comes first. By then every request has had its answer, so
    what that task says after that stop does not count; anything else does.
    """
    counted: list[str] = []
    excused: list[str] = []
    stopped = False
    for line in log.splitlines():
        stopped |= _ENGINE_STOPPED in line
        if " ERROR " in f" {line} " or "Traceback" in line:
            (excused if stopped and _ANSWERS_TASK in line else counted).append(line[:300])
    return counted[:20], excused[:20]


def _report(
    state: _State,
    drained: dict[str, Any] | None,
    plugin: dict[str, float] | None,
    errors: tuple[list[str], list[str]] | None,
) -> dict[str, Any]:
    """The report; with None for what is not known yet it is unfinished, and ``ok`` is null."""
    config, tally = state.config, state.load.tally
    memory = verdict.memory_block(state.samples, config.warmup_s, config.limits)
    known = state.rested is not None and state.ended is not None
    fds = verdict.fds_block(state.rested, state.ended, config.limits) if known else None  # type: ignore[arg-type]
    failed = sum(tally.failed.values())
    ok = None
    if drained is not None and fds is not None:
        checks = [
            failed == 0,
            fds["ok"],
            drained["ok"],
            not drained["left_behind"],
            not (errors and errors[0]),
        ]
        ok = all(checks) and memory["ok"] is not False
    return {
        "schema": SCHEMA,
        "ok": ok,
        "config": {**asdict(config), "model": str(config.model), "warmup_s": config.warmup_s},
        "environment": {**environment.describe(), "command": environment.command_line()},
        "requests": {
            "sent": sum(tally.sent.values()),
            "completed": sum(tally.completed.values()),
            "hung_up": tally.hung_up,
            "failed": failed,
            "by_kind": dict(tally.sent),
            "failures": tally.details,
            "output_tokens": tally.output_tokens,
        },
        "suspended_s": round(state.suspended_s, 1),
        "memory": memory,
        "fds": fds,
        "drain": drained,
        "log_errors": None if errors is None else errors[0],
        "log_errors_after_stop": None if errors is None else errors[1],
        "plugin": plugin,
        "server_cores_busy": verdict.cores_busy(state.samples),
        "samples": [item.as_json() for item in state.samples],
    }
