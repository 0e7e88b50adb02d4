"""A comparison from start to report, with scripted servers of known speed in vLLM's place."""

import csv
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import compare, fleet
from bench.compare import CompareConfig, compare_models, prepare
from bench.compare_store import Store
from bench.entries import average, scenario_entry
from bench.fleet import Contestant
from bench.loopback import LoopbackServer
from bench.observer import Observer
from bench.processes import family
from bench.report import interval, ratio_sections, verdict
from bench.runner import RunConfig, run
from bench.scenarios import SCENARIOS, choose, fit
from bench.server import Server
from bench.statistics import paired_ratio
from bench.weights import checkpoint_bytes
from bench.workloads import WorkloadSpec
from converters.cli import run as command
from vllm_sparse.errors import FormatError, UserError

METRICS = {"tpot_ms": {"p50": 1.0}}
QUICK = tuple(fit(scenario, 64, 0.25) for scenario in choose(["decode-8", "prefill", "saturation"]))


@pytest.mark.serial
@pytest.mark.parametrize("servers", ["both", "one"])
def test_twice_as_slow_is_a_ratio_of_one_half(
    fake_vllm: Path, make_model: Callable[..., Path], tmp_path: Path, servers: str
) -> None:
    fast, slow = make_model("fast", 10, weights=1000), make_model("slow", 20, weights=500)
    said: list[str] = []

    class Listener(Observer):
        def say(self, text: str) -> None:
            said.append(text)

    # One at a time starts a server for every turn, so it gets fewer of them.
    scenarios, repeats = (QUICK, 2) if servers == "both" else (QUICK[:1], 1)
    config = CompareConfig(
        dense=fast,
        compressed=(slow,),
        scenarios=scenarios,
        repeats=repeats,
        servers=servers,
        log_dir=tmp_path / "logs",
    )
    report = compare_models(config, Listener())
    assert report["schema"] == "vllm-sparse/bench-compare/1"
    assert report["ok"]
    assert [entry["name"] for entry in report["scenarios"]] == [scenario.name for scenario in scenarios]
    for entry in report["scenarios"]:
        ratio = entry["ratio"]["e2e_ms"]
        assert 0.3 < ratio["value"] < 0.75
        assert ratio["ci95"] == [None, None] or ratio["ci95"][0] <= ratio["value"] <= ratio["ci95"][1]
        assert entry["repeats"] == repeats
        assert entry["dense"]["e2e_ms"]["n"] == repeats * entry["settings"]["num_requests"]
    assert 0.4 < report["scenarios"][0]["ratio"]["tpot_ms"]["value"] < 0.6
    assert all("tpot_ms" not in e["ratio"] for e in report["scenarios"] if e["name"] == "prefill")
    dense, candidate = report["models"]
    assert (dense["role"], dense["checkpoint_bytes"]) == ("dense", 4000)
    assert (candidate["role"], candidate["checkpoint_bytes"]) == ("compressed", 2000)
    assert candidate["memory"]["pss_bytes"] > 0
    # The slow model's log-probabilities are shifted by 1 more at every odd position.
    assert report["parity"]["positions"] >= 4000
    assert report["parity"]["mean_dlogprob"] == pytest.approx(0.5, rel=0.05)
    assert dense["perplexity"] != candidate["perplexity"]
    assert any(text.startswith("starting slow") for text in said)
    assert not [line for line in _processes() if str(tmp_path) in line]


def _processes() -> list[str]:
    return subprocess.run(
        ["ps", "-eo", "args"], capture_output=True, text=True, check=True
    ).stdout.splitlines()


def test_command_with_urls(
    fake_vllm: Path, make_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [make_model("a", 1), make_model("b", 3), make_model("c", 2), make_model("x", 1)]
    table = tmp_path / "out" / "compare.csv"
    out = tmp_path / "out" / "compare.json"
    html = tmp_path / "out" / "compare.html"
    with (
        Server(models[0], log_path=tmp_path / "0.log") as a,
        Server(models[1], log_path=tmp_path / "1.log") as b,
        Server(models[2], log_path=tmp_path / "2.log") as c,
        Server(models[3], log_path=tmp_path / "3.log") as x,
    ):
        words = ["--dense-url", a.base_url, "--compressed-url", b.base_url, "--compressed-url", c.base_url]
        words += ["--baseline-url", x.base_url, "--api-key", "sk-secret", "--csv", str(table)]
        words += ["--scenario", "decode-1", "--scale", "0.5", "--repeats", "2"]
        assert command(["bench", "compare", *words, "--dry-run"]) == 0
        assert "by one short request to each" in " ".join(capsys.readouterr().err.split())
        assert command(["bench", "compare", *words, "--json", str(out), "--html", str(html)]) == 0
        assert "n/a (below" in capsys.readouterr().err
        assert all(family(server.pid) for server in (a, b, c))
    report = json.loads(out.read_text())
    assert [(entry["baseline"], entry["candidate"]) for entry in report["scenarios"]] == [
        ("a", "b"), ("a", "c"), ("x", "b"), ("x", "c"), ("a", "x"),
    ]  # fmt: skip
    assert [model["role"] for model in report["models"]] == ["dense", "baseline", "compressed", "compressed"]
    assert html.read_text().count("<svg") == 2
    rows = list(csv.DictReader(table.open()))
    assert {(row["baseline"], row["candidate"]) for row in rows} == {
        (entry["baseline"], entry["candidate"]) for entry in report["scenarios"]
    }
    ratio = report["scenarios"][0]["ratio"]["tpot_ms"]
    row = next(row for row in rows if row["metric"] == "tpot_ms")
    assert (float(row["ratio"]), float(row["ci95_low"])) == (ratio["value"], ratio["ci95"][0])
    assert "sk-secret" not in out.read_text() + html.read_text()
    rebuilt = tmp_path / "again.html"
    assert command(["bench", "report", str(out), "--html", str(rebuilt)]) == 0
    assert rebuilt.read_text() == html.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --dense DIR"),
        (["--dense", "x"], "at least one compressed"),
        (["--dense-url", "http://127.0.0.1:9"], "go together"),
        (["--dense", "x", "--compressed", "y", "--repeats", "0"], "--repeats"),
        (["--dense", "x", "--compressed", "y", "--servers", "many"], "--servers"),
        (["--dense", "x", "--compressed", "y", "--scenario", "z"], "choose of decode-1"),
        (["--dense", "x", "--compressed", "y", "--env", "A"], "NAME=VALUE"),
        (["--dense", "x", "--compressed", "y", "--seed", "-1"], "--seed is -1"),
        (["--dense", "x", "--compressed", "y", "--scale", "inf"], "--scale is inf"),
        (["--dense", "x", "--compressed", "y", "--api-key", "k\r"], "line break"),
        (["--dense", "/nowhere", "--compressed", "y"], "no such directory"),
        (["--dense-url", "http://127.0.0.1:9", "--compressed-url", "http://127.0.0.1:9"], "no server at"),
        (
            ["--dense-url", "http://x", "--compressed-url", "http://y", "--serve-args", "--dtype float32"],
            "--serve-args and --env are for servers that are started here",
        ),
    ],
)
def test_bad_usage_exits_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["bench", "compare", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--serve-args", "--a 'b"], "No closing quotation"),
        (["--serve-args=--max-model-len"], "needs a number of tokens"),
        (["--env", "VLLM_CPU_KVCACHE_SPACE=much"], "not a number of GiB"),
        (["--quality-text", "latin"], "not UTF-8"),
    ],
)
def test_bad_settings_of_servers_exit_2(
    words: list[str],
    message: str,
    make_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("latin").write_bytes(b"caf\xe9")
    models = ["--dense", str(make_model("a")), "--compressed", str(make_model("b"))]
    assert command(["bench", "compare", *models, *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_short_context_of_servers_that_are_up(
    fake_vllm: Path, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Scenarios are cut to the shortest context that a server tells of."""
    models = [make_model("a"), make_model("b")]
    with (
        Server(models[0], log_path=tmp_path / "0.log", flags=["--max-model-len", "400"]) as a,
        Server(models[1], log_path=tmp_path / "1.log", flags=["--max-model-len", "200"]) as b,
    ):
        config = CompareConfig(
            urls=(a.base_url, b.base_url), scenarios=tuple(choose(["prefill"])), repeats=1, scale=0.2
        )
        report = compare_models(config)
    assert report["ok"]
    assert report["scenarios"][0]["settings"]["input_len"] == 199


@pytest.mark.parametrize("flag", ["--max-model-len 100", "--max_model_len=100"])
def test_quality_of_models_with_a_short_context(
    fake_vllm: Path, make_model: Callable[..., Path], tmp_path: Path, flag: str
) -> None:
    config = CompareConfig(
        dense=make_model("a"),
        compressed=(make_model("b"),),
        scenarios=tuple(choose(["prefill"])),
        repeats=1,
        scale=0.2,
        serve_args=flag,
        log_dir=tmp_path / "logs",
    )
    report = compare_models(config)
    assert report["ok"]
    assert report["parity"]["positions"] >= 4000


def test_dry_run_starts_nothing(make_model: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--dense", str(make_model("a")), "--compressed", str(make_model("b")), "--dry-run"]
    words += ["--out", "/nowhere/kept"]
    assert command(["bench", "compare", *words]) == 0
    error = " ".join(capsys.readouterr().err.split())
    assert "0 of the 50 load tests are in /nowhere/kept" in error
    assert "50 load tests generating" in error
    assert re.search(r"expected: about \d+ (s|min)", error)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", "{", "config.json is not valid JSON"),
        ("config.json", "[]", "must hold a JSON object"),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"w": "lost.safetensors"}}',
            "names lost.safetensors",
        ),
        ("model.safetensors", "short", "not a complete safetensors file"),
    ],
)
@pytest.mark.parametrize("words", [[], ["--dry-run"]], ids=["run", "dry-run"])
def test_a_model_that_cannot_be_served_is_refused_before_any_server(
    file: str,
    text: str,
    message: str,
    words: list[str],
    make_model: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = make_model("b")
    (broken / file).write_text(text)
    models = ["--dense", str(make_model("a")), "--compressed", str(broken)]
    assert command(["bench", "compare", *models, *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_server_that_fails_to_start_leaves_the_other_stopped(
    fake_vllm: Path, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    good, bad = make_model("good"), make_model("bad")
    (bad / "slowdown").write_text("not a number")
    config = CompareConfig(dense=good, compressed=(bad,), servers="both", log_dir=tmp_path / "logs")
    with pytest.raises(UserError, match="exit code"):
        compare_models(config)
    assert not [line for line in _processes() if str(tmp_path) in line]


@pytest.mark.parametrize("servers", ["both", "one"])
def test_interrupted_comparison_goes_on_from_the_last_whole_turn(
    fake_vllm: Path,
    make_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    servers: str,
) -> None:
    config = CompareConfig(
        dense=make_model("a"), compressed=(make_model("b"),), scenarios=QUICK[:1], repeats=3, servers=servers,
        log_dir=tmp_path / "logs", keep=tmp_path / "kept",
    )  # fmt: skip
    usual, measured = compare.run, []

    def interrupted(one: RunConfig) -> object:
        if len(measured) == 3:  # the second turn has one of its two
            raise KeyboardInterrupt
        measured.append(one.workload.seed)
        return usual(one)

    monkeypatch.setattr(compare, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare_models(config)
    monkeypatch.setattr(compare, "run", lambda one: measured.append(one.workload.seed) or usual(one))
    monkeypatch.setattr(compare.parity, "score", lambda *_, **__: pytest.fail("answers were kept"))
    first = compare_models(config)
    assert measured == [0, 0, 1, 1, 1, 2, 2]
    assert first["ok"]
    assert first["scenarios"][0]["repeats"] == 3
    assert first["parity"]["positions"] >= 4000

    # All is there: no server is started, and the report is the same.
    monkeypatch.setattr(compare.Fleet, "__enter__", lambda _: pytest.fail("nothing is left to measure"))
    assert prepare(config).kept == prepare(config).runs == 6
    again = compare_models(config)
    assert len(measured) == 7
    for part in ("scenarios", "parity", "config"):
        assert again[part] == first[part]
    assert again["models"][0]["memory"]["pss_bytes"] > 0
    assert again["models"][0]["command"][1:3] == ["serve", str(config.dense)]


def test_turns_of_another_comparison_are_not_taken(
    fast_server: LoopbackServer, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = Contestant("a", make_model("a"), files=tmp_path / "a")
    (path,) = [tmp_path / "kept"]
    report = {"requests": {"planned": 1, "completed": 1}}
    store = Store(path, {"flags": []}, [model])
    assert store.turn(QUICK[:1], 0) is None
    store.keep_turn(QUICK[:1], 0, {(QUICK[0].name, "a"): [report]})
    assert store.turn(QUICK[:1], 0) == {QUICK[0].name: {"a": report}}
    assert store.turn(QUICK[:1], 1) is None
    assert store.turn([replace(QUICK[0], num_requests=99)], 0) is None
    assert Store(path, {"flags": ["--enforce-eager"]}, [model]).turn(QUICK[:1], 0) is None
    assert Store(None, {"flags": []}, [model]).turn(QUICK[:1], 0) is None
    other_flags = replace(model, flags=("--dtype", "float32"))
    assert Store(path, {"flags": []}, [other_flags]).turn(QUICK[:1], 0) is None
    (model.files / "config.json").write_text("{ }")
    assert Store(path, {"flags": []}, [model]).turn(QUICK[:1], 0) is None
    (kept,) = path.glob("*.json")
    kept.write_text('{"schema": "vllm-sparse/bench-run/1"}')
    with pytest.raises(FormatError, match="remove the file"):
        store.turn(QUICK[:1], 0)


def test_failed_requests_are_counted_and_make_it_not_ok(
    fake_vllm: Path, make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CompareConfig(
        dense=make_model("a"), compressed=(make_model("b"),), scenarios=QUICK[:1], repeats=1, quality=False,
        log_dir=tmp_path / "logs", keep=tmp_path / "kept",
    )  # fmt: skip
    usual = compare.run
    monkeypatch.setattr(compare, "run", lambda c: usual(replace(c, timeout_s=0.001, num_warmups=0)))
    report = compare_models(config)
    assert not report["ok"]
    assert report["scenarios"][0]["failed"] == 2 * report["scenarios"][0]["settings"]["num_requests"]
    assert report["scenarios"][0]["ratio"] == {}
    assert report["parity"] == {"by_candidate": {}}
    assert not (tmp_path / "kept").exists()  # another try measures it again


def test_a_baseline_has_flags_of_its_own(
    fake_vllm: Path, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    dense = make_model("dense")
    config = CompareConfig(
        dense=dense, baselines=(dense,), baseline_args="--gap-ms 20", compressed=(make_model("sparse"),),
        scenarios=QUICK[:1], repeats=1, quality=False, serve_args="--gap-ms 1", log_dir=tmp_path / "logs",
    )  # fmt: skip
    report = compare_models(config)
    names = [model["name"] for model in report["models"]]
    assert names == ["dense", "dense-gap-ms-20", "sparse"]
    slow = {entry["baseline"]: entry["dense"]["tpot_ms"]["p50"] for entry in report["scenarios"]}
    assert slow["dense-gap-ms-20"] > 10 > slow["dense"]
    assert report["config"]["baseline_flags"] == ["--gap-ms", "20"]
    with pytest.raises(UserError, match="--baseline DIR"):
        replace(config, baselines=()).check()
    with pytest.raises(UserError, match="No closing quotation"):
        prepare(replace(config, baseline_args="'"))


def test_average_of_repeats() -> None:
    first = {"a": {"p50": 1.0, "n": 3, "unresolved": ["p99"]}, "b": None, "c": 2, "basis": "token"}
    second = {"a": {"p50": 3.0, "n": 3, "unresolved": ["p99"]}, "b": 5.0, "c": 4, "basis": "token"}
    assert average([{"steady": None}, {"steady": {"s": 1}}, {"steady": {"s": 3}}]) == {"steady": {"s": 2.0}}
    merged = average([first, second])
    assert merged == {"a": {"p50": 2.0, "n": 6, "unresolved": ["p99"]}, "b": 5.0, "c": 3.0, "basis": "token"}


def test_scenarios_fit_short_contexts() -> None:
    for scenario in SCENARIOS:
        small = fit(scenario, 128, 0.1)
        assert (small.input_len + small.output_len) * (1 + small.range_ratio) <= 128
        assert small.num_requests >= (small.concurrency or 1)
        assert fit(scenario, 4096) == scenario
    with pytest.raises(UserError, match="too short"):
        fit(SCENARIOS[0], 1)


def test_entry_from_two_runs(fast_server: object) -> None:
    spec = WorkloadSpec(num_requests=6, input_len=4, output_len=4)
    reports = [
        run(RunConfig(fast_server.base_url, workload=replace(spec, seed=seed))).report for seed in (0, 1, 2)
    ]
    entry = scenario_entry(SCENARIOS[0], reports, reports)
    for ratio in entry["ratio"].values():
        assert ratio["value"] == pytest.approx(1)
        assert ratio["ci95"] == pytest.approx([1, 1])
    assert len(entry["samples"]["dense"]["e2e_ms"]) == 18


def test_two_repeats_show_no_interval_and_no_verdict() -> None:
    """One degree of freedom: 12.7 standard errors to either side, or certainty where two pairs agree."""
    ratio = {**paired_ratio([20, 22], [10, 11], lower_is_better=True).as_json(), "statistic": "p50"}
    assert interval({**ratio, "pairs": 2}) == "n/a (below 3 repeats)"
    assert verdict({**ratio, "pairs": 2}) == ""
    three = {**paired_ratio([20, 22, 24], [10, 11, 12], lower_is_better=True).as_json(), "pairs": 3}
    assert interval(three) == "2.00 – 2.00"
    assert verdict(three) == "better"
    entry: dict[str, Any] = {
        "name": "x",
        "title": "x",
        "repeats": 2,
        "ratio": {"tpot_ms": {**ratio, "pairs": 2}},
    }
    entry |= {"dense": METRICS, "compressed": METRICS}
    chart, table = ratio_sections([entry])
    assert 'class="ci' not in chart.charts[0].svg
    assert "need 3 repeats" in chart.text
    assert "n/a (below 3 repeats)" in table.table.rows[0].cells


def test_flags_get_a_context_length(make_model: Callable[..., Path]) -> None:
    directory = make_model("a")
    assert fleet.serve_flags("--dtype float32", [directory]) == [
        "--dtype",
        "float32",
        "--max-model-len",
        "1024",
    ]
    assert fleet.serve_flags("--max-model-len=99", [directory]) == ["--max-model-len=99"]
    with pytest.raises(UserError, match="--serve-args"):
        fleet.serve_flags('"', [directory])


def test_checkpoint_bytes_come_from_headers(make_model: Callable[..., Path]) -> None:
    directory = make_model("a", weights=250)
    assert checkpoint_bytes(directory) == 1000
    shutil.copy(directory / "model.safetensors", directory / "second.safetensors")
    assert checkpoint_bytes(directory) == 2000
    with (directory / "second.safetensors").open("r+b") as file:
        file.truncate(500)
    with pytest.raises(FormatError, match="truncated"):
        checkpoint_bytes(directory)
    (directory / "second.safetensors").write_bytes(b"xx")
    with pytest.raises(FormatError, match="not a complete"):
        checkpoint_bytes(directory)
