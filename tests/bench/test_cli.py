"""``vllm-sparse bench`` as people type it: exit codes, files, messages."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench.loopback import LoopbackServer, Script
from converters.cli import run

WORDS = ["bench", "run", "--input-len", "4", "--output-len", "4", "--num-requests", "6"]


def test_run_writes_its_reports(
    fast_server: LoopbackServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    json_path, csv_path = tmp_path / "new" / "a.json", tmp_path / "a.csv"
    files = ["--json", str(json_path), "--csv", str(csv_path)]
    code = run(
        [*WORDS, "--base-url", fast_server.base_url, "--model", "loopback", "--concurrency", "2", *files]
    )
    assert code == 0
    report = json.loads(json_path.read_text())
    assert report["requests"]["completed"] == 6
    rows = list(csv.DictReader(csv_path.open()))
    assert len(rows) == 6
    assert float(rows[0]["first_token_ms"]) > 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "6 of 6 requests completed" in " ".join(captured.err.split())


def test_json_on_standard_output(
    fast_server: LoopbackServer, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert run([*WORDS, "--base-url", fast_server.base_url, "--json", "-"]) == 0
    assert json.loads(capfdbinary.readouterr().out)["schema"] == "vllm-sparse/bench-run/1"


def test_failed_requests_exit_1_with_the_report_written(fast_server: LoopbackServer, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert run([*WORDS, "--base-url", fast_server.base_url, "--model", "wrong", "--json", str(path)]) == 1
    assert json.loads(path.read_text())["requests"]["failed"] == 6


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--base-url", "http://127.0.0.1:9"], "no server at http://127.0.0.1:9"),
        (["--base-url", "ftp://x"], "--base-url"),
        (["--base-url", "http://127.0.0.1:9", "--goodput", "speed:1"], "--goodput"),
        (["--base-url", "http://127.0.0.1:9", "--dataset", "nope"], "choose one of"),
        (["--base-url", "http://127.0.0.1:9", "--extra-body", "[]"], "expected an object"),
        (["--base-url", "http://127.0.0.1:9", "--json", "/proc"], "is a directory"),
        ([], "base-url"),
    ],
)
def test_bad_usage_exits_2(extra: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*WORDS, *extra]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "run", "--help"]) == 0
    assert "Example: vllm-sparse bench run" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("workers", ["1", "2"])
def test_interrupt_ends_the_run_with_a_report(tmp_path: Path, workers: str) -> None:
    path = tmp_path / "a.json"
    with LoopbackServer(Script(ttft_ms=300, gap_ms=300)) as server:
        words = [*WORDS, "--base-url", server.base_url, "--json", str(path), "--workers", workers]
        words += ["--concurrency", "2", "--num-warmups", "0"]
        process = subprocess.Popen([sys.executable, "-m", "converters.cli", *words], stderr=subprocess.PIPE)
        while not server.truth():
            assert process.poll() is None
        os.kill(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=30)
    assert process.returncode == 130, error.decode()
    requests = json.loads(path.read_text())["requests"]
    assert requests["cancelled"] == 2
    assert requests["not_sent"] == 4
