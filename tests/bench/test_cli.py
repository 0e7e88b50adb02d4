"""``vllm-sparse bench`` as people type it: exit codes, files, messages."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench import files
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
    assert captured.err.splitlines()[-1] == f"written: {json_path}, {csv_path}"


def test_json_on_standard_output(
    fast_server: LoopbackServer, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert run([*WORDS, "--base-url", fast_server.base_url, "--json", "-"]) == 0
    assert json.loads(capfdbinary.readouterr().out)["schema"] == "vllm-sparse/bench-run/1"


def test_any_report_on_standard_output(
    fast_server: LoopbackServer, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert run([*WORDS, "--base-url", fast_server.base_url, "--csv", "-"]) == 0
    assert capfdbinary.readouterr().out.startswith(b"index,")
    assert run([*WORDS, "--base-url", fast_server.base_url, "--html", "-"]) == 0
    assert capfdbinary.readouterr().out.lower().startswith(b"<!doctype html>")


def test_what_is_no_file_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe, real, link = tmp_path / "pipe", tmp_path / "real.json", tmp_path / "link.json"
    os.mkfifo(pipe)
    link.symlink_to(real)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    files.check_writable(pipe, link)
    files.write_text("{}", pipe)
    files.write_text("{}", link)
    assert os.read(reader, 10) == b"{}"
    os.close(reader)
    assert pipe.is_fifo()
    assert link.is_symlink()
    assert real.read_text() == "{}"
    assert len(list(tmp_path.iterdir())) == 3


def test_csv_without_the_times_is_refused_before_anything_is_sent(
    fast_server: LoopbackServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = len(fast_server.truth())
    words = ["--csv", str(tmp_path / "a.csv"), "--raw", "none"]
    assert run([*WORDS, "--base-url", fast_server.base_url, *words]) == 2
    assert "--raw" in capsys.readouterr().err
    assert len(fast_server.truth()) == before


def test_limits_are_named_in_words(fast_server: LoopbackServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*WORDS, "--base-url", fast_server.base_url, "--goodput", "ttft:2000,e2e:9000"]) == 0
    assert "requests/s within TTFT 2000 ms, E2E 9000 ms" in " ".join(capsys.readouterr().err.split())


def test_failed_requests_exit_1_with_the_report_written(
    fast_server: LoopbackServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.json"
    assert run([*WORDS, "--base-url", fast_server.base_url, "--model", "wrong", "--json", str(path)]) == 1
    assert json.loads(path.read_text())["requests"]["failed"] == 6
    said = capsys.readouterr().err
    assert "0 of 6 requests completed" in said
    assert "TTFT" not in said


@pytest.mark.parametrize(
    "fault",
    ["status_429", "status_500", "truncated", "malformed", "error_event", "not_sse", "slow_loris", "die"],
)
def test_whatever_the_server_does_every_request_is_accounted_for(fault: str, tmp_path: Path) -> None:
    """``die`` ends the server in the middle of its third answer."""
    files = {kind: tmp_path / f"a.{kind}" for kind in ("json", "csv", "html")}
    with LoopbackServer(Script(ttft_ms=5, gap_ms=1, fault_every=3, fault=fault)) as server:
        words = ["--base-url", server.base_url, "--num-warmups", "0", "--timeout", "2"]
        words += [word for kind, path in files.items() for word in (f"--{kind}", str(path))]
        assert run([*WORDS, *words]) == 1
    report = json.loads(files["json"].read_text())
    requests = report["requests"]
    lost = 4 if fault == "die" else 2
    assert requests == requests | {"planned": 6, "sent": 6, "completed": 6 - lost, "failed": lost}
    assert sum(failure["count"] for failure in report["failures"]) == lost
    rows = list(csv.DictReader(files["csv"].open()))
    assert [row["outcome"] for row in rows].count("failed") == lost
    assert report["failures"][0]["kind"] in files["html"].read_text()


def test_api_key_is_sent_and_shown_nowhere(
    fast_server: LoopbackServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key = "sk-a-secret-of-mine"
    files = [tmp_path / name for name in ("a.json", "a.csv", "a.html")]
    words = [*WORDS, "--base-url", fast_server.base_url, "--model", "wrong", "--api-key", key]
    words += [word for path in files for word in (f"--{path.suffix[1:]}", str(path))]
    monkeypatch.setattr(sys, "argv", ["vllm-sparse", *words])
    monkeypatch.setenv("HF_TOKEN", key)
    assert run(words) == 1
    captured = capsys.readouterr()
    assert "--api-key" in files[0].read_text()
    for text in (captured.out, captured.err, *(path.read_text() for path in files)):
        assert key not in text


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
    with LoopbackServer(Script(ttft_ms=3000, gap_ms=3000)) as server:
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
