"""Metrics pushed while a run is on: to a real Pushgateway, and what a gateway receives, parsed."""

import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from prometheus_client.parser import text_string_to_metric_families

from bench.loopback import LoopbackServer, Script
from bench.push import PushConfig, parse_labels
from bench.runner import RunConfig, run
from bench.server import free_port
from bench.tally import EDGES_S
from bench.workloads import WorkloadSpec
from converters.cli import run as command
from vllm_sparse.errors import UserError

SPEC = WorkloadSpec(num_requests=20, input_len=6, output_len=5)
GATEWAY = shutil.which("prometheus-pushgateway") or shutil.which("pushgateway")

Samples = dict[str, dict[tuple[str, ...], float]]


def samples(text: str) -> Samples:
    """Value by name and by sorted values of the labels that are not the group's."""
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("job", "model", "instance", "soak")}
            if "le" in labels:
                labels["le"] = repr(float(labels["le"]))  # the gateway writes 1.0 as 1
            found.setdefault(sample.name, {})[tuple(labels[k] for k in sorted(labels))] = sample.value
    return found


@contextmanager
def receiver(takes: int = 10**6) -> Iterator[tuple[str, list[tuple[str, Samples]]]]:
    """A small HTTP server in the gateway's place; keeps path and parsed body of the pushes it takes."""
    received: list[tuple[str, Samples]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            if len(received) < takes:
                received.append((self.path, samples(body)))
                self.send_response(200)
            else:
                self.send_response(503)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", received
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def pushgateway() -> Iterator[str]:
    """The real program."""
    address = f"127.0.0.1:{free_port()}"
    process = subprocess.Popen(
        [GATEWAY, f"--web.listen-address={address}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(100):
            try:
                urllib.request.urlopen(f"http://{address}/-/ready", timeout=1).close()
                break
            except OSError:
                time.sleep(0.05)
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait()


def check_final(pushed: Samples, report: dict) -> None:
    """The last push holds the report's own figures."""
    metrics = report["metrics"]
    assert pushed["vllm_sparse_bench_requests_total"] == {("completed",): 20.0, ("failed",): 0.0}
    assert pushed["vllm_sparse_bench_requests_planned"] == {(): 20.0}
    assert pushed["vllm_sparse_bench_tokens_total"][("output",)] == metrics["output_tokens"]
    for latency in ("ttft", "tpot", "e2e"):
        name = f"vllm_sparse_bench_{latency}_seconds"
        assert pushed[name + "_count"][()] == 20
        assert pushed[name + "_sum"][()] == pytest.approx(
            20 * metrics[f"{latency}_ms"]["mean"] / 1000, rel=1e-6
        )
        buckets = [pushed[name + "_bucket"][(repr(edge),)] for edge in EDGES_S]
        assert buckets == sorted(buckets)
        # Every request is in the bucket that its latency belongs to.
        below = sum(edge < metrics[f"{latency}_ms"]["min"] / 1000 for edge in EDGES_S)
        assert all(value == 0 for value in buckets[:below])
        assert buckets[below] > 0
        assert pushed[f"vllm_sparse_bench_final_{latency}_seconds"][("0.99",)] == pytest.approx(
            metrics[f"{latency}_ms"]["p99"] / 1000
        )


@pytest.mark.serial
@pytest.mark.parametrize("workers", [1, 2])
def test_totals_grow_and_end_at_the_reports_figures(workers: int) -> None:
    with LoopbackServer(Script(ttft_ms=30, gap_ms=10)) as server, receiver() as (url, received):
        push = PushConfig(url, {"soak": "night-1"}, interval_s=0.1)
        config = RunConfig(server.base_url, workload=SPEC, push=push, concurrency=2, workers=workers)
        result = run(config)
    assert result.ok
    assert not result.report["warnings"]
    assert {path for path, _ in received} == {"/metrics/job/vllm-sparse-bench/model/loopback/soak/night-1"}
    done = [pushed["vllm_sparse_bench_requests_total"][("completed",)] for _, pushed in received]
    assert done[0] == 0
    assert done == sorted(done)
    assert any(0 < value < 20 for value in done)
    check_final(received[-1][1], result.report)


def test_real_pushgateway() -> None:
    if GATEWAY is None:
        if os.environ.get("CI"):
            pytest.fail("no prometheus-pushgateway here; .ci/run installs it")
        pytest.skip("no prometheus-pushgateway here (Debian: apt-get install prometheus-pushgateway)")
    with LoopbackServer(Script(ttft_ms=10, gap_ms=2)) as server, pushgateway() as url:
        result = run(RunConfig(server.base_url, workload=SPEC, push=PushConfig(url, {"soak": "a"})))
        with urllib.request.urlopen(url + "/metrics", timeout=10) as page:
            text = page.read().decode()
    assert 'job="vllm-sparse-bench"' in text
    assert 'soak="a"' in text
    check_final(samples(text), result.report)


@pytest.mark.serial
def test_gateway_that_goes_away_is_reported_and_the_run_goes_on() -> None:
    with LoopbackServer(Script(ttft_ms=30, gap_ms=10)) as server, receiver(takes=2) as (url, received):
        result = run(RunConfig(server.base_url, workload=SPEC, push=PushConfig(url, {}, interval_s=0.1)))
    assert result.ok
    assert len(received) == 2
    assert f"pushes to {url} failed" in " ".join(result.report["warnings"])


def test_no_gateway_is_an_error_before_anything_is_measured(
    fast_server: LoopbackServer, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    words = ["--base-url", fast_server.base_url, "--push", url, "--num-requests", "2"]
    assert command(["bench", "run", *words]) == 2
    assert f"no Pushgateway at {url}" in " ".join(capsys.readouterr().err.split())


def test_labels() -> None:
    assert parse_labels(["a=1", "b=x=y"]) == {"a": "1", "b": "x=y"}
    with pytest.raises(UserError, match="NAME=VALUE"):
        parse_labels(["a"])
    for name in ("job", "1a", "__x"):
        with pytest.raises(UserError, match="label names"):
            PushConfig("http://x", {name: "1"}).check()
    with pytest.raises(UserError, match="--push-interval"):
        PushConfig("http://x", {}, interval_s=0).check()
