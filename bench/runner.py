"""One load test from configuration to report.

``run(config)`` is the whole of ``vllm-sparse bench run`` without its command line:

    result = run(RunConfig(base_url="http://127.0.0.1:8000", workload=WorkloadSpec(num_requests=32)))
    result.report["metrics"]["ttft_ms"]["p50"]
"""

import asyncio
import contextlib
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bench import environment, metrics, probe, server_metrics
from bench.arrivals import open_loop, ramp
from bench.client import (
    ENDPOINTS,
    Request,
    Target,
    check_api_key,
    make_session,
    normalise_base_url,
    send,
)
from bench.engine import Plan
from bench.push import PushConfig, Pusher
from bench.raw import raw_block
from bench.records import NANOSECONDS, FailureKind, Outcome, RequestRecord
from bench.statistics import summarise
from bench.tally import Progress
from bench.tokenizer import load_tokenizer, vocabulary_size
from bench.workers import LoadResult, ProgressCallback, choose_workers, execute
from bench.workloads import Workload, WorkloadSpec, build
from vllm_sparse.errors import UserError

SCHEMA = "vllm-sparse/bench-run/1"
WARMUP_SEED = 0x7A9
REFUSED_STATUSES = (400, 422)
"""What servers answer to a field that they do not know."""
_CLOCK_RANGE = 2**62


@dataclass(frozen=True, slots=True)
class RunConfig:
    """A load test.

    Attributes:
        base_url: Server root, with or without ``/v1``.
        model: Served name; None takes the first the server lists.
        endpoint: ``completions`` or ``chat``.
        workload: What is sent.
        concurrency: Closed loop with that many users; with a rate: a cap on requests in flight.
        request_rate: Open loop, requests per second; infinity sends all at once.
        ramp_from: The rate grows linearly from this one to ``request_rate``, without randomness.
        burstiness: Shape of the gaps between requests (1 = Poisson, infinity = constant).
        stream: Ask for streamed answers.
        continuous_usage: Ask for running token counts; given up when the server refuses them.
        num_warmups: Requests sent before, the first alone, and measured nowhere; None: as many as
            concurrent users, up to 4.
        tokenizer: Directory for building text prompts; None takes the served model's if it is local.
        vocab_size: Random ids stay below it; None takes the served model's, or a safe small number.
        goodput: Service-level limits.
        timeout_s: Longest time for one request.
        retries: Further attempts, off by default.
        workers: Client processes; 0 chooses.
        max_seconds: Cancel the run after that time.
        extra_body: Fields merged into every request.
        scrape: Read the server's ``/metrics`` during the run.
        push: Where the run's own metrics are pushed while it is on; None pushes nothing.
        raw: What the report keeps of every request: ``none``, ``requests``, ``chunks``.
    """

    base_url: str
    model: str | None = None
    endpoint: str = "completions"
    workload: WorkloadSpec = field(default_factory=WorkloadSpec)
    concurrency: int | None = None
    request_rate: float | None = None
    ramp_from: float | None = None
    burstiness: float = 1.0
    stream: bool = True
    continuous_usage: bool = True
    num_warmups: int | None = None
    tokenizer: Path | None = None
    vocab_size: int | None = None
    goodput: metrics.Goodput | None = None
    timeout_s: float = 600.0
    retries: int = 0
    api_key: str | None = field(default=None, repr=False)
    workers: int = 0
    max_seconds: float | None = None
    extra_body: dict[str, Any] = field(default_factory=dict)
    scrape: bool = True
    push: PushConfig | None = None
    raw: str = "requests"

    def check(self) -> None:
        """Raise :class:`UserError` for a configuration that cannot be run."""
        self.workload.check()
        if self.endpoint not in ENDPOINTS:
            raise UserError(f"--endpoint is {self.endpoint!r}; choose {' or '.join(ENDPOINTS)}.")
        if self.concurrency is not None and self.concurrency < 1:
            raise UserError(f"--concurrency is {self.concurrency}; it must be at least 1.")
        if self.raw not in ("none", "requests", "chunks"):
            raise UserError(f"--raw is {self.raw!r}; choose none, requests or chunks.")
        if self.push is not None:
            self.push.check()
        if not self.timeout_s > 0:
            raise UserError(f"--timeout is {self.timeout_s}; it must be positive.")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise UserError(f"--max-seconds is {self.max_seconds}; it must be positive.")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise UserError(f"--vocab-size is {self.vocab_size}; it must be at least 1.")
        counts = {"num-warmups": self.num_warmups or 0, "retries": self.retries, "workers": self.workers}
        for name, value in counts.items():
            if value < 0:
                raise UserError(f"--{name} is {value}; it must be at least 0.")
        check_api_key(self.api_key)
        if not self.stream and self.goodput is not None and {"ttft", "tpot"} & set(self.goodput.limits):
            raise UserError("--no-stream shows no first token; then --goodput can only limit e2e.")
        if self.request_rate is not None:
            open_loop(1, self.request_rate, self.burstiness, 0)
        if self.ramp_from is not None:
            if self.request_rate is None or math.isinf(self.request_rate):
                raise UserError("--ramp-from needs a finite --request-rate to end at.")
            ramp(1, self.ramp_from, self.request_rate)

    @property
    def load_model(self) -> str:
        """``closed``, ``open``, ``capped`` (open with a limit in flight) or ``trace``."""
        if self.workload.dataset == "trace" and self.request_rate is None:
            return "trace"
        if self.request_rate is None:
            return "closed"
        return "open" if self.concurrency is None else "capped"

    def as_json(self) -> dict[str, Any]:
        """The ``config`` block of the report; no secrets."""
        workload = asdict(self.workload)
        workload["path"] = None if self.workload.path is None else str(self.workload.path)
        rate = self.request_rate
        return {
            "base_url": self.base_url,
            "model": self.model,
            "endpoint": self.endpoint,
            "load_model": self.load_model,
            "concurrency": self.concurrency,
            "request_rate": "inf" if rate is not None and math.isinf(rate) else rate,
            "ramp_from": self.ramp_from,
            "burstiness": "inf" if math.isinf(self.burstiness) else self.burstiness,
            "stream": self.stream,
            "continuous_usage": self.continuous_usage,
            "num_warmups": self.num_warmups,
            "tokenizer": None if self.tokenizer is None else str(self.tokenizer),
            "goodput": None if self.goodput is None else dict(self.goodput.limits),
            "timeout_s": self.timeout_s,
            "retries": self.retries,
            "workers": self.workers,
            "max_seconds": self.max_seconds,
            "extra_body": self.extra_body,
            **workload,
        }


@dataclass(slots=True)
class RunResult:
    """A finished load test: the JSON report and the raw records behind it."""

    report: dict[str, Any]
    load: LoadResult

    @property
    def ok(self) -> bool:
        """Whether every request was sent and completed."""
        requests = self.report["requests"]
        return bool(requests["completed"] == requests["planned"])


def run(
    config: RunConfig,
    on_progress: ProgressCallback | None = None,
    on_plan: Callable[[int], None] | None = None,
    until: threading.Event | None = None,
) -> RunResult:
    """Probe the server, warm it up, send the workload, compute the report.

    Args:
        config: The load test.
        on_progress: Told the totals while it runs.
        on_plan: Told once how many requests there will be.
        until: Ends the run early, with what there is, once another thread has set it.

    Raises:
        UserError: The configuration is wrong or no server answers. Failing requests are not an error
            here: they are counted in ``report["requests"]``.
    """
    config.check()
    prepared = asyncio.run(_prepare(config))
    planned = len(prepared.plan.bodies)
    if on_plan is not None:
        on_plan(planned)
    listeners = [on_progress] if on_progress is not None else []
    with contextlib.ExitStack() as stack:
        pusher = None
        if config.push is not None:
            pusher = Pusher(config.push, prepared.plan.target.model, planned)
            stack.enter_context(pusher)
            listeners.append(pusher.update)
        with _watch(prepared) as watch:
            load = execute(
                prepared.plan,
                workers=prepared.workers,
                on_progress=_to_all(listeners),
                apart=pusher is not None,
                until=until,
            )
        report = _report(prepared, load, watch.summary() if watch else None)
        if pusher is not None:
            pusher.finish(report["metrics"])
            report["warnings"] += pusher.warning()
    return RunResult(report, load)


def _to_all(listeners: Sequence[ProgressCallback]) -> ProgressCallback | None:
    def tell(progress: Progress) -> None:
        for listener in listeners:
            listener(progress)

    return tell if listeners else None


@dataclass(frozen=True, slots=True)
class _Prepared:
    config: RunConfig
    plan: Plan
    workers: int
    warmups: int
    warmup_failures: int
    facts: probe.ServerFacts
    warnings: list[str]


class _NoWatch:
    """Stands in when ``/metrics`` is not wanted."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


def _watch(prepared: _Prepared) -> "server_metrics.Watch | _NoWatch":
    return server_metrics.Watch(prepared.plan.target.base_url) if prepared.config.scrape else _NoWatch()


async def _prepare(config: RunConfig) -> _Prepared:
    target = Target(
        base_url=normalise_base_url(config.base_url),
        model=config.model or "",
        endpoint=config.endpoint,
        stream=config.stream,
        continuous_usage=config.continuous_usage and config.stream,
        timeout_s=config.timeout_s,
        retries=config.retries,
        api_key=config.api_key,
        extra_body=config.extra_body,
    )
    facts = await probe.ask_server(target.base_url, probe.target_headers(target))
    target = replace(target, model=probe.choose_model(facts, config.model))
    config = replace(config, base_url=target.base_url, model=target.model)
    workload, warmups = make_workloads(config, facts)
    target, failures = await _warm_up(target, warmups)
    plan = Plan(
        target=target,
        bodies=_bodies(workload, target),
        conversations=workload.conversations,
        offsets_ns=due_offsets(config, workload),
        concurrency=_concurrency(config),
        think_time_s=config.workload.think_time_s,
        max_seconds=config.max_seconds,
    )
    workers = config.workers or choose_workers(plan, config.request_rate)
    config = replace(config, continuous_usage=target.continuous_usage, workers=workers)
    config = replace(config, concurrency=plan.concurrency)
    warnings = likely_problems(config, facts, workload)
    return _Prepared(config, plan, workers, len(warmups), failures, facts, warnings)


def _bodies(workload: Workload, target: Target) -> list[bytes | Request]:
    """Encoded bodies; turns of conversations stay requests, because answers go into their bodies."""
    if workload.conversations is not None:
        return list(workload.requests)
    return [request.encode(target) for request in workload.requests]


def likely_problems(config: RunConfig, facts: probe.ServerFacts, workload: Workload) -> list[str]:
    """Things that are likely to go wrong, said before they do."""
    warnings = []
    unknown = probe.refusal(facts, config.model or "")
    if unknown:
        warnings.append(unknown)
    spec = config.workload
    longest = spec.turns * (spec.input_len + (spec.output_len or 0))
    longest += spec.prefix_len if spec.dataset == "prefix" else 0
    if spec.dataset in ("sharegpt", "trace"):
        exact = (len(r.prompt) + r.output_len for r in workload.requests if isinstance(r.prompt, list))
        longest = max(exact, default=0)
    if facts.max_model_len is not None and longest > facts.max_model_len:
        warnings.append(
            f"prompt and answer need {longest} tokens, the server's limit is {facts.max_model_len}."
        )
    return warnings


def _concurrency(config: RunConfig) -> int | None:
    return 1 if config.load_model == "closed" and config.concurrency is None else config.concurrency


def make_workloads(config: RunConfig, facts: probe.ServerFacts) -> tuple[Workload, list[Request]]:
    """The measured requests, and as many warm-ups of the same shape with other contents."""
    directory = config.tokenizer or facts.local_directory(config.model or "")
    spec = config.workload
    text = config.endpoint == "chat" or spec.as_text or spec.turns != 1 or spec.dataset != "random"
    tokenizer = load_tokenizer(directory) if directory is not None and (text or config.tokenizer) else None
    vocabulary = config.vocab_size or (vocabulary_size(directory) if directory is not None else None)
    chat = config.endpoint == "chat"
    context = facts.max_model_len
    workload = build(config.workload, tokenizer, vocabulary, chat=chat, context=context)
    count = config.num_warmups
    if count is None:
        count = min(4, config.concurrency or 1, len(workload.requests))
    if count == 0:
        return workload, []
    like = replace(config.workload, seed=config.workload.seed + WARMUP_SEED, num_requests=count)
    firsts = build(like, tokenizer, vocabulary, chat=chat, context=context).firsts()
    if config.workload.dataset == "sharegpt":
        # They may be conversations of the run, so their first words must differ.
        firsts = [replace(request, prompt=f"({request.index}) {request.prompt}") for request in firsts]
    return workload, firsts


def due_offsets(config: RunConfig, workload: Workload) -> Sequence[int] | None:
    """When requests are due, in nanoseconds from the start; None in a closed loop."""
    if config.load_model == "trace" and workload.arrivals is not None:
        return _nanoseconds(workload.arrivals)
    if config.request_rate is None:
        return None
    count = len(workload.firsts())
    if config.ramp_from is not None:
        times = ramp(count, config.ramp_from, config.request_rate)
    else:
        times = open_loop(count, config.request_rate, config.burstiness, config.workload.seed)
    return _nanoseconds(times)


def _nanoseconds(times: Iterable[float]) -> list[int]:
    """Due times in nanoseconds.

    Raises:
        UserError: One of them is beyond the monotonic clock's range of 292 years.
    """
    offsets = [float(at) * NANOSECONDS for at in times]
    if not all(0 <= offset < _CLOCK_RANGE for offset in offsets):
        raise UserError("the last request would be due in centuries; raise the rate or --trace-speed.")
    return [round(offset) for offset in offsets]


async def _warm_up(target: Target, requests: Sequence[Request]) -> tuple[Target, int]:
    """Send one request alone, then the others together; counts failures.

    The first one also learns whether the server takes ``continuous_usage_stats``: servers that know only
    OpenAI's own fields refuse it, and are then asked without.
    """
    if not requests:
        return target, 0
    first, *others = requests
    async with make_session(target) as session:

        async def ask(request: Request, how: Target) -> RequestRecord:
            return await send(session, how, request.encode(how), RequestRecord(request.index, 0))

        record = await ask(first, target)
        if record.http_status in REFUSED_STATUSES and target.continuous_usage:
            plain = replace(target, continuous_usage=False)
            record = await ask(first, plain)
            if record.outcome is Outcome.COMPLETED:
                target = plain
        records = [record, *await asyncio.gather(*(ask(request, target) for request in others))]
    return target, sum(record.outcome is not Outcome.COMPLETED for record in records)


def _report(prepared: _Prepared, load: LoadResult, server: dict[str, Any] | None) -> dict[str, Any]:
    config, records = prepared.config, load.result.records
    numbers = metrics.run_metrics(load.result, config.goodput)
    lag = metrics.dispatch_lag(records)
    return {
        "schema": SCHEMA,
        "config": {**config.as_json(), "itl_basis": numbers["itl_basis"], "warmups_sent": prepared.warmups},
        "environment": {
            **environment.describe(),
            "command": environment.command_line(),
            "server": {"version": prepared.facts.version, "max_model_len": prepared.facts.max_model_len},
        },
        "requests": {
            **_counts(records, len(prepared.plan.bodies)),
            "warmups": prepared.warmups,
            "warmups_failed": prepared.warmup_failures,
        },
        "failures": _failures(records),
        "metrics": numbers,
        "turns": metrics.by_turn(records),
        "dispatch_lag_ms": lag,
        "client": {
            "workers": load.workers,
            "loop_lag_ms": summarise([lag / 1e6 for lag in load.result.loop_lag_ns]),
        },
        "validity": metrics.validity(numbers, lag, capped=config.load_model == "capped"),
        "server_metrics": server,
        "server_ttft_gap_ms": server_metrics.ttft_gap_ms(server, numbers["ttft_ms"]["mean"]),
        "warnings": prepared.warnings + _cut_short(prepared.plan, load) + _refused_counts(prepared, records),
        "interrupted": load.interrupted,
        "raw": raw_block(load.result, config.raw),
    }


def _cut_short(plan: Plan, load: LoadResult) -> list[str]:
    """Says so when conversations ended early because one of their turns failed."""
    failed = {r.index for r in load.result.records if r.outcome is Outcome.FAILED}
    lost = sum(
        len(turns) - position - 1
        for turns in plan.conversations or ()
        for position, index in enumerate(turns)
        if index in failed
    )
    return [f"{lost} later turns were not sent because an earlier one failed."] if lost else []


def _refused_counts(prepared: _Prepared, records: Sequence[RequestRecord]) -> list[str]:
    """Names the likely cause where every request was refused and no warm-up could find it out before.

    A question sent beforehand would find out too, but it would be a warm-up where none is wanted.
    """
    refused = bool(records) and all(
        record.failure is FailureKind.HTTP and record.http_status in REFUSED_STATUSES for record in records
    )
    if not refused or prepared.warmups or not prepared.config.continuous_usage:
        return []
    return [
        "nothing was measured: the server refused every request, perhaps for stream_options' "
        "continuous_usage_stats, which only the first warm-up tries out; pass --no-continuous-usage, or "
        "let --num-warmups be at least 1."
    ]


def _counts(records: Sequence[RequestRecord], planned: int) -> dict[str, int]:
    def of(outcome: Outcome) -> int:
        return sum(record.outcome is outcome for record in records)

    return {
        "planned": planned,
        "sent": len(records),
        "completed": of(Outcome.COMPLETED),
        "failed": of(Outcome.FAILED),
        "cancelled": of(Outcome.CANCELLED),
        "not_sent": planned - len(records),
    }


def _failures(records: Sequence[RequestRecord]) -> list[dict[str, Any]]:
    """Failed requests grouped by kind, each with one example of what the server or network said."""
    groups: dict[tuple[str, int | None], list[RequestRecord]] = {}
    for record in records:
        if record.failure is not None:
            # A status belongs to the group only when it is the failure.
            status = record.http_status if record.failure.value == "http" else None
            groups.setdefault((record.failure.value, status), []).append(record)
    return [
        {"kind": kind, "status": status, "count": len(members), "example": members[0].detail}
        for (kind, status), members in sorted(groups.items(), key=lambda item: -len(item[1]))
    ]
