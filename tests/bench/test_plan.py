"""``--dry-run``: the plan and its time, without a load test."""

import json
import math
import re
from pathlib import Path

import pytest

from bench import sweep as sweep_module
from bench.loopback import LoopbackServer, Script
from bench.metrics import Goodput
from bench.plan import plan
from bench.runner import RunConfig, run
from bench.sweep import SweepConfig, search_seconds
from bench.workloads import WorkloadSpec
from converters.cli import run as command
from vllm_sparse.errors import UserError

NOWHERE = "http://127.0.0.1:9"
SPEC = WorkloadSpec(num_requests=8, input_len=6, output_len=4)


@pytest.mark.parametrize(
    ("settings", "load", "expected"),
    [
        ({}, "closed loop, 1 user", "unknown, http://127.0.0.1:9 does not answer"),
        ({"request_rate": 2.0}, "open loop, 2 requests/s (Poisson)", "at least 4 s"),
        ({"request_rate": 2.0, "burstiness": math.inf}, "open loop, 2 requests/s (constant)", "at least 4 s"),
        ({"request_rate": 3.0, "ramp_from": 1.0}, "open loop, from 1 to 3 requests/s", "at least 4 s"),
        ({"request_rate": math.inf}, "open loop, all at once", "unknown"),
        ({"request_rate": 2.0, "concurrency": 3}, "requests/s (Poisson), at most 3 in flight", "unknown"),
        ({"request_rate": 2.0, "max_seconds": 3.0}, "open loop", "cut off after 3 s"),
    ],
)
def test_without_a_server_the_schedule_is_known(settings: dict, load: str, expected: str) -> None:
    found = plan(RunConfig(NOWHERE, workload=SPEC, **settings))
    assert load in found.load
    assert expected in found.expected
    assert (found.requests, found.prompt_tokens, found.output_tokens) == (8, 6, 32)


def test_what_is_planned_is_what_is_sent(fast_server: LoopbackServer) -> None:
    spec = WorkloadSpec(num_requests=12, input_len=20, output_len=6, range_ratio=0.5, ignore_eos=True)
    config = RunConfig(fast_server.base_url, workload=spec, concurrency=3)
    found = plan(config)
    report = run(config).report
    raw = report["raw"]
    assert found.requests == report["requests"]["planned"] == 12
    assert found.warmups == report["requests"]["warmups"] == 3
    assert found.prompt_tokens == pytest.approx(sum(raw["prompt_tokens"]) / 12)
    assert found.output_tokens == sum(raw["output_tokens"])


def test_closed_loop_takes_what_the_server_takes() -> None:
    """8 requests of two users, 50 ms and 9 gaps of 20 ms each: at least 4 x 230 ms, and two warm-ups."""
    spec = WorkloadSpec(num_requests=8, input_len=32, output_len=10)
    with LoopbackServer(Script(ttft_ms=50, gap_ms=20)) as server:
        found = plan(RunConfig(server.base_url, workload=spec, concurrency=2))
        assert len(server.truth()) == 2  # one short request, and one before it
    seconds = float(re.match(r"about (\d+) s", found.expected)[1])
    assert 1 <= seconds <= 10
    assert found.lines()[0] == f"{server.base_url}, model loopback"


def test_trace_and_conversations(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    rows = [{"timestamp": at, "input_length": 10 + at, "output_length": 3} for at in (0, 10, 8000)]
    trace.write_text("\n".join(map(json.dumps, rows)))
    found = plan(RunConfig(NOWHERE, workload=WorkloadSpec(dataset="trace", path=trace, output_len=None)))
    assert found.load == f"replay of {trace}"
    assert found.expected.startswith("at least 8 s")
    assert (found.requests, found.output_tokens) == (3, 9)
    talk = tmp_path / "talk.json"
    turns = [{"from": "human", "value": "x" * 40}, {"from": "gpt", "value": "y"}] * 3
    talk.write_text(json.dumps([{"conversations": turns}] * 2))
    spec = WorkloadSpec(dataset="sharegpt", path=talk, num_requests=2, turns=0, output_len=5)
    found = plan(RunConfig(NOWHERE, workload=spec))
    assert (found.requests, found.conversations, found.output_tokens) == (6, 2, 30)
    # 10, then 10 + 5 + 10, then 10 + 5 + 10 + 5 + 10 tokens.
    assert found.prompt_tokens == pytest.approx((10 + 25 + 40) / 3)


def test_what_cannot_be_run_cannot_be_planned() -> None:
    with pytest.raises(UserError, match="--tokenizer"):
        plan(RunConfig(NOWHERE, endpoint="chat", workload=SPEC))


def test_run_command(fast_server: LoopbackServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "run.json"
    words = ["--input-len", "4", "--output-len", "4", "--num-requests", "6", "--json", str(out), "--dry-run"]
    before = len(fast_server.truth())
    assert command(["bench", "run", "--base-url", fast_server.base_url, "--request-rate", "3", *words]) == 0
    assert len(fast_server.truth()) == before
    error = " ".join(capsys.readouterr().err.split())
    assert "open loop, 3 requests/s (Poisson): 6 requests, after 1 for warming up" in error
    assert "prompts of 4 tokens (mean), 24 tokens to generate" in error
    assert "expected: at least 2 s, more where the server cannot keep up" in error
    assert command(["bench", "run", "--base-url", fast_server.base_url, *words]) == 0
    assert "by one short request" in " ".join(capsys.readouterr().err.split())
    assert not out.parent.exists()
    assert command(["bench", "run", "--base-url", NOWHERE, "--dataset", "nope", *words]) == 2


def test_search_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = RunConfig(NOWHERE, workload=SPEC, goodput=Goodput.parse("ttft:100"))
    config = SweepConfig(base, "request_rate", (4.0,), tmp_path, search=True, seconds=10.0)
    low, high = search_seconds(config)
    # Shortest: 4 and 8 requests/s and four bisections, of 10 s each. Longest: down to a 64th of the first
    # rate, where eight requests, the fewest of a point, take over two minutes.
    assert low == pytest.approx(60, rel=0.05)
    assert 8 / (4 / 64) < high < 1000
    limit, points = math.nan, []

    class Point:
        def __init__(self, one: RunConfig) -> None:
            self.seconds = one.workload.num_requests / one.request_rate
            good = one.request_rate <= limit
            self.report = {
                "schema": "vllm-sparse/bench-run/1",
                "config": {"model": "m"},
                "requests": {"planned": 10, "completed": 10},
                "metrics": {"goodput_rps": 10.0 * good, "duration_s": 1.0},
                "validity": {},
            }
            self.load = type("Load", (), {"interrupted": False})()

    def measure(one: RunConfig) -> Point:
        points.append(Point(one))
        return points[-1]

    monkeypatch.setattr(sweep_module, "run", measure)
    for number, limit in enumerate((0.01, 0.2, 5.0, 100.0, 1e9)):  # noqa: B007
        points.clear()
        search = SweepConfig(base, "request_rate", (4.0,), tmp_path / str(number), search=True, seconds=10.0)
        sweep_module.sweep(search, lambda _: None)
        # A point has a whole number of requests, so its length is not exactly 10 s.
        assert 0.98 * low <= sum(point.seconds for point in points) <= 1.02 * high
    # What is measured already costs nothing more.
    assert search_seconds(search)[0] < low


def test_sweep_counts_what_is_left(
    fast_server: LoopbackServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--base-url",
        fast_server.base_url,
        "--input-len",
        "4",
        "--output-len",
        "4",
        "--num-requests",
        "8",
    ]
    words += ["--out", str(tmp_path / "points")]
    assert command(["bench", "sweep", *words, "--rates", "40"]) == 0
    assert command(["bench", "sweep", *words, "--rates", "2,40", "--dry-run"]) == 0
    error = " ".join(capsys.readouterr().err.split())
    assert "request_rate 40: 8 requests, 0 s of sending, measured already" in error
    assert "expected: at least 4 s" in error
    search = ["--search-from", "2", "--goodput", "ttft:100", "--seconds", "10", "--dry-run"]
    assert command(["bench", "sweep", *words, *search]) == 0
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(r"expected: \d+ s to \d+ (s|min) of sending, by the rate that is found", error)
