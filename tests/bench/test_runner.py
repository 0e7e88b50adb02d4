"""The client against a scripted server: every request accounted for, whatever the server does."""

import math
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from bench.client import normalise_base_url
from bench.loopback import LoopbackServer, Script
from bench.metrics import Goodput
from bench.probe import UnreachableError
from bench.runner import RunConfig, RunResult, run
from bench.workloads import WorkloadSpec
from vllm_sparse.errors import UserError

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
SPEC = WorkloadSpec(num_requests=12, input_len=6, output_len=5)


def config(server: LoopbackServer, **changes: object) -> RunConfig:
    return replace(RunConfig(server.base_url, workload=SPEC, concurrency=4), **changes)


def accounted(result: RunResult) -> None:
    """Every planned request has exactly one fate, and every failure is explained."""
    requests = result.report["requests"]
    assert requests["sent"] == requests["completed"] + requests["failed"] + requests["cancelled"]
    assert requests["planned"] == requests["sent"] + requests["not_sent"]
    assert sum(failure["count"] for failure in result.report["failures"]) == requests["failed"]
    assert all(failure["example"] for failure in result.report["failures"])


@pytest.fixture
def answering() -> Iterator[Callable[[bytes], str]]:
    """Starts servers that answer every POST with the same bytes; gives their addresses."""
    servers = []

    def start(body: bytes) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("stream", "endpoint", "body"),
    [
        (False, "completions", b'{"choices": [null], "usage": {"completion_tokens": 1}}'),
        (False, "chat", b'{"choices": [{"message": "x"}], "usage": {"completion_tokens": 1}}'),
        (True, "completions", b'data: {"choices": [null]}\n\ndata: [DONE]\n\n'),
        (True, "completions", b'data: {"choices": [{"text": 5}]}\n\ndata: [DONE]\n\n'),
        (True, "chat", b'data: {"choices": [{"delta": "x"}]}\n\ndata: [DONE]\n\n'),
        (True, "chat", b'data: {"choices": [{"delta": {"content": ["x"]}}]}\n\ndata: [DONE]\n\n'),
    ],
)
def test_json_that_is_not_the_protocol_is_a_failed_request(
    stream: bool, endpoint: str, body: bytes, answering: Callable[[bytes], str], tokenizer_dir: Path
) -> None:
    spec = WorkloadSpec(num_requests=2, input_len=3, output_len=2, turns=2)
    result = run(
        RunConfig(answering(body), "m", endpoint, spec, stream=stream, tokenizer=tokenizer_dir, scrape=False)
    )
    accounted(result)
    assert [failure["kind"] for failure in result.report["failures"]] == ["malformed"]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://h/v1/", "http://h"),
        ("HTTPS://h/api/v1", "https://h/api"),
        (" http://[::1]:80// ", "http://[::1]:80"),
    ],
)
def test_forms_of_a_servers_address(written: str, meant: str) -> None:
    assert normalise_base_url(written) == meant


@pytest.mark.parametrize(
    "url",
    [
        "",
        "http://",
        "ftp://h",
        "http://h:99999",
        "h:x",
        "http://h:0",
        "http://[::1",
        "http://h?a=1",
        "http://a b",
    ],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="--base-url is"):
        normalise_base_url(url)


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
@pytest.mark.parametrize("stream", [True, False])
def test_all_complete(
    fast_server: LoopbackServer, endpoint: str, stream: bool, tokenizer_dir: object
) -> None:
    result = run(config(fast_server, endpoint=endpoint, stream=stream, tokenizer=tokenizer_dir))
    accounted(result)
    metrics = result.report["metrics"]
    assert result.ok
    assert metrics["output_tokens"] == 12 * 5
    assert metrics["prompt_tokens"] == (12 * 6 if endpoint == "completions" else metrics["prompt_tokens"])
    assert metrics["e2e_ms"]["n"] == 12
    # Without streaming there is no first token to see: null, not zero.
    assert (metrics["ttft_ms"]["p50"] is None) == (not stream)
    assert metrics["itl_ms"]["n"] == (12 * 4 if stream else 0)


@pytest.mark.parametrize("workers", [1, 2])
def test_another_thread_may_end_a_run(workers: int) -> None:
    until = threading.Event()
    with LoopbackServer(Script(ttft_ms=40, gap_ms=5)) as server:
        one = config(server, workload=replace(SPEC, num_requests=5000), workers=workers)
        timer = threading.Timer(1.5 + workers, until.set)
        timer.start()
        result = run(one, until=until)
    timer.join()
    accounted(result)
    requests = result.report["requests"]
    assert result.load.interrupted
    assert requests["completed"] > 0
    assert requests["not_sent"] > 0
    assert requests["failed"] == 0


def test_contract_keys(fast_server: LoopbackServer) -> None:
    report = run(config(fast_server, goodput=Goodput.parse("e2e:10000"))).report
    assert report["schema"] == "vllm-sparse/bench-run/1"
    assert {"config", "environment", "requests", "metrics", "dispatch_lag_ms"} <= set(report)
    assert {"sent", "completed", "failed", "cancelled"} <= set(report["requests"])
    for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms", "ttft_from_schedule_ms"):
        for statistic in ("mean", "p50", "p90", "p95", "p99"):
            # Tokens that are read together have no gap, so 0 is a possible value.
            assert report["metrics"][name][statistic] >= 0
    for name in ("output_tokens_per_s", "total_tokens_per_s", "requests_per_s", "goodput_rps"):
        assert report["metrics"][name] > 0
    assert report["metrics"]["goodput_rps"] == pytest.approx(report["metrics"]["requests_per_s"])
    assert report["environment"]["packages"]["aiohttp"]


@pytest.mark.serial
def test_chunks_of_several_tokens_give_gaps_per_token() -> None:
    with LoopbackServer(Script(ttft_ms=5, gap_ms=40, tokens_per_chunk=4)) as server:
        spec = replace(SPEC, num_requests=4, output_len=12)
        per_token = run(config(server, workload=spec)).report["metrics"]
        per_chunk = run(config(server, workload=spec, continuous_usage=False)).report["metrics"]
    assert (per_token["itl_basis"], per_chunk["itl_basis"]) == ("token", "chunk")
    assert per_token["itl_ms"]["n"] == 4 * 8
    assert per_chunk["itl_ms"]["n"] == 4 * 2
    assert per_token["itl_ms"]["p50"] == pytest.approx(10, rel=0.3)
    assert per_chunk["itl_ms"]["p50"] == pytest.approx(40, rel=0.3)
    assert per_token["output_tokens"] == per_chunk["output_tokens"] == 48


def test_server_that_knows_only_openais_fields() -> None:
    with LoopbackServer(Script(ttft_ms=5, openai_only=True)) as server:
        result = run(config(server))
    assert result.ok
    assert result.report["config"]["continuous_usage"] is False
    assert result.report["metrics"]["itl_basis"] == "chunk"


def test_without_warm_ups_a_server_that_refuses_running_counts_is_named() -> None:
    with LoopbackServer(Script(ttft_ms=5, openai_only=True)) as server:
        refused = run(config(server, num_warmups=0))
        without = run(config(server, num_warmups=0, continuous_usage=False))
    assert not refused.ok
    assert refused.report["requests"]["failed"] == SPEC.num_requests
    assert "pass --no-continuous-usage" in refused.report["warnings"][-1]
    assert without.ok
    assert without.report["warnings"] == []


def test_other_failures_are_not_put_down_to_running_counts() -> None:
    with LoopbackServer(Script(ttft_ms=5, fault_every=2, fault="status_400")) as server:
        assert run(config(server, num_warmups=0)).report["warnings"] == []


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("status_429", "http"),
        ("status_500", "http"),
        ("truncated", "truncated"),
        ("malformed", "malformed"),
        ("not_sse", "truncated"),
        ("error_event", "server_error"),
        ("slow_loris", "timeout"),
    ],
)
def test_every_third_request_fails(fault: str, kind: str) -> None:
    with LoopbackServer(Script(ttft_ms=5, gap_ms=1, fault_every=3, fault=fault)) as server:
        result = run(config(server, num_warmups=0, timeout_s=2.0))
    accounted(result)
    assert not result.ok
    assert result.report["requests"]["failed"] == 4
    assert result.report["requests"]["completed"] == 8
    assert [failure["kind"] for failure in result.report["failures"]] == [kind]
    assert result.report["metrics"]["ttft_ms"]["n"] == 8
    # The failed ones took up to the timeout; none of that is in the latencies.
    assert result.report["metrics"]["e2e_ms"]["max"] < 2000


def test_retries_are_off_by_default_and_work_when_asked_for() -> None:
    with LoopbackServer(Script(ttft_ms=5, faults={0: "status_429"})) as server:
        assert not run(config(server, num_warmups=0)).ok
    with LoopbackServer(Script(ttft_ms=5, faults={0: "status_429"})) as server:
        result = run(config(server, num_warmups=0, retries=1))
    assert result.ok
    # The wait for the second attempt belongs to the request's latency.
    assert result.report["metrics"]["e2e_ms"]["max"] > 100


def test_server_killed_in_mid_run() -> None:
    def kill_in_mid_run(server: LoopbackServer) -> None:
        # Four users, each with one request at a time: when twelve have come, eight have been answered.
        while len(server.truth()) < 12:
            time.sleep(0.02)
        server.kill()

    with LoopbackServer(Script(ttft_ms=50, gap_ms=50)) as server:
        killer = threading.Thread(target=kill_in_mid_run, args=(server,))
        killer.start()
        result = run(config(server, workload=replace(SPEC, num_requests=60), num_warmups=0))
        killer.join()
    accounted(result)
    requests = result.report["requests"]
    assert 8 <= requests["completed"] < 60
    assert requests["failed"] == 60 - requests["completed"]
    assert {failure["kind"] for failure in result.report["failures"]} <= {
        "truncated",
        "connect",
        "disconnected",
    }


def test_wrong_model_name_is_counted_not_raised(fast_server: LoopbackServer) -> None:
    result = run(config(fast_server, model="nobody"))
    accounted(result)
    assert result.report["requests"]["failed"] == 12
    assert result.report["failures"][0]["status"] == 404
    assert "does not exist" in result.report["failures"][0]["example"]
    assert "serves loopback" in result.report["warnings"][0]


def test_nobody_listening() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    with pytest.raises(UnreachableError, match=rf"no server at http://127\.0\.0\.1:{port}"):
        run(RunConfig(f"127.0.0.1:{port}/v1", workload=SPEC))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"concurrency": 0}, "--concurrency is 0"),
        ({"request_rate": -1.0}, "request rate is -1"),
        ({"request_rate": 9.0, "burstiness": 0.0}, "burstiness is 0"),
        ({"endpoint": "embeddings"}, "--endpoint"),
        ({"raw": "all"}, "--raw"),
        ({"timeout_s": 0.0}, "--timeout is 0"),
        ({"max_seconds": 0.0}, "--max-seconds is 0"),
        ({"max_seconds": math.nan}, "--max-seconds is nan"),
        ({"vocab_size": -5}, "--vocab-size is -5"),
        ({"num_warmups": -1}, "--num-warmups is -1"),
        ({"retries": -1}, "--retries is -1"),
        ({"workers": -1}, "--workers is -1"),
        ({"api_key": "a\r"}, "line break"),
        ({"workload": replace(SPEC, seed=-1)}, "--seed is -1"),
        ({"workload": replace(SPEC, think_time_s=math.inf)}, "--think-time is inf"),
        ({"stream": False, "goodput": Goodput.parse("tpot:50")}, "--goodput can only limit e2e"),
    ],
)
def test_bad_configuration_is_refused_before_anything_is_sent(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(replace(RunConfig("http://127.0.0.1:1", workload=SPEC), **changes))


def test_a_schedule_of_centuries_is_refused(fast_server: LoopbackServer) -> None:
    with pytest.raises(UserError, match="centuries"):
        run(config(fast_server, request_rate=1e-300))


def test_no_time_limit_for_a_request(fast_server: LoopbackServer) -> None:
    assert run(config(fast_server, timeout_s=math.inf)).ok


@pytest.mark.parametrize("rate", [None, math.inf])
def test_more_client_processes_than_users_do_not_add_users(rate: float | None) -> None:
    with LoopbackServer(Script(ttft_ms=20, gap_ms=5)) as server:
        one = config(server, concurrency=2, workers=4, request_rate=rate, num_warmups=0)
        result = run(one)
        notes = server.truth()
    # Counted by the server: requests begun and not ended at each beginning.
    spans = [(note["received_ns"], note["sent_ns"][-1]) for note in notes]
    assert max(sum(a <= begin < b for a, b in spans) for begin, _ in spans) <= 2
    assert result.ok
    assert result.load.workers == 2


@pytest.mark.serial
def test_time_limit_cancels_what_is_in_flight() -> None:
    with LoopbackServer(Script(ttft_ms=200, gap_ms=200)) as server:
        begin = time.monotonic()
        result = run(config(server, max_seconds=0.5, num_warmups=0))
    accounted(result)
    assert time.monotonic() - begin < 5
    assert result.report["requests"]["cancelled"] == 4
    assert result.report["requests"]["not_sent"] == 8


@pytest.mark.serial
def test_a_stall_shows_from_schedule_also_where_a_cap_hides_it() -> None:
    script = Script(ttft_ms=20, gap_ms=1, stall_at_s=0.3, stall_for_s=1.0)
    spec = replace(SPEC, num_requests=60, output_len=3)
    with LoopbackServer(script) as server:
        report = run(
            config(
                server, workload=spec, request_rate=40.0, burstiness=math.inf, concurrency=2, num_warmups=0
            )
        ).report
    metrics = report["metrics"]
    assert report["config"]["load_model"] == "capped"
    # Two requests meet the stall; the others wait in the client, which only the schedule's clock sees.
    assert metrics["ttft_ms"]["p50"] < 200
    assert metrics["ttft_from_schedule_ms"]["p50"] > 200
    assert metrics["ttft_from_schedule_ms"]["max"] >= metrics["ttft_ms"]["max"] > 500


@pytest.mark.serial
def test_open_loop_keeps_its_schedule() -> None:
    with LoopbackServer(Script(ttft_ms=300, gap_ms=10)) as server:
        result = run(
            config(server, workload=replace(SPEC, num_requests=40), request_rate=40.0, concurrency=None)
        )
    raw = result.report["raw"]
    assert raw["scheduled_ms"][-1] == pytest.approx(1000, abs=1)
    assert result.report["metrics"]["steady"]["concurrency"] > 5
    assert result.report["config"]["load_model"] == "open"


def test_rate_that_grows(fast_server: LoopbackServer) -> None:
    report = run(config(fast_server, ramp_from=10.0, request_rate=50.0, concurrency=None)).report
    due = report["raw"]["scheduled_ms"]
    assert due[-1] == pytest.approx(1000 * 2 * 12 / 60, abs=1)
    assert due[1] - due[0] > 2 * (due[-1] - due[-2])
    with pytest.raises(UserError, match="--ramp-from needs"):
        run(config(fast_server, ramp_from=10.0))


@pytest.mark.parametrize("rate", [None, 60.0])
def test_several_client_processes_share_the_work(rate: float | None) -> None:
    with LoopbackServer(Script(ttft_ms=20, gap_ms=2)) as server:
        result = run(
            config(
                server, workload=replace(SPEC, num_requests=41), workers=2, request_rate=rate, raw="chunks"
            )
        )
        truth = server.truth()
    accounted(result)
    assert result.ok
    assert result.report["client"]["workers"] == 2
    assert result.report["raw"]["index"] == list(range(41))
    assert [len(chunks) for chunks in result.report["raw"]["chunks_ms"]] == [5] * 41
    assert len({note["key"] for note in truth}) == len(truth)
    in_flight = result.report["metrics"]["steady"]["concurrency"]
    assert in_flight <= 4


def test_warmups_are_not_measured_and_differ_from_the_workload(fast_server: LoopbackServer) -> None:
    with LoopbackServer(Script(ttft_ms=5, gap_ms=1)) as server:
        result = run(config(server, num_warmups=3))
        truth = server.truth()
    assert result.report["requests"]["warmups"] == 3
    assert len(truth) == 15
    assert result.report["metrics"]["ttft_ms"]["n"] == 12
    assert len({note["key"] for note in truth}) == 15


def test_api_key_is_in_no_report(fast_server: LoopbackServer) -> None:
    secret = "sk-very-secret"
    result = run(config(fast_server, api_key=secret))
    assert secret not in str(result.report)
    assert secret not in repr(config(fast_server, api_key=secret))


def test_servers_own_figures_stand_beside_the_clients() -> None:
    with LoopbackServer(Script(ttft_ms=40, gap_ms=5)) as server:
        report = run(config(server)).report
        without = run(config(server, scrape=False)).report
    figures = report["server_metrics"]
    # The page is read before and after the run, so warm-ups do not count.
    assert figures["prompt_tokens"] == 12 * 6
    assert figures["generation_tokens"] == 12 * 5
    assert figures["ttft_ms"]["n"] == 12
    assert 35 < figures["ttft_ms"]["mean"] < report["metrics"]["ttft_ms"]["mean"]
    assert report["server_ttft_gap_ms"] > 0
    assert without["server_metrics"] is None


def test_client_process_that_dies_at_its_start_is_an_error_not_a_hang(fast_server: LoopbackServer) -> None:
    # Without the usual guard every spawned process runs this program again, and dies of it.
    program = f"""
from bench.runner import RunConfig, WorkloadSpec, run
spec = WorkloadSpec(num_requests=4, input_len=4, output_len=2)
run(RunConfig({fast_server.base_url!r}, workload=spec, workers=2, concurrency=2))
"""
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(program)
        file.flush()
        words = [sys.executable, file.name]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=ROOT, env=ENVIRONMENT)
    assert done.returncode == 1
    assert "WorkerError: a client process died" in done.stderr
