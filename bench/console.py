"""What people see on the terminal: a live table while a run is on, a summary after it."""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.tally import Progress as Counts

LATENCY_ROWS = (
    ("TTFT", "ttft_ms"),
    ("TTFT from schedule", "ttft_from_schedule_ms"),
    ("TPOT", "tpot_ms"),
    ("ITL", "itl_ms"),
    ("E2E", "e2e_ms"),
    ("E2E from schedule", "e2e_from_schedule_ms"),
)
_COLUMNS = ("mean", "p50", "p90", "p95", "p99")
_REFRESH_S = 0.25


class LiveRun:
    """Progress bar with running counts; a plain line now and then where there is no terminal.

    Args:
        console: Where to draw (standard error, so that results can be piped).
        title: What is running.
    """

    def __init__(self, console: Console, title: str = "requests") -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[counts]}"),
            console=console,
        )
        self._task = self._progress.add_task(title, total=None, counts="")
        self._live = Live(self._progress, console=console, refresh_per_second=4, transient=True)
        self._total, self._title = 0, title
        self._start = self._last = time.monotonic()
        self._interval = _REFRESH_S if console.is_terminal else 10.0

    def __enter__(self) -> "LiveRun":
        if self._console.is_terminal:
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.__exit__(kind, error, trace)

    def planned(self, total: int) -> None:
        """Note how many requests there will be; the clock starts now."""
        self._total = total
        self._start = self._last = time.monotonic()
        self._progress.reset(self._task, total=total)

    def update(self, counts: Counts) -> None:
        """Show the counts; calls that come too fast cost next to nothing."""
        now = time.monotonic()
        if now - self._last < self._interval:
            return
        self._last = now
        rate = counts.output_tokens / max(1e-9, now - self._start)
        text = f"{counts.in_flight} in flight, {counts.failed} failed, {rate:.0f} tokens/s"
        done = counts.completed + counts.failed
        if self._console.is_terminal:
            self._progress.update(self._task, completed=done, counts=text)
        else:
            self._console.print(f"{self._title}: {done}/{self._total}, {text}", highlight=False)


def summary_table(report: Mapping[str, Any]) -> Table:
    """Latencies and throughput of one run."""
    metrics = report["metrics"]
    table = Table(
        title=_title(report), title_justify="left", caption=_caption(report), caption_justify="left"
    )
    table.add_column("milliseconds")
    for name in _COLUMNS:
        table.add_column(name, justify="right")
    for label, key in LATENCY_ROWS:
        if key.endswith("from_schedule_ms") and report["config"]["load_model"] == "closed":
            continue  # in a closed loop nothing waits for its turn
        if key == "itl_ms" and metrics["itl_basis"] == "chunk":
            label = "inter-chunk"
        values = metrics[key]
        if values["n"]:
            table.add_row(label, *(_number(values, name) for name in _COLUMNS))
    return table


def _number(values: Mapping[str, Any], name: str) -> str:
    text = f"{values[name]:.2f}"
    return f"[dim]{text}?[/]" if name in values["unresolved"] else text


def _title(report: Mapping[str, Any]) -> str:
    config, requests = report["config"], report["requests"]
    load = {
        "closed": f"closed loop, {config['concurrency']} at a time",
        "open": f"open loop, {config['request_rate']} requests/s, burstiness {config['burstiness']}",
        "capped": f"{config['request_rate']} requests/s, at most {config['concurrency']} in flight",
        "trace": "trace replay",
    }[config["load_model"]]
    counts = f"{requests['completed']} of {requests['planned']} requests completed"
    return escape(f"{config['model']}: {load}; {counts}")


def _caption(report: Mapping[str, Any]) -> str:
    metrics = report["metrics"]
    lines = [
        f"{metrics['output_tokens_per_s']:.2f} output tokens/s, "
        f"{metrics['total_tokens_per_s']:.2f} total tokens/s, "
        f"{metrics['requests_per_s']:.3f} requests/s over {metrics['duration_s']:.2f} s"
    ]
    if metrics["goodput_rps"] is not None:
        lines.append(
            f"goodput {metrics['goodput_rps']:.3f} requests/s within {_limits(report['config']['goodput'])}"
        )
    if any(metrics[key]["unresolved"] for _, key in LATENCY_ROWS if metrics[key]["n"]):
        lines.append("? too few requests to resolve this percentile")
    return "\n".join(lines)


def _limits(goodput: Mapping[str, float]) -> str:
    return ", ".join(f"{name.upper()} {limit:g} ms" for name, limit in goodput.items())


def print_run(console: Console, report: Mapping[str, Any]) -> None:
    """Summary of a run, then what is wrong with it."""
    if report["requests"]["completed"]:
        console.print(summary_table(report))
    else:
        console.print(_title(report), highlight=False)
    for failure in report["failures"]:
        status = f" {failure['status']}" if failure["status"] else ""
        example = escape(failure["example"])
        console.print(f"[red]{failure['count']} failed ({failure['kind']}{status}):[/] {example}")
    requests = report["requests"]
    if requests["cancelled"] or requests["not_sent"]:
        console.print(f"[yellow]{requests['cancelled']} cancelled, {requests['not_sent']} not sent")
    if requests["warmups_failed"]:
        console.print(f"[yellow]{requests['warmups_failed']} of {requests['warmups']} warm-ups failed")
    for reason in (*report["validity"]["reasons"], *report["warnings"]):
        console.print(f"[yellow]note:[/] {escape(reason)}")
