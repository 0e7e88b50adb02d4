"""How exact the client is: its percentiles against what a scripted server noted on the same clock."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.loopback import LoopbackServer, Script, prompt_key
from bench.runner import RunConfig, run
from bench.statistics import PERCENTILES
from bench.workloads import WorkloadSpec, build

SCHEMA = "vllm-sparse/bench-selftest/1"
_TOKENS = 10


def percentile_errors(
    script: Script, config: dict[str, Any], spec: WorkloadSpec
) -> tuple[dict[str, float], Any]:
    """Largest error in ms over the percentiles of TTFT, E2E and ITL, and the run's report.

    The truth of a latency is the server's note of when it sent the token minus the client's note of when it
    sent the request: one clock, so what is left is the way from the server's socket to our timestamp.

    Args:
        script: What the server does.
        config: Further fields of :class:`bench.runner.RunConfig`.
        spec: Workload of random token ids.
    """
    with LoopbackServer(script) as server:
        result = run(RunConfig(server.base_url, workload=spec, num_warmups=1, **config))
        notes = {note["key"]: note for note in server.truth()}
    keys = [prompt_key(request.prompt) for request in build(spec, None, None, chat=False).requests]
    sent = {record.index: record.dispatched_ns for record in result.load.result.records}
    times = [
        (np.asarray(notes[key]["sent_ns"]), sent[index]) for index, key in enumerate(keys) if key in notes
    ]
    truth = {
        "ttft_ms": np.asarray([moments[0] - start for moments, start in times]),
        "e2e_ms": np.asarray([moments[-1] - start for moments, start in times]),
        "itl_ms": np.concatenate([np.diff(moments) for moments, _ in times]),
    }
    metrics = result.report["metrics"]
    errors = {
        name: max(abs(metrics[name][f"p{p}"] - float(np.percentile(values, p)) / 1e6) for p in PERCENTILES)
        for name, values in truth.items()
    }
    return errors, result.report


@dataclass(frozen=True, slots=True)
class Load:
    """What the client is put under.

    Attributes:
        streams: Concurrent streams, about that many in an open loop.
        rate: New streams per second; None for a closed loop of ``streams`` users.
        requests: Requests in all.
        gap_ms: Mean time to the first token and between tokens, both ± 30 %.
    """

    streams: int
    rate: float | None
    requests: int
    gap_ms: float

    @classmethod
    def open_loop(cls, streams: int, rate: float) -> "Load":
        """Streams that last as long as it takes to have that many of them in flight."""
        return cls(streams, rate, 2 * streams, 1000 * streams / rate / _TOKENS)


BARS = (
    Load(1, None, 40, 10.0),
    Load(64, None, 384, 100.0),
    Load.open_loop(1024, 200.0),
    Load.open_loop(2048, 200.0),
)
"""The loads of ``bench selftest --bars``: from one stream to two thousand."""


def check_client(load: Load, tolerance_ms: float, lag_tolerance_ms: float) -> dict[str, Any]:
    """Check the client under one load: its percentiles, and whether requests left on time (p99)."""
    spec = WorkloadSpec(num_requests=load.requests, input_len=16, output_len=_TOKENS)
    script = Script(ttft_ms=load.gap_ms, gap_ms=load.gap_ms, jitter=0.3)
    how: dict[str, Any] = {"concurrency": load.streams}
    if load.rate is not None:
        how = {"request_rate": load.rate, "burstiness": 4.0}
    errors, report = percentile_errors(script, how, spec)
    completed = report["requests"]["completed"] == report["requests"]["planned"]
    lag = report["dispatch_lag_ms"]
    return {
        "schema": SCHEMA,
        "streams": load.streams,
        "rate": load.rate,
        "requests": load.requests,
        "streams_seen": report["metrics"]["steady"]["concurrency"],
        "errors_ms": errors,
        "dispatch_lag_ms": lag,
        "loop_lag_ms": report["client"]["loop_lag_ms"],
        "workers": report["client"]["workers"],
        "tolerance_ms": tolerance_ms,
        "lag_tolerance_ms": lag_tolerance_ms,
        "environment": report["environment"],
        "ok": completed and max(errors.values()) <= tolerance_ms and lag["p99"] < lag_tolerance_ms,
    }


def check_all(
    tolerance_ms: float, lag_tolerance_ms: float, say: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Check the client under all of :data:`BARS`; ``say`` hears each result."""
    results = []
    for load in BARS:
        results.append(check_client(load, tolerance_ms, lag_tolerance_ms))
        say(results[-1])
    return {"schema": SCHEMA, "loads": results, "ok": all(result["ok"] for result in results)}
