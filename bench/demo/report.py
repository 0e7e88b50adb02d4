"""The demo's table, ``report.json`` (``vllm-sparse/demo/1``) and ``report.html``."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import environment
from bench.best_dense import against_best_dense, dense_dtypes
from bench.demo import real_size
from bench.demo.measure import Measured
from bench.report import interval

SCHEMA = "vllm-sparse/demo/1"
QUALITY_NOTE = (
    "Quality is shown on a small model trained on real text. It is served in float32, where answers are "
    "exact and 2:4 layers run on the reference kernels, so its latencies say nothing about speed."
)
BEST_DENSE = "each figure of 2:4 is compared with the better one"
SPEED_NOTE = f"Speed is shown on a {real_size.NAME}, whose answers mean nothing."

NAMES = {"ttft_ms": "TTFT ms", "tpot_ms": "TPOT ms", "output_tokens_per_s": "tokens/s out"}
# Beside a scenario's headline: what it means for throughput.
THROUGHPUT = {"tpot_ms": ("output_tokens_per_s",), "ttft_ms": ()}


def build(
    measured: list[Measured],
    unigram: float | None,
    speed: dict[str, Any] | None,
    training_log: Path | None,
) -> dict[str, Any]:
    """The whole report; ``ok`` is false when a served model does not answer as it should.

    ``speed`` has one entry per scenario, against the best dense server; ``speed_model`` has all of them.
    """
    failed = any(entry["failed"] for entry in speed["scenarios"]) if speed else False
    return {
        "schema": SCHEMA,
        "models": [item.as_json(unigram) for item in measured],
        "speed": against_best_dense(speed) if speed else [],
        "speed_model": {
            "name": real_size.NAME,
            **{part: speed[part] for part in ("models", "config", "scenarios")},
        }
        if speed
        else None,
        "training_log": str(training_log) if training_log else None,
        "notes": [QUALITY_NOTE, SPEED_NOTE, *_baseline_notes(speed)],
        "environment": {**environment.describe(), "command": environment.command_line()},
        "ok": all(item.parity_ok and item.perplexity_ok for item in measured) and not failed,
    }


def _baseline_notes(speed: dict[str, Any] | None) -> list[str]:
    """What the dense side of each figure is, where it is not always the same server."""
    dtypes = dense_dtypes(speed["models"]) if speed else {}
    return (
        [f"Dense is served in {' and in '.join(dtypes.values())}: {BEST_DENSE}."] if len(dtypes) > 1 else []
    )


def print_tables(report: dict[str, Any], console: Console) -> None:
    """Quality and speed, never one without the other."""
    console.print(_models_table(report))
    if report["speed"]:
        console.print(_speed_table(report["speed"], dense_dtypes(report["speed_model"]["models"])))
    for note in report["notes"]:
        console.print(note, markup=False)


def _models_table(report: dict[str, Any]) -> Table:
    table = Table(title="Served by vLLM over the OpenAI API, float32")
    for name in ("model", "perplexity", "trainer's", "weights MB", "mean |dlogprob|", "top-1", "parity"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for model in report["models"]:
        parity = model["parity"]
        against_twin = parity["positions"] > 0
        table.add_row(
            model["name"],
            f"{model['perplexity']:.2f}",
            f"{model['perplexity_trainer']:.2f}",
            f"{model['weight_bytes'] / 1e6:.2f}",
            f"{parity['mean_dlogprob']:.1e}" if against_twin else "-",
            f"{parity['top1_agreement']:.2%}" if against_twin else "-",
            "ok" if parity["ok"] else "FAILED",
        )
    unigram = report["models"][0]["perplexity_unigram"]
    if unigram is not None:
        table.caption = f"unigram baseline on the same tokens: perplexity {unigram:.2f}"
    return table


def _speed_table(scenarios: list[dict[str, Any]], dtypes: dict[str, str]) -> Table:
    table = Table(title=f"{real_size.NAME}: dense {' or '.join(dtypes.values())} against 2:4 bf16")
    for name in ("scenario", "metric", "dense", "2:4", "ratio", "95 % interval"):
        table.add_column(name, justify="left" if name in ("scenario", "metric") else "right", no_wrap=True)
    for entry in scenarios:
        for metric in (entry["headline"], *THROUGHPUT[entry["headline"]]):
            ratio = entry["ratio"].get(metric)
            dense, compressed = (_figure(entry[side][metric]) for side in ("dense", "compressed"))
            shown = [f"{ratio['value']:.2f}x", interval(ratio)] if ratio else ["-", "-"]
            which = f" {dtypes[entry['best_dense'][metric]]}" if len(dtypes) > 1 else ""
            table.add_row(entry["title"], NAMES[metric], f"{dense:.1f}{which}", f"{compressed:.1f}", *shown)
    table.caption = "ratio > 1: the compressed model is better"
    return table


def _figure(value: Any) -> float:
    return float(value["p50"] if isinstance(value, dict) else value)
