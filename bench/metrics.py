"""From raw records to the figures of a report.

Definitions (equal to ``vllm bench serve`` where it has them):

* TTFT: dispatched to the first token-carrying chunk. E2E: dispatched to the last one.
* TPOT: (E2E - TTFT) / (output tokens - 1), requests with two tokens or more.
* ITL: gap between successive chunks, divided by the tokens the later one carries when the server sends a
  running count (then one sample per token); without that count it is the gap between chunks.
* ``*_from_schedule``: the same from the moment the arrival process wanted the request sent, so time spent
  waiting in the client counts (no coordinated omission).
* Throughput: completed requests and their tokens over the whole run, first due time to last answer.
* Failed and cancelled requests enter no latency and no throughput.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.engine import EngineResult
from bench.records import NANOSECONDS, UNKNOWN_TOKENS, Outcome, RequestRecord
from bench.statistics import summarise, unresolved
from vllm_sparse.errors import UserError

FloatArray = npt.NDArray[np.float64]
MILLISECOND = 1e6
GOODPUT_NAMES = ("ttft", "tpot", "e2e")
LATENCY_METRICS = ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms", "ttft_from_schedule_ms", "e2e_from_schedule_ms")
LAG_SHARE_OF_TTFT = 0.05
"""A run is called invalid when the p99 dispatch lag exceeds this share of the median TTFT."""
LAG_FLOOR_MS = 2.0
"""Lags below this are timer granularity and never make a run invalid."""


@dataclass(frozen=True, slots=True)
class Goodput:
    """Service-level limits in milliseconds; a request is good when it keeps all that are set."""

    limits: Mapping[str, float]

    @classmethod
    def parse(cls, text: str) -> "Goodput":
        """Read ``ttft:200,tpot:50,e2e:2000`` (any subset)."""
        limits: dict[str, float] = {}
        for part in filter(None, (piece.strip() for piece in text.split(","))):
            name, _, value = part.partition(":")
            try:
                number = float(value)
            except ValueError:
                number = -1.0
            if name not in GOODPUT_NAMES or not number > 0:
                raise UserError(f"--goodput part {part!r}: expected {'|'.join(GOODPUT_NAMES)}:MILLISECONDS.")
            limits[name] = number
        if not limits:
            raise UserError("--goodput is empty; give for example ttft:200,tpot:50.")
        return cls(limits)


@dataclass(frozen=True, slots=True)
class Latencies:
    """Latencies of the completed requests in milliseconds, one array each, same order; nan = not known."""

    ttft: FloatArray
    tpot: FloatArray
    e2e: FloatArray
    ttft_from_schedule: FloatArray
    e2e_from_schedule: FloatArray
    gaps: FloatArray
    per_token: bool


def latencies(records: Sequence[RequestRecord]) -> Latencies:
    """Latencies of ``records``, which must all be completed."""
    origin = min((record.scheduled_ns for record in records), default=0)
    first = _times((r.first_token_ns for r in records), origin)
    last = _times((r.last_token_ns for r in records), origin)
    sent = _times((r.dispatched_ns for r in records), origin)
    due = _times((r.scheduled_ns for r in records), origin)
    out = np.asarray([r.output_tokens or 0 for r in records], dtype=np.float64)
    # A single token has no time per token; nan leaves it out.
    gaps_per_request = np.where(out > 1, out - 1, np.nan)
    gaps, per_token = inter_token_gaps(records)
    return Latencies(
        ttft=(first - sent) / MILLISECOND,
        tpot=(last - first) / gaps_per_request / MILLISECOND,
        e2e=(last - sent) / MILLISECOND,
        ttft_from_schedule=(first - due) / MILLISECOND,
        e2e_from_schedule=(last - due) / MILLISECOND,
        gaps=gaps,
        per_token=per_token,
    )


def _times(values: Iterable[int | None], origin: int) -> FloatArray:
    """Nanoseconds after ``origin`` (subtracted as integers, so no precision is lost); nan = missing."""
    return np.asarray([np.nan if value is None else value - origin for value in values], dtype=np.float64)


def inter_token_gaps(records: Sequence[RequestRecord]) -> tuple[FloatArray, bool]:
    """Gaps in ms between chunks or tokens, and whether they are per token."""
    per_token = bool(records) and all(
        UNKNOWN_TOKENS not in record.chunk_tokens for record in records if len(record.chunk_tokens)
    )
    parts = []
    for record in records:
        gaps = np.diff(np.frombuffer(record.chunk_ns, dtype=np.int64)) / MILLISECOND
        if per_token:
            carried = np.diff(np.frombuffer(record.chunk_tokens, dtype=np.int64))
            gaps = np.repeat(gaps / carried, carried)
        parts.append(gaps)
    return (np.concatenate(parts) if parts else np.empty(0)), per_token


def run_metrics(result: EngineResult, goodput: Goodput | None = None) -> dict[str, Any]:
    """The ``metrics`` block of a run report.

    Args:
        result: What the engines recorded.
        goodput: Limits for ``goodput_rps``; None leaves it null.
    """
    done = [record for record in result.records if record.outcome is Outcome.COMPLETED]
    timed = latencies(done)
    values = {
        "ttft_ms": timed.ttft,
        "tpot_ms": timed.tpot,
        "itl_ms": timed.gaps,
        "e2e_ms": timed.e2e,
        "ttft_from_schedule_ms": timed.ttft_from_schedule,
        "e2e_from_schedule_ms": timed.e2e_from_schedule,
    }
    metrics: dict[str, Any] = {}
    for name, column in values.items():
        known = column[~np.isnan(column)]
        metrics[name] = {**summarise(known), "unresolved": unresolved(known.size)}
    metrics["itl_basis"] = "token" if timed.per_token else "chunk"
    return metrics | _throughput(done, result, timed, goodput)


def _throughput(
    done: list[RequestRecord], result: EngineResult, timed: Latencies, goodput: Goodput | None
) -> dict[str, Any]:
    seconds = duration_s(result)
    outputs = sum(record.output_tokens or 0 for record in done)
    prompts = sum(record.prompt_tokens or 0 for record in done)
    good = None if goodput is None else int(_good(timed, goodput).sum())
    return {
        "duration_s": seconds,
        "requests_per_s": len(done) / seconds,
        "output_tokens_per_s": outputs / seconds,
        "total_tokens_per_s": (outputs + prompts) / seconds,
        "goodput_rps": None if good is None else good / seconds,
        "prompt_tokens": prompts,
        "output_tokens": outputs,
        "steady": steady_window(done),
    }


def _good(timed: Latencies, goodput: Goodput) -> npt.NDArray[np.bool_]:
    """Which requests keep every limit; one without a TPOT (a single token) keeps that limit."""
    good = np.ones(timed.e2e.size, dtype=bool)
    for name, limit in goodput.limits.items():
        values = np.nan_to_num(getattr(timed, name), nan=0.0 if name == "tpot" else np.inf)
        good &= values <= limit
    return good


def duration_s(result: EngineResult) -> float:
    """Seconds from the start to the last answer (to the end when there was none)."""
    ends = [record.finished_ns for record in result.records if record.finished_ns is not None]
    return max(1, max(ends, default=result.end_ns) - result.start_ns) / NANOSECONDS


def steady_window(done: Sequence[RequestRecord]) -> dict[str, float] | None:
    """Throughput while the load was at its height, without ramp-up and drain.

    The window runs from the first to the last moment at which at least 90 % of the highest number of
    requests were in flight. Tokens count by the time of their chunk. None when there is no such stretch.
    """
    streamed = [r for r in done if r.dispatched_ns is not None and r.last_token_ns is not None]
    if len(streamed) < 2:
        return None
    starts = np.asarray([r.dispatched_ns for r in streamed], dtype=np.int64)
    ends = np.asarray([r.last_token_ns for r in streamed], dtype=np.int64)
    moments = np.concatenate([starts, ends])
    order = np.argsort(moments, kind="stable")
    level = np.cumsum(np.repeat([1, -1], [starts.size, ends.size])[order])
    high = np.flatnonzero(level >= 0.9 * level.max())
    begin = int(moments[order][high[0]])
    # The level holds until the next event.
    end = int(moments[order][min(high[-1] + 1, order.size - 1)])
    seconds = (end - begin) / NANOSECONDS
    if seconds <= 0:
        return None
    outputs, prompts = 0.0, 0
    for record in streamed:
        times = np.frombuffer(record.chunk_ns, dtype=np.int64)
        if times.size:
            inside = np.count_nonzero((times > begin) & (times <= end))
            outputs += inside / times.size * (record.output_tokens or 0)
            # The prompt is done when the first token comes.
            prompts += (record.prompt_tokens or 0) if begin < times[0] <= end else 0
    finished = int(np.count_nonzero((ends > begin) & (ends <= end)))
    return {
        "seconds": seconds,
        "output_tokens_per_s": outputs / seconds,
        "total_tokens_per_s": (outputs + prompts) / seconds,
        "requests_per_s": finished / seconds,
        "concurrency": float(level.max()),
    }


def by_turn(records: Sequence[RequestRecord]) -> list[dict[str, Any]]:
    """Figures by position in the conversation, as prompts grow with it; empty when all are first turns.

    Returns:
        One entry per turn: ``turn`` (from 1), ``n`` completed, ``prompt_tokens`` (mean),
        medians ``ttft_ms``, ``tpot_ms`` and ``e2e_ms``.
    """
    last = max((record.turn for record in records), default=0)
    entries = []
    for turn in range(last + 1 if last else 0):
        done = [r for r in records if r.turn == turn and r.outcome is Outcome.COMPLETED]
        timed = latencies(done)
        columns = {"ttft_ms": timed.ttft, "tpot_ms": timed.tpot, "e2e_ms": timed.e2e}
        medians = {name: summarise(column[~np.isnan(column)])["p50"] for name, column in columns.items()}
        prompts = summarise([record.prompt_tokens for record in done if record.prompt_tokens is not None])
        entries.append({"turn": turn + 1, "n": len(done), "prompt_tokens": prompts["mean"], **medians})
    return entries


def dispatch_lag(records: Sequence[RequestRecord]) -> dict[str, Any]:
    """How late requests left the client, in ms; all requests count, whatever became of them."""
    lags = [(r.dispatched_ns - r.scheduled_ns) / MILLISECOND for r in records if r.dispatched_ns is not None]
    return summarise(lags)


def validity(metrics: Mapping[str, Any], lag: Mapping[str, Any], *, capped: bool) -> dict[str, Any]:
    """Whether the client itself kept up; a capped run may queue in the client by intention.

    Returns:
        ``{"valid": bool, "reasons": [...]}``.
    """
    reasons = []
    ttft, late = metrics["ttft_ms"]["p50"], lag["p99"]
    if not capped and ttft is not None and late is not None:
        allowed = max(LAG_FLOOR_MS, LAG_SHARE_OF_TTFT * ttft)
        if late > allowed:
            reasons.append(
                f"requests left up to {late:.1f} ms late (p99); allowed is {allowed:.1f} ms, "
                f"{LAG_SHARE_OF_TTFT:.0%} of the median TTFT. Use more --workers or a lower rate."
            )
    return {"valid": not reasons, "reasons": reasons}
