"""2:4 against vLLM's own dense formats, both served by vLLM, compiled, in turns.

Dense bf16 is served in float32 too where that may be faster (:mod:`bench.best_dense`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.best_dense import FLOAT32, against_best_dense, is_float32_a_rival
from bench.compare import CompareConfig, compare_models
from bench.one_line_each import OneLineEach
from bench.report import interval
from bench.scenarios import Scenario

# Dense, then 2:4. Each pair has the same precision on both sides, but that vLLM has no dense int4 with int8
# activations on a CPU: its W4A16 stands against both.
PAIRS = {
    "bf16": ("bf16", "2of4-bf16"),
    "int8": ("w8a8", "2of4-int8"),
    "int4": ("w4a16", "2of4-int4"),
    "w4a8": ("w4a16", "2of4-w4a8"),
}
FLAGS = "--dtype bfloat16 --max-model-len 1024 --max-num-seqs 32 --no-enable-prefix-caching"
SCENARIOS = (
    Scenario("decode-1", "decode, batch 1", "tpot_ms", 32, 48, 1, 1),
    Scenario("decode-8", "decode, batch 8", "tpot_ms", 32, 32, 8, 8),
    Scenario("decode-32", "decode, batch 32", "tpot_ms", 32, 24, 32, 32),
    Scenario("prefill", "prefill of 512 tokens", "ttft_ms", 512, 1, 2, 1),
)


def compare(
    folder: Path,
    pair: str,
    scenarios: Sequence[str] | None,
    repeats: int,
    serve_args: str,
    env: Mapping[str, str],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The ``bench-compare/1`` report of one pair of :data:`PAIRS`.

    Args:
        folder: checkpoints as :func:`bench.rivals.checkpoints.write_set` leaves them.
        pair: which.
        scenarios: names of :data:`SCENARIOS`; None for all.
        repeats: paired repeats.
        serve_args: further words for every ``vllm serve``.
        env: settings for every server.
        say: called with what is going on.
    """
    dense, sparse = PAIRS[pair]
    float32_too = dense == "bf16" and is_float32_a_rival()
    config = CompareConfig(
        dense=folder / dense,
        baselines=(folder / dense,) if float32_too else (),
        baseline_args=FLOAT32 if float32_too else "",
        compressed=(folder / sparse,),
        scenarios=tuple(s for s in SCENARIOS if not scenarios or s.name in scenarios),
        repeats=repeats,
        serve_args=f"{FLAGS} {serve_args}",
        env=dict(env),
        quality=False,
        log_dir=folder / "logs",
    )
    return compare_models(config, OneLineEach(say))


def lines(report: Mapping[str, Any]) -> Iterator[str]:
    """The headline of every scenario against the best dense server, as text."""
    for entry in against_best_dense(report):
        headline = entry["headline"]
        ratio = entry["ratio"][headline]
        dense, sparse = (entry[side][headline]["p50"] for side in ("dense", "compressed"))
        name = entry["best_dense"][headline]
        yield (
            f"{entry['title']:<24} {headline}: {name} {dense:.1f}, {entry['candidate']} {sparse:.1f}; "
            f"{ratio['value']:.2f}x, 95 % interval {interval(ratio)}"
        )
