"""Page of a sweep: throughput against latency."""

from collections.abc import Mapping
from typing import Any

from bench.page import (
    Chart,
    Page,
    Row,
    Section,
    Table,
    Tile,
    command_section,
    environment_section,
    number,
)
from bench.svg import Series, legend, line_chart


def sweep_page(report: Mapping[str, Any]) -> Page:
    """Page of a ``bench-sweep`` report."""
    points = [point for point in report["points"] if point["metrics"]["e2e_ms"]["n"]]
    by = report["config"]["by"].replace("_", " ")
    rows = []
    for point in report["points"]:
        metrics = point["metrics"]
        cells = [
            number(metrics["output_tokens_per_s"]),
            number(metrics["requests_per_s"], 3),
            *(number(metrics[name]["p50"]) for name in ("ttft_ms", "tpot_ms", "e2e_ms")),
            *(number(metrics[name]["p95"]) for name in ("ttft_ms", "e2e_from_schedule_ms")),
            number(metrics["goodput_rps"], 3),
            str(point["requests"]["planned"] - point["requests"]["completed"]),
        ]
        rows.append(Row([f"{point['value']:g}", *cells], "" if point["ok"] else "worse"))
    head = [by, "output tok/s", "req/s", "TTFT p50", "TPOT p50", "E2E p50", "TTFT p95", "E2E sched. p95"]
    table = Table([*head, "goodput", "lost"], rows)
    tiles = [Tile("Highest output", number(max(_throughputs(points), default=None), 1), "tokens/s")]
    best = report.get("best")
    if report["config"].get("search"):
        value = "none" if best is None else f"{best['value']:g}"
        tiles.append(Tile("Highest rate within limits", value, "requests/s", "" if best else "bad"))
    return Page(
        title=f"Sweep of {report['config']['model']} by {by}",
        subtitle=f"{len(report['points'])} load tests",
        tiles=tiles,
        sections=[
            Section("Throughput and latency", charts=_charts(points)),
            Section("All points", table=table),
            environment_section(report["environment"]),
            command_section([report["environment"]["command"]]),
        ],
    )


def _throughputs(points: list[Mapping[str, Any]]) -> list[float]:
    return [point["metrics"]["output_tokens_per_s"] for point in points]


def _charts(points: list[Mapping[str, Any]]) -> list[Chart]:
    charts = []
    for name, label in (("ttft_ms", "TTFT"), ("tpot_ms", "TPOT"), ("e2e_ms", "E2E")):
        series = []
        for position, statistic in enumerate(("p50", "p95")):
            line = [
                (point["metrics"]["output_tokens_per_s"], point["metrics"][name][statistic])
                for point in points
                if point["metrics"][name][statistic] is not None
            ]
            series.append(Series(statistic, line, f"s{position + 1}", markers=True))
        chart = line_chart(series, title=label, x_label="output tokens/s", y_label=f"{label} in ms")
        charts.append(Chart(chart, f"{label} against throughput", legend(series)))
    return charts
