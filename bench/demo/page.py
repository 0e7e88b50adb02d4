"""The demo's page: the trained model's quality and the real-size model's speed, side by side."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.page import (
    Chart,
    Note,
    Page,
    Row,
    Section,
    Table,
    Tile,
    command_section,
    environment_section,
    megabytes,
    number,
)
from bench.report import compare_tiles, distribution_section, models_section, ratio_sections
from bench.svg import Series, line_chart


def render(report: Mapping[str, Any]) -> str:
    """The HTML file of a ``demo/1`` report."""
    speed = _unnamed(report["speed"])
    notes = (
        [] if report["ok"] else [Note("Failed:", "a served model does not answer as its dense twin.", "bad")]
    )
    notes += [Note("Read with care:", text) for text in report["notes"]]
    return Page(
        title="Dense, 2:4 and structured: served by vLLM and compared",
        subtitle="Quality on a model trained here on real text; speed on a real size with random weights.",
        tiles=[*_quality_tiles(report["models"]), *compare_tiles(speed)],
        notes=notes,
        sections=[
            _quality_section(report["models"]),
            *_training_sections(report.get("training_log")),
            _small_load_section(report["models"]),
            *_speed_sections(report),
            environment_section(report["environment"]),
            command_section([report["environment"]["command"]]),
        ],
    ).render()


def _quality_tiles(models: Sequence[Mapping[str, Any]]) -> list[Tile]:
    dense = models[0]["perplexity"]
    tiles = []
    for model in models:
        change = "" if model["kind"] == "dense" else f"{model['perplexity'] / dense - 1:+.1%} to dense, "
        parity = "parity ok" if model["parity"]["ok"] else "parity FAILED"
        style = "" if model["parity"]["ok"] else "bad"
        tiles.append(
            Tile(f"{model['name']}: perplexity", number(model["perplexity"]), change + parity, style)
        )
    return tiles


def _quality_section(models: Sequence[Mapping[str, Any]]) -> Section:
    rows = []
    for model in models:
        parity = model["parity"]
        against_twin = parity["positions"] > 0
        rows.append(
            Row(
                [
                    model["name"],
                    model["detail"],
                    number(model["perplexity"]),
                    number(model["perplexity_trainer"]),
                    megabytes(model["weight_bytes"]),
                    f"{parity['mean_dlogprob']:.1e}" if against_twin else "–",
                    f"{parity['top1_agreement']:.2%}" if against_twin else "–",
                ]
            )
        )
    unigram = models[0]["perplexity_unigram"]
    baseline = "" if unigram is None else f" Token frequencies alone have perplexity {unigram:.2f} there."
    positions = max(model["parity"]["positions"] for model in models)
    return Section(
        "The trained model, served in float32",
        text="Perplexity on held-out text through the OpenAI API's prompt log-probabilities, beside the "
        f"trainer's on the same tokens.{baseline} Distances are to a dense checkpoint with the same "
        f"weights, over {positions} positions.",
        table=Table(
            [
                "model",
                "made by",
                "perplexity",
                "trainer's",
                "checkpoint",
                "mean |Δ logprob|",
                "top-1 agreement",
            ],
            rows,
        ),
    )


def _small_load_section(models: Sequence[Mapping[str, Any]]) -> Section:
    rows = [
        Row(
            [
                model["name"],
                number(model["metrics"]["ttft_ms"]["p50"], 1),
                number(model["metrics"]["tpot_ms"]["p50"]),
                number(model["metrics"]["output_tokens_per_s"], 0),
            ]
        )
        for model in models
    ]
    return Section(
        "Load on these small servers",
        text="Four users, 128 tokens in, 32 out. At this size and in float32 the figures are overhead, and "
        "2:4 layers run on the reference kernels; the speed to look at is the real-size model's below.",
        table=Table(["model", "TTFT ms", "TPOT ms", "tokens/s"], rows),
    )


def _training_sections(log: str | None) -> list[Section]:
    if log is None or not Path(log).is_file():
        return []
    rows = [json.loads(line) for line in Path(log).read_text().splitlines()]
    points = [(float(row["step"]), float(row["loss"])) for row in rows if "loss" in row]
    chart = line_chart(
        [Series("training loss", points, "s1")], title="Training", x_label="step", y_label="nats per token"
    )
    return [Section("How the model was trained", charts=[Chart(chart)])]


def _speed_sections(report: Mapping[str, Any]) -> list[Section]:
    if not report["speed"]:
        return []
    scenarios = _unnamed(report["speed"])
    return [
        *ratio_sections(scenarios),
        models_section(report["speed_model"]["models"], {}),
        distribution_section(scenarios),
    ]


def _unnamed(scenarios: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Entries without the name of a baseline: theirs is the best dense server of each figure."""
    return [{**entry, "baseline": None} for entry in scenarios]
