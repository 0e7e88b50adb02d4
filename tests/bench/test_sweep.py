import csv
import json
from pathlib import Path

import pytest

from bench import sweep as sweep_module
from bench.loopback import LoopbackServer, Script
from bench.metrics import Goodput
from bench.output import read_report
from bench.runner import RunConfig
from bench.sweep import SweepConfig, fingerprint, parse_values, sweep
from bench.workloads import WorkloadSpec
from converters.cli import run as command
from vllm_sparse.errors import FormatError, UserError

SPEC = WorkloadSpec(num_requests=8, input_len=4, output_len=4)
WORDS = ["--input-len", "4", "--output-len", "4", "--num-requests", "8"]


def quiet(_: str) -> None:
    pass


def test_sweep_goes_on_where_it_was_left(
    fast_server: LoopbackServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = RunConfig(fast_server.base_url, workload=SPEC)
    config = SweepConfig(base, "concurrency", (2, 1, 4), tmp_path)
    usual, measured = sweep_module.run, []

    def interrupted(point: RunConfig) -> object:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(point.concurrency)
        return usual(point)

    monkeypatch.setattr(sweep_module, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep(config, quiet)
    assert len(list(tmp_path.glob("*.json"))) == 2
    monkeypatch.setattr(sweep_module, "run", lambda point: measured.append(point.concurrency) or usual(point))
    report = sweep(config, quiet)
    assert measured == [2, 1, 4]
    assert [point["value"] for point in report["points"]] == [1, 2, 4]
    assert report["ok"]


def test_points_of_another_configuration_are_not_taken(fast_server: LoopbackServer, tmp_path: Path) -> None:
    base = RunConfig(fast_server.base_url, workload=SPEC)
    other = RunConfig(fast_server.base_url, workload=WorkloadSpec(num_requests=8, input_len=5, output_len=4))
    assert fingerprint(base) != fingerprint(other)
    sweep(SweepConfig(base, "concurrency", (1,), tmp_path), quiet)
    sweep(SweepConfig(other, "concurrency", (1,), tmp_path), quiet)
    assert len(list(tmp_path.glob("*.json"))) == 2


def test_points_of_another_model_at_the_same_address_are_not_taken(tmp_path: Path) -> None:
    with LoopbackServer(Script(ttft_ms=1, gap_ms=1)) as server:
        config = SweepConfig(RunConfig(server.base_url, workload=SPEC), "concurrency", (1,), tmp_path)
        sweep(config, quiet)
        path = next(tmp_path.glob("*.json"))
        path.write_text(path.read_text().replace('"model": "loopback"', '"model": "another"'))
        assert sweep(config, quiet)["config"]["model"] == "loopback"
        path.write_text(path.read_text().replace('"model": "loopback"', '"model": "kept"'))
    # Nobody is asked any more, and what is there is enough.
    assert sweep(config, quiet)["config"]["model"] == "kept"


def test_points_with_failed_requests_are_measured_again(tmp_path: Path) -> None:
    with LoopbackServer(Script(ttft_ms=1, gap_ms=1, faults={4: "status_500"})) as server:
        config = SweepConfig(RunConfig(server.base_url, workload=SPEC), "concurrency", (1,), tmp_path)
        assert not sweep(config, quiet)["ok"]
        assert [point.kept for point in sweep_module.plan(config)] == [False]
        assert sweep(config, quiet)["ok"]
    assert [point.kept for point in sweep_module.plan(config)] == [True]
    assert sweep(config, quiet)["ok"]


def test_search_finds_the_rate_at_which_the_limit_breaks(
    fast_server: LoopbackServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measured server is replaced by one that keeps its limits up to 13 requests/s."""

    class Point:
        def __init__(self, rate: float) -> None:
            good = rate if rate <= 13 else 0.5 * rate
            self.report = {
                "schema": "vllm-sparse/bench-run/1",
                "config": {"model": "m"},
                "requests": {"planned": 10, "completed": 10},
                "metrics": {"goodput_rps": good, "duration_s": 10 / rate},
                "validity": {},
            }
            self.load = type("Load", (), {"interrupted": False})()

    monkeypatch.setattr(sweep_module, "run", lambda config: Point(config.request_rate))
    base = RunConfig(fast_server.base_url, workload=SPEC, goodput=Goodput.parse("ttft:100"))
    report = sweep(SweepConfig(base, "request_rate", (1.0,), tmp_path, search=True), quiet)
    assert 12.3 <= report["best"]["value"] <= 13
    rates = [point["value"] for point in report["points"]]
    assert {1.0, 2.0, 4.0, 8.0, 16.0} <= set(rates)
    downwards = sweep(SweepConfig(base, "request_rate", (64.0,), tmp_path / "b", search=True), quiet)
    assert 12.3 <= downwards["best"]["value"] <= 13


def test_command_and_page(fast_server: LoopbackServer, tmp_path: Path) -> None:
    json_path, html, table = (tmp_path / f"sweep.{ending}" for ending in ("json", "html", "csv"))
    words = ["--base-url", fast_server.base_url, "--rates", "20,40", "--out", str(tmp_path / "points")]
    words += ["--goodput", "e2e:1000", "--json", str(json_path), "--html", str(html), "--csv", str(table)]
    assert command(["bench", "sweep", *WORDS, *words]) == 0
    report = json.loads(json_path.read_text())
    assert report["schema"] == "vllm-sparse/bench-sweep/1"
    assert [point["value"] for point in report["points"]] == [20, 40]
    assert html.read_text().count("<svg") == 3
    rows = list(csv.DictReader(table.open()))
    assert [row["request_rate"] for row in rows] == ["20.0", "40.0"]
    assert float(rows[0]["ttft_ms.p50"]) == report["points"][0]["metrics"]["ttft_ms"]["p50"]


def test_failed_point_exits_1(tmp_path: Path) -> None:
    with LoopbackServer(Script(fault_every=2)) as server:
        words = ["--base-url", server.base_url, "--concurrencies", "1", "--out", str(tmp_path)]
        assert command(["bench", "sweep", *WORDS, *words]) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "exactly one of"),
        (["--rates", "1", "--concurrencies", "1"], "exactly one of"),
        (["--rates", "1,x"], "separated by commas"),
        (["--rates", "-1"], "must be positive"),
        (["--concurrencies", "1.5"], "whole numbers"),
        (["--search-from", "1"], "needs --goodput"),
        (["--search-from", "inf", "--goodput", "ttft:9"], "inf has no length"),
        (["--concurrencies", "inf"], "inf has no length"),
        (["--rates", "1,inf", "--seconds", "5"], "inf has no length"),
        (["--rates", "1", "--seconds", "-5"], "--seconds is -5"),
        (["--rates", "1", "--seconds", "nan"], "--seconds is nan"),
        (["--rates", "1", "--seed", "-1"], "--seed is -1"),
    ],
)
def test_bad_usage_exits_2(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        command(["bench", "sweep", "--base-url", "http://127.0.0.1:9", "--out", str(tmp_path), *words]) == 2
    )
    assert message in " ".join(capsys.readouterr().err.split())


def test_dry_run_sends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--base-url", "http://127.0.0.1:9", "--rates", "2,4", "--out", str(tmp_path / "x"), "--dry-run"]
    assert command(["bench", "sweep", *WORDS, *words]) == 0
    error = capsys.readouterr().err
    assert "request_rate 2: 8 requests, 4 s of sending" in error
    assert "at least 6 s" in error
    assert not (tmp_path / "x").exists()


def test_dry_run_by_concurrency_asks_the_server(
    fast_server: LoopbackServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--concurrencies", "2,4", "--out", str(tmp_path / "x"), "--dry-run"]
    assert command(["bench", "sweep", "--base-url", fast_server.base_url, *WORDS, *words]) == 0
    assert "by one short request" in capsys.readouterr().err
    assert command(["bench", "sweep", "--base-url", "http://127.0.0.1:9", *WORDS, *words]) == 0
    assert "expected: unknown, http://127.0.0.1:9 does not answer" in capsys.readouterr().err


def test_values() -> None:
    assert parse_values("1, 2.5,4") == (1.0, 2.5, 4.0)
    with pytest.raises(UserError, match="commas"):
        parse_values("one")


def test_foreign_files_are_no_reports(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text, message in (
        ("{", "not JSON"),
        ("[]", "schema is None"),
        ('{"schema": "other"}', "schema is 'other'"),
    ):
        path.write_text(text)
        with pytest.raises(FormatError, match=message):
            read_report(path)
    assert command(["bench", "report", str(path), "--html", str(tmp_path / "x.html")]) == 2


def test_selftest_command(tmp_path: Path) -> None:
    path = tmp_path / "self.json"
    words = ["--streams", "8", "--rate", "20", "--tolerance-ms", "1000", "--json", str(path)]
    words += ["--lag-tolerance-ms", "1000"]
    assert command(["bench", "selftest", *words]) == 0
    report = json.loads(path.read_text())
    assert set(report["errors_ms"]) == {"ttft_ms", "e2e_ms", "itl_ms"}
    assert report["requests"] == 16
    # What is not within the tolerance fails the command.
    words[words.index("--tolerance-ms") + 1] = "0.000001"
    assert command(["bench", "selftest", *words, "--closed"]) == 1
    assert command(["bench", "selftest", "--streams", "0"]) == 2
