"""Cross-check against other tools: their commands, their reports, and the verdict."""

import json
import stat
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench import crosscheck
from bench.crosscheck import FIGURES, CrossCheckConfig, cross_check
from bench.crosscheck_guidellm import guidellm_command, read_guidellm
from bench.loopback import LoopbackServer, Script
from vllm_sparse.errors import FormatError, UserError


def guidellm_report(path: Path, latencies: list[tuple[float, float]], tokens: int = 5) -> Path:
    """A report with only what is read of it: (TTFT, ITL) in ms of requests that follow each other."""
    requests, now = [], 1000.0
    for ttft, itl in latencies:
        seconds = (ttft + itl * (tokens - 1)) / 1000
        requests.append(
            {
                "time_to_first_token_ms": ttft,
                "inter_token_latency_ms": itl,
                "output_tokens": tokens,
                "request_start_time": now,
                "request_end_time": now + seconds,
            }
        )
        now += seconds
    path.write_text(json.dumps({"benchmarks": [{"requests": {"successful": requests}}]}))
    return path


def test_guidellms_requests_in_our_definitions(tmp_path: Path) -> None:
    path = guidellm_report(tmp_path / "g.json", [(100.0, 10.0), (200.0, 20.0)])
    figures = read_guidellm(path, 2)
    assert set(figures) == set(FIGURES)
    assert figures["mean TTFT"] == pytest.approx(150)
    assert figures["p99 TTFT"] == pytest.approx(199)  # interpolated
    assert figures["mean TPOT"] == pytest.approx(15)
    assert figures["mean E2E"] == pytest.approx((140 + 280) / 2)
    assert figures["requests/s"] == pytest.approx(2 / 0.42)
    assert figures["output tokens/s"] == pytest.approx(10 / 0.42)
    with pytest.raises(UserError, match="completed 2 of 3"):
        read_guidellm(path, 3)
    path.write_text('{"benchmarks": []}')
    with pytest.raises(FormatError, match="not a report of guidellm"):
        read_guidellm(path, 2)


@pytest.fixture
def config(tokenizer_dir: Path, tmp_path: Path) -> CrossCheckConfig:
    """A guidellm that reports 15 ms to the first token and 3 ms for each further one."""
    recorded = guidellm_report(tmp_path / "recorded.json", [(15.0, 3.0)] * 8)
    program = tmp_path / "guidellm"
    program.write_text(
        f"#!{sys.executable}\nimport shutil, sys\n"
        "path = next(word for word in sys.argv if word.startswith('kind=json,path=')).partition('path=')[2]\n"
        f"shutil.copy({str(recorded)!r}, path)\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return CrossCheckConfig(
        "http://127.0.0.1:9", "loopback", tokenizer_dir, input_len=6, output_len=5, num_requests=8,
        concurrency=2, repeats=2, tolerance=10.0, guidellm=str(program),
    )  # fmt: skip


def test_tools_take_turns_and_are_compared(config: CrossCheckConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crosscheck, "_vllm", lambda *_: dict.fromkeys(FIGURES, 1.0))
    said: list[str] = []
    with LoopbackServer(Script(ttft_ms=15, gap_ms=3)) as server:
        kept: list[dict] = []
        report = cross_check(replace(config, base_url=server.base_url), said.append, kept.append)
    assert [(one["repeats"], len(one["runs"]["ours"])) for one in kept] == [(1, 1), (2, 2)]
    assert kept[-1]["rows"] == report["rows"]
    assert [text.partition(": ")[2] for text in said] == [
        "ours",
        "vllm",
        "guidellm",
        "vllm",
        "guidellm",
        "ours",
    ]
    rows = {(row["tool"], row["figure"]): row for row in report["rows"]}
    assert len(rows) == 2 * len(FIGURES)
    assert rows["guidellm", "mean TTFT"]["theirs"] == pytest.approx(15)
    assert rows["guidellm", "mean TPOT"]["ours"] > 2.5  # a busy machine only adds to it
    row = rows["vllm", "mean TTFT"]
    assert row["difference"] == pytest.approx(row["ours"] / row["theirs"] - 1)
    low, high = row["differences"]
    assert low <= row["difference"] <= high
    # A tool that says 1.0 of everything is not within any tolerance of 15 ms.
    assert not report["ok"]


def test_a_machine_that_gets_slower_is_no_difference_between_tools() -> None:
    """Repeat by repeat both tools see the same server, which takes ever longer."""
    ours = [dict.fromkeys(FIGURES, value) for value in (10.0, 20.0, 31.0)]
    theirs = [dict.fromkeys(FIGURES, value) for value in (10.0, 20.0, 30.0)]
    row = crosscheck._row("mean TTFT", "vllm", ours, theirs)
    assert (row["ours"], row["theirs"], row["difference"]) == (20.0, 20.0, 0.0)
    assert row["differences"] == pytest.approx([0.0, 1 / 30])
    assert (row["range_ours"], row["range_theirs"]) == (21.0, 20.0)


def test_a_slow_run_is_no_difference_beside_the_servers_own_figures() -> None:
    """Our run met a server that was half as fast, and said so itself; we add 1 %."""
    summary = {"ttft_ms": {"mean": 20.0}, "e2e_ms": {"mean": 60.0}}
    slow, fast = (
        crosscheck.server_figures(summary, 5),
        {"mean TTFT": 10.0, "mean E2E": 30.0, "mean TPOT": 5.0},
    )
    assert slow == {"mean TTFT": 20.0, "mean E2E": 60.0, "mean TPOT": 10.0}
    runs = {"ours": [{"mean TTFT": 20.2}], "vllm": [{"mean TTFT": 10.0}]}
    servers = {"ours": [slow], "vllm": [fast]}
    assert crosscheck._beside_server("mean TTFT", runs, servers, "vllm") == pytest.approx(0.01)
    assert crosscheck._beside_server("p99 TTFT", runs, servers, "vllm") is None
    assert crosscheck.server_figures(None, 5) == {}
    assert "mean TPOT" not in crosscheck.server_figures(summary, 1)


def test_command_line_of_guidellm(tmp_path: Path) -> None:
    words = guidellm_command(
        "guidellm", "http://h:1", "m", Path("/tok"), lengths=(7, 3), concurrency=2, num_requests=9, seed=5,
        report=tmp_path / "r.json",
    )  # fmt: skip
    assert words[words.index("--data") + 1] == "kind=synthetic_text,prompt_tokens=7,output_tokens=3"
    assert words[words.index("--profile") + 1] == "kind=concurrent,streams=2"


def test_missing_program_is_one_sentence(config: CrossCheckConfig) -> None:
    with pytest.raises(UserError, match="--guidellm /nowhere/guidellm: No such file"):
        crosscheck.guidellm_figures(replace(config, guidellm="/nowhere/guidellm"), 0)
