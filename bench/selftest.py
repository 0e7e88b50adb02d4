"""How exact the client is: its percentiles against what a scripted server noted on the same clock."""

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


def check_client(streams: int, rate: float, tolerance_ms: float) -> dict[str, Any]:
    """Check the client at about ``streams`` concurrent streams that begin at ``rate`` per second."""
    # Streams in flight = rate x time of one stream.
    gap_ms = 1000 * streams / rate / _TOKENS
    spec = WorkloadSpec(num_requests=2 * streams, input_len=16, output_len=_TOKENS)
    script = Script(ttft_ms=gap_ms, gap_ms=gap_ms, jitter=0.3)
    errors, report = percentile_errors(script, {"request_rate": rate, "burstiness": 4.0}, spec)
    completed = report["requests"]["completed"] == report["requests"]["planned"]
    return {
        "schema": SCHEMA,
        "streams": streams,
        "rate": rate,
        "streams_seen": report["metrics"]["steady"]["concurrency"],
        "errors_ms": errors,
        "dispatch_lag_ms": report["dispatch_lag_ms"],
        "loop_lag_ms": report["client"]["loop_lag_ms"],
        "workers": report["client"]["workers"],
        "tolerance_ms": tolerance_ms,
        "ok": completed and max(errors.values()) <= tolerance_ms,
    }
