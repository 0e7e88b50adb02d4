import io
from array import array

import pytest
from rich.console import Console

from bench import console
from bench.engine import EngineResult
from bench.metrics import Goodput, dispatch_lag, run_metrics, steady_window, validity
from bench.records import FailureKind, Outcome, RequestRecord
from vllm_sparse.errors import UserError

MS = 1_000_000


def record(index: int, due: float, sent: float, chunks: list[float], tokens: list[int]) -> RequestRecord:
    """A completed request; times in ms."""
    return RequestRecord(
        index,
        scheduled_ns=round(due * MS),
        dispatched_ns=round(sent * MS),
        first_byte_ns=round(chunks[0] * MS),
        first_token_ns=round(chunks[0] * MS),
        last_token_ns=round(chunks[-1] * MS),
        finished_ns=round(chunks[-1] * MS),
        chunk_ns=array("q", [round(moment * MS) for moment in chunks]),
        chunk_tokens=array("q", tokens),
        prompt_tokens=10,
        output_tokens=tokens[-1] if tokens[-1] > 0 else len(chunks),
        outcome=Outcome.COMPLETED,
    )


def test_definitions_on_one_request() -> None:
    result = EngineResult([record(0, 0, 40, [140, 150, 190], [1, 2, 6])], start_ns=0, end_ns=200 * MS)
    metrics = run_metrics(result)
    assert metrics["ttft_ms"]["p50"] == pytest.approx(100)
    assert metrics["ttft_from_schedule_ms"]["p50"] == pytest.approx(140)
    assert metrics["e2e_ms"]["p50"] == pytest.approx(150)
    assert metrics["e2e_from_schedule_ms"]["p50"] == pytest.approx(190)
    assert metrics["tpot_ms"]["p50"] == pytest.approx(50 / 5)
    # One gap of 10 ms for a token, one of 40 ms for four tokens: five samples of 10 ms.
    assert metrics["itl_basis"] == "token"
    assert metrics["itl_ms"]["n"] == 5
    assert metrics["itl_ms"]["max"] == pytest.approx(10)
    assert metrics["requests_per_s"] == pytest.approx(1 / 0.19)
    assert metrics["output_tokens_per_s"] == pytest.approx(6 / 0.19)
    assert metrics["total_tokens_per_s"] == pytest.approx(16 / 0.19)
    assert metrics["goodput_rps"] is None


def test_without_running_counts_gaps_are_per_chunk() -> None:
    metrics = run_metrics(EngineResult([record(0, 0, 0, [10, 20, 60], [-1, -1, -1])], end_ns=60 * MS))
    assert metrics["itl_basis"] == "chunk"
    assert metrics["itl_ms"]["max"] == pytest.approx(40)


def test_failed_requests_enter_no_latency_and_no_throughput() -> None:
    failed = record(1, 0, 0, [1000], [1])
    failed.fail(FailureKind.TRUNCATED, "gone")
    metrics = run_metrics(EngineResult([record(0, 0, 0, [10], [1]), failed], end_ns=0))
    assert metrics["ttft_ms"]["n"] == 1
    assert metrics["ttft_ms"]["max"] == pytest.approx(10)
    assert metrics["tpot_ms"]["n"] == 0
    assert metrics["tpot_ms"]["p50"] is None
    assert metrics["requests_per_s"] == pytest.approx(1.0)
    assert metrics["output_tokens"] == 1


def test_goodput_needs_every_limit() -> None:
    records = [
        record(0, 0, 0, [100, 110], [1, 2]),
        record(1, 0, 0, [100, 200], [1, 2]),
        record(2, 0, 0, [500], [1]),
    ]
    result = EngineResult(records, end_ns=0)
    assert run_metrics(result, Goodput.parse("ttft:200"))["goodput_rps"] == pytest.approx(2 / 0.5)
    assert run_metrics(result, Goodput.parse("ttft:200,tpot:50"))["goodput_rps"] == pytest.approx(1 / 0.5)
    assert run_metrics(result, Goodput.parse("ttft:200, tpot:50, e2e:100"))["goodput_rps"] == 0


@pytest.mark.parametrize("text", ["", "ttft", "ttft:x", "speed:3", "ttft:-1"])
def test_bad_goodput_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--goodput"):
        Goodput.parse(text)


def test_steady_window_leaves_out_ramp_and_drain() -> None:
    # Ten requests in flight from 100 to 900 ms, a token every 100 ms; one early, one late straggler.
    records = [record(i, 0, 100, [200 + 100 * j for j in range(8)], list(range(1, 9))) for i in range(10)]
    records.append(record(10, 0, 0, [50], [1]))
    records.append(record(11, 0, 950, [2000], [1]))
    window = steady_window(records)
    assert window is not None
    assert window["seconds"] == pytest.approx(0.8)
    assert window["output_tokens_per_s"] == pytest.approx(80 / 0.8)


def test_late_client_makes_the_run_invalid() -> None:
    records = [record(i, 0, 50, [100], [1]) for i in range(10)]
    metrics, lag = run_metrics(EngineResult(records, end_ns=0)), dispatch_lag(records)
    assert lag["p99"] == pytest.approx(50)
    judged = validity(metrics, lag, capped=False)
    assert not judged["valid"]
    assert "50.0 ms late" in judged["reasons"][0]
    assert validity(metrics, lag, capped=True)["valid"]


def test_a_servers_words_are_printed_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's errors hold pydantic's ``[type=...]``, which rich takes for a style."""
    monkeypatch.setattr(console, "summary_table", lambda report: "")
    said = "Input should be 1 [type=int, input_value=0] [/v1]"
    report = {
        "failures": [{"kind": "http", "status": 400, "count": 3, "example": said}],
        "requests": {"completed": 3, "cancelled": 0, "not_sent": 0, "warmups_failed": 0},
        "validity": {"reasons": []},
        "warnings": [said],
    }
    out = io.StringIO()
    console.print_run(Console(file=out, width=200), report)
    assert out.getvalue().count(said) == 2
