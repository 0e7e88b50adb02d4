"""Report pages in a real browser: they need no network, show what they should, and nothing is cut off."""

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from bench.entries import scenario_entry
from bench.loopback import LoopbackServer, Script
from bench.metrics import Goodput
from bench.output import write_html
from bench.report import render
from bench.runner import RunConfig, run
from bench.scenarios import SCENARIOS
from bench.sweep import SweepConfig, sweep
from bench.workloads import WorkloadSpec
from tests.bench.programs import need

SPEC = WorkloadSpec(num_requests=8, input_len=4, output_len=4)
LONG = "a-model-with-a-rather-long-name-2of4-int8-channel"

# Appended to a copy of the page: writes down what lies outside of its box, for --dump-dom to show.
PROBE = """
<pre id="probe"></pre><script>
const found = [];
const page = document.documentElement;
if (page.scrollWidth > window.innerWidth) found.push("page is wider than the window");
for (const text of document.querySelectorAll("svg text")) {
  const box = text.getBoundingClientRect(), frame = text.closest("svg").getBoundingClientRect();
  if (box.left < frame.left - 1 || box.right > frame.right + 1) found.push("cut off: " + text.textContent);
}
for (const tile of document.querySelectorAll(".tile *"))
  if (tile.scrollWidth > tile.parentElement.clientWidth) found.push("out of its tile: " + tile.textContent);
for (const box of document.querySelectorAll(".scroll"))
  if (box.scrollWidth > box.clientWidth + 1) found.push("table too wide: " + box.textContent.slice(0, 60));
document.getElementById("probe").textContent = JSON.stringify(found);
</script>"""


def open_in_browser(report: dict, tmp_path: Path, *, width: int = 1100) -> tuple[str, list[str]]:
    """The page's DOM as Chromium built it, and what its layout got wrong; the picture is ``page.png``."""
    write_html(report, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "<script" not in text
    assert not re.search(r"(src|href)\s*=|url\(|@import", text)
    probed = tmp_path / "probed.html"
    probed.write_text(text.replace("</body>", PROBE + "</body>"))
    words = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    words += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--window-size={width},2400", "--hide-scrollbars"]
    words += [f"--screenshot={tmp_path / 'page.png'}", "--dump-dom", probed.as_uri()]
    done = subprocess.run([need("chromium"), *words], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "page.png").stat().st_size > 20_000
    problems = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    return done.stdout, json.loads(problems[1].replace("&gt;", ">").replace("&amp;", "&"))


def test_run_page(tmp_path: Path) -> None:
    with LoopbackServer(Script(ttft_ms=20, gap_ms=3, fault_every=7)) as server:
        spec = replace(SPEC, num_requests=20)
        config = RunConfig(
            server.base_url, workload=spec, request_rate=100.0, goodput=Goodput.parse("ttft:100")
        )
        report = run(config).report
    report["config"]["model"] = '<script>alert("x")</script>' + LONG
    dom, problems = open_in_browser(report, tmp_path)
    assert problems == []
    assert dom.count("<svg") == 3
    assert dom.count("<script") == 1  # the probe's own
    for words in ("Time to first token", "Timeline", "failed (http 500)", "from schedule", "Environment"):
        assert words in dom
    # One bar for each phase of each request that took place.
    assert dom.count('class="prefill"') + dom.count('class="failed"') >= 20


def test_settings_that_are_off_or_0_are_on_the_page(fast_server: LoopbackServer) -> None:
    page = render(run(RunConfig(fast_server.base_url, workload=SPEC, stream=False)).report)
    for name, value in (("stream", "False"), ("seed", "0"), ("retries", "0")):
        assert re.search(rf">{name}</t[dh]>\s*<t[dh][^>]*>{value}<", page), name


def test_page_of_conversations(tokenizer_dir: Path, tmp_path: Path) -> None:
    with LoopbackServer(Script(ttft_ms=10, gap_ms=2)) as server:
        spec = replace(SPEC, num_requests=4, input_len=20, turns=3)
        config = RunConfig(server.base_url, workload=spec, tokenizer=tokenizer_dir, concurrency=2)
        report = run(config).report
    dom, problems = open_in_browser(report, tmp_path)
    assert problems == []
    assert dom.count("<svg") == 3 + 2
    assert dom.count("<circle") == 2 * 3
    assert "By turn of the conversation" in dom
    for entry in report["turns"]:
        assert f"<td>{entry['turn']}</td><td>{entry['prompt_tokens']:,.0f}</td>" in dom


def test_compare_page(fast_server: LoopbackServer, tmp_path: Path) -> None:
    runs = [
        run(RunConfig(fast_server.base_url, workload=replace(SPEC, seed=seed))).report for seed in (0, 1, 2)
    ]
    names = ["dense", "dense-int8", LONG, LONG + "-second"]
    roles = ["dense", "baseline", "compressed", "compressed"]
    pairs = [(0, 2), (0, 3), (1, 2), (1, 3), (0, 1)]
    entries = [
        {"candidate": names[b], "baseline": names[a], **scenario_entry(scenario, runs, runs)}
        for a, b in pairs
        for scenario in SCENARIOS
    ]
    facts = {"checkpoint_bytes": 10**9, "resident_bytes": 6 * 10**8, "memory": {"pss_bytes": 2 * 10**9}}
    facts |= {
        "kv_cache_tokens": 12_345,
        "start_seconds": 21.0,
        "perplexity": 12.3,
        "command": ["vllm", "serve"],
    }
    distance = {"mean_dlogprob": 0.01, "top1_agreement": 0.987, "positions": 4000}
    report = {
        "schema": "vllm-sparse/bench-compare/1",
        "config": {"repeats": 3, "servers": "one at a time"},
        "environment": runs[0]["environment"],
        "models": [{"name": n, "role": r, **facts} for n, r in zip(names, roles, strict=True)],
        "scenarios": entries,
        "parity": {"by_candidate": dict.fromkeys(names[1:], distance)},
    }
    dom, problems = open_in_browser(report, tmp_path)
    assert problems == []
    assert dom.count("<svg") == 1 + len(SCENARIOS)
    for words in ("98.70%", "12,345", "600.0 MB", f"{LONG} to dense-int8", "vllm serve"):
        assert words in dom


@pytest.mark.slow
def test_sweep_page_on_a_narrow_screen(fast_server: LoopbackServer, tmp_path: Path) -> None:
    base = RunConfig(fast_server.base_url, workload=SPEC)
    report = sweep(SweepConfig(base, "concurrency", (1, 2, 4), tmp_path / "points"), lambda _: None)
    dom, problems = open_in_browser(report, tmp_path, width=700)
    assert [problem for problem in problems if "table" not in problem] == []  # tables scroll
    assert dom.count("<svg") == 3
    assert dom.count("<circle") == 2 * 3 * 3
