"""Cross-check against other tools: their commands, their reports, and the verdict."""

import json
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench import crosscheck, crosscheck_tools
from bench.crosscheck import FIGURES, cross_check, pooled
from bench.crosscheck_guidellm import guidellm_command, read_guidellm
from bench.crosscheck_tools import CrossCheckConfig, Run, guidellm, read_vllm, vllm_command, write_prompts
from bench.loopback import LoopbackServer, Script
from bench.runner import RunConfig, run
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
    times = read_guidellm(path, 2)
    assert times.seconds == pytest.approx(0.42)
    assert list(times.ttft) == [100, 200]
    assert list(times.e2e) == [140, 280]
    with pytest.raises(UserError, match="completed 2 of 3"):
        read_guidellm(path, 3)
    path.write_text('{"benchmarks": []}')
    with pytest.raises(FormatError, match="not a report of guidellm"):
        read_guidellm(path, 2)


def vllm_result(ttfts: list[float], itls: list[list[float]]) -> dict:
    """The detailed result that ``vllm bench serve`` writes of these times in seconds, one after the other."""
    tokens = [1 + len(gaps) for gaps in itls]
    e2e = [1000 * (t + sum(gaps)) for t, gaps in zip(ttfts, itls, strict=True)]
    tpot = [(e - 1000 * t) / (n - 1) for e, t, n in zip(e2e, ttfts, tokens, strict=True)]
    seconds = sum(e2e) / 1000
    result = {
        "completed": len(ttfts),
        "duration": seconds,
        "ttfts": ttfts,
        "itls": itls,
        "output_lens": tokens,
    }
    result["start_times"] = list(np.cumsum([0.0, *e2e[:-1]]) / 1000 + 50)
    result |= {"request_throughput": len(ttfts) / seconds, "output_throughput": sum(tokens) / seconds}
    for name, values in (("ttft", [1000 * t for t in ttfts]), ("tpot", tpot), ("e2el", e2e)):
        result |= {f"mean_{name}_ms": np.mean(values), f"p99_{name}_ms": np.percentile(values, 99)}
    return result


def test_vllms_requests_give_its_own_figures() -> None:
    result = vllm_result([0.1, 0.2], [[0.01, 0.03], [0.02, 0.02]])
    figures = read_vllm(result, 2).figures()
    assert set(figures) == set(FIGURES)
    assert figures["mean TTFT"] == pytest.approx(150)
    assert figures["p99 TTFT"] == pytest.approx(199)  # interpolated
    assert figures["mean TPOT"] == pytest.approx(20)
    assert figures["mean E2E"] == pytest.approx((140 + 240) / 2)
    assert figures["requests/s"] == pytest.approx(2 / 0.38)
    assert figures["output tokens/s"] == pytest.approx(6 / 0.38)
    with pytest.raises(UserError, match="completed 2 of 3"):
        read_vllm(result, 3)
    with pytest.raises(UserError, match="says mean_tpot_ms 21"):
        read_vllm(result | {"mean_tpot_ms": 21.0}, 2)


def test_all_tools_get_the_prompts_of_our_own_run(
    fast_server: LoopbackServer, tokenizer_dir: Path, tmp_path: Path
) -> None:
    config = CrossCheckConfig(fast_server.base_url, "loopback", tokenizer_dir, 6, 5, 8)
    write_prompts(config, 3, tmp_path / "prompts.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert {row["output_tokens_count"] for row in rows} == {5}
    sent: list[str] = []
    plain = crosscheck_tools.build(
        config.workload(3), crosscheck_tools.load_tokenizer(tokenizer_dir), None, chat=False
    )
    sent = [request.prompt for request in plain.requests]
    assert [row["prompt"] for row in rows] == sent
    assert len(set(sent)) == 8
    one = RunConfig(fast_server.base_url, workload=config.workload(3), tokenizer=tokenizer_dir)
    assert run(one).report["raw"]["prompt_tokens"] == [len(prompt.split()) for prompt in sent]
    words = vllm_command(config, tmp_path)
    assert words[words.index("--dataset-path") + 1] == str(tmp_path / "prompts.jsonl")
    assert words[words.index("--temperature") + 1] == "0"


def test_a_p99_is_compared_over_all_runs() -> None:
    """Two tools that see one distribution: within the interval; one that sees 10 % more: outside of it."""
    rng = np.random.default_rng(1)

    def runs(factor: float) -> list[Run]:
        return [Run(1.0, 1, {"TTFT": factor * rng.normal(100, 2, 400)}, np.arange(400)) for _ in range(4)]

    same = pooled("p99 TTFT", runs(1.0), runs(1.0))
    assert same["requests"] == [1600, 1600]
    assert same["ci95"][0] < 0 < same["ci95"][1]
    assert -0.03 < same["ci95"][0] <= same["difference"] <= same["ci95"][1] < 0.03
    slower = pooled("p99 TTFT", runs(1.1), runs(1.0))
    assert slower["ci95"][0] > 0.05
    assert slower["difference"] == pytest.approx(0.1, abs=0.02)
    assert pooled("requests/s", runs(1.0), runs(1.0)) is None
    # Few requests leave it open.
    few = [[Run(1.0, 1, {"TTFT": rng.lognormal(4, 0.5, 20)}, np.arange(20)) for _ in range(2)] for _ in "ab"]
    low, high = pooled("p99 TTFT", *few)["ci95"]
    assert high - low > 0.1


def test_together_only_the_common_time_counts() -> None:
    ours = Run(100.0, 1000, {"TTFT": np.arange(100.0)}, np.arange(100.0))
    other = Run(30.0, 90, {"TTFT": np.full(30, 7.0)}, 50.5 + np.arange(30.0))
    kept = crosscheck_tools.common({"ours": ours, "vllm": other})
    assert list(kept["ours"].samples["TTFT"]) == list(range(51, 80))
    assert (kept["ours"].seconds, kept["ours"].tokens) == (29.0, 290)
    assert len(kept["vllm"].sent_s) == 30
    late = Run(30.0, 90, {"TTFT": np.full(30, 7.0)}, 200 + np.arange(30.0))
    with pytest.raises(UserError, match="hardly ran at the same time"):
        crosscheck_tools.common({"ours": ours, "vllm": late})


def test_what_happens_to_both_together_is_no_difference() -> None:
    """A stall of the machine that both meet: in turns it could be anybody's, together it cancels out."""
    rng = np.random.default_rng(2)
    sent = np.linspace(0, 100, 500)
    stalled = 1.0 + 3.0 * ((sent > 40) & (sent < 50))

    def run() -> Run:
        return Run(100.0, 1, {"TTFT": stalled * rng.normal(100, 1, 500)}, sent)

    ours, theirs = [run() for _ in range(3)], [run() for _ in range(3)]
    found = pooled("mean TTFT", ours, theirs, together=True)
    alone = pooled("mean TTFT", ours, theirs)
    assert found["requests"] == [1500, 1500]
    assert found["ci95"][0] < 0.002
    assert found["ci95"][1] > -0.002
    assert np.ptp(found["ci95"]) < np.ptp(alone["ci95"]) / 4


def test_tools_at_once(config: CrossCheckConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other tool is our own client in vLLM's place, in a process of its own."""
    program = (
        "import json, sys, time\n"
        "from pathlib import Path\n"
        "from bench.crosscheck_tools import CrossCheckConfig, ours\n"
        "found = ours(CrossCheckConfig(sys.argv[1], 'loopback', Path(sys.argv[2]), 6, 5, 40, 1), 0)\n"
        "print(json.dumps([found.sent_s.tolist(), {k: v.tolist() for k, v in found.samples.items()}]))\n"
    )

    def other(one: CrossCheckConfig, _: int) -> Run:
        words = [sys.executable, "-c", program, one.base_url, str(one.tokenizer)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        sent, samples = json.loads(done.stdout)
        return Run(1.0, 5 * len(sent), {k: np.asarray(v) for k, v in samples.items()}, np.asarray(sent))

    monkeypatch.setattr(crosscheck_tools, "vllm", other)
    with LoopbackServer(Script(ttft_ms=40, gap_ms=5)) as server:
        one = replace(
            config, base_url=server.base_url, guidellm=None, together=True, num_requests=120, concurrency=1,
            repeats=1,
        )  # fmt: skip
        report = cross_check(one, lambda _: None)
    rows = {row["figure"]: row for row in report["rows"]}
    assert set(rows) == set(FIGURES)
    both = rows["mean E2E"]["pooled"]["requests"]
    assert both[1] <= 40
    assert abs(both[0] - both[1]) <= 4
    assert rows["mean E2E"]["beside_server"] is None


def test_a_server_that_remembers_prompts_is_refused() -> None:
    crosscheck._refuse_cached(None)
    crosscheck._refuse_cached({"prefix_cache_hits": 0.0})
    with pytest.raises(UserError, match="--no-enable-prefix-caching"):
        crosscheck._refuse_cached({"prefix_cache_hits": 64.0})


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
    result = vllm_result([0.001] * 8, [[0.001] * 4] * 8)
    monkeypatch.setattr(crosscheck_tools, "vllm", lambda *_: read_vllm(result, 8))
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
    assert rows["vllm", "p99 TTFT"]["difference"] == rows["vllm", "p99 TTFT"]["pooled"]["difference"]
    assert rows["vllm", "requests/s"]["pooled"] is None
    assert [len(one["TTFT"]) for one in report["samples_ms"]["ours"]] == [8, 8]
    # A tool that says 1 ms of everything is not within any tolerance of 15 ms.
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
        "guidellm", "http://h:1", "m", Path("/tok"), prompts=tmp_path / "p.jsonl", concurrency=2,
        num_requests=9, report=tmp_path / "r.json",
    )  # fmt: skip
    assert words[words.index("--data") + 1] == f"kind=json_file,path={tmp_path}/p.jsonl"
    assert words[words.index("--profile") + 1] == "kind=concurrent,streams=2"
    backend = json.loads(words[words.index("--backend") + 1])
    assert backend["extras"]["body"] == {"temperature": 0, "stream_options": {"include_usage": True}}


def test_missing_program_is_one_sentence(config: CrossCheckConfig) -> None:
    with pytest.raises(UserError, match="--guidellm /nowhere/guidellm: No such file"):
        guidellm(replace(config, guidellm="/nowhere/guidellm"), 0)
