"""Decode and prefill at a real size: the same random weights, dense and 2:4, served side by side in bf16.

Dense is served in float32 too where that may be faster (:mod:`bench.best_dense`).
"""

import shutil
from pathlib import Path
from typing import Any

from bench.best_dense import FLOAT32, is_float32_a_rival
from bench.compare import CompareConfig, compare_models
from bench.demo import real_size
from bench.demo.steps import Steps
from bench.one_line_each import OneLineEach
from bench.scenarios import Scenario
from converters.convert import convert

REPEATS = 3
# The plugin and vLLM compile alike; without compilation the servers start in seconds rather than minutes.
FLAGS = "--enforce-eager --max-model-len 1024 --max-num-seqs 8 --no-enable-prefix-caching"
SCENARIOS = (
    Scenario("decode-1", "decode-bound, batch 1", "tpot_ms", 32, 24, 1, 1),
    Scenario("decode-8", "decode-bound, batch 8", "tpot_ms", 32, 16, 8, 8),
    Scenario("prefill", "prefill-bound, 512 tokens", "ttft_ms", 512, 1, 2, 1),
)
# Where dense bf16 takes half a second for eight tokens, the same loads would take twenty minutes.
SHORT_SCENARIOS = (
    Scenario("decode-1", "decode-bound, batch 1", "tpot_ms", 32, 16, 1, 1),
    Scenario("decode-8", "decode-bound, batch 8", "tpot_ms", 16, 8, 8, 8),
    Scenario("prefill", "prefill-bound, 128 tokens", "ttft_ms", 128, 1, 1, 1),
)


def measure(out: Path, tokenizer_from: Path, steps: Steps) -> dict[str, Any]:
    """Make the real-size pair, serve it, return the ``bench-compare/1`` report."""
    dense, sparse = out / "real-size" / "dense", out / "real-size" / "2of4"
    with steps.step(f"write a {real_size.NAME}, and convert it to sparse-24-bitmask"):
        real_size.write_dense(dense, tokenizer_from)
        if not (sparse / "config.json").is_file():
            shutil.rmtree(sparse, ignore_errors=True)
            report = convert(dense, sparse)
            steps.say(f"{report.source_bytes / 1e9:.2f} -> {report.destination_bytes / 1e9:.2f} GB on disk")
    float32_too = is_float32_a_rival()
    config = CompareConfig(
        dense=dense,
        baselines=(dense,) if float32_too else (),
        baseline_args=FLOAT32 if float32_too else "",
        compressed=(sparse,),
        scenarios=SHORT_SCENARIOS if float32_too else SCENARIOS,
        repeats=REPEATS,
        serve_args=FLAGS,
        quality=False,
        log_dir=out / "logs",
    )
    dense_too = ", dense in float32 too," if float32_too else ""
    with steps.step(f"serve both in bf16{dense_too} and load them in turns"):
        return compare_models(config, OneLineEach(steps.say))
