"""Command line of ``bench compare``, with its live table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bench.observer import Observer, Reports
from bench.scenarios import SCENARIOS
from vllm_sparse.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from bench.compare import CompareConfig
    from bench.fleet import Contestant
    from bench.scenarios import Scenario


def compare_command(
    dense: Annotated[Path | None, typer.Option(help="Baseline model directory.")] = None,
    compressed: Annotated[
        list[Path] | None, typer.Option(help="Compressed model directory; may be given several times.")
    ] = None,
    baseline: Annotated[
        list[Path] | None, typer.Option(help="Another dense model to beat, such as the int8 one; repeatable.")
    ] = None,
    baseline_args: Annotated[
        str, typer.Option(help='Words for the servers of --baseline alone, such as "--dtype float32".')
    ] = "",
    dense_url: Annotated[str | None, typer.Option(help="Baseline server that is already up.")] = None,
    compressed_url: Annotated[
        list[str] | None, typer.Option(help="Compressed server that is already up; may be repeated.")
    ] = None,
    baseline_url: Annotated[
        list[str] | None, typer.Option(help="Server of another dense model that is already up; repeatable.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", show_envvar=True, help="For servers already up.")
    ] = None,
    scenario: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(s.name for s in SCENARIOS)}; default all.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Paired repeats of each scenario.")] = 5,
    scale: Annotated[float, typer.Option(help="Factor on the number of requests.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0,
    serve_args: Annotated[
        str, typer.Option(help='Words for every `vllm serve`, for example "--dtype bfloat16".')
    ] = "",
    env: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE for every server; may be repeated.")
    ] = None,
    servers: Annotated[
        str, typer.Option(help="both up (one running at a time), one at a time, or auto by memory.")
    ] = "auto",
    quality: Annotated[bool, typer.Option(help="Compare answers and perplexity as well.")] = True,
    quality_text: Annotated[Path | None, typer.Option(help="Text for that; default: Python's help.")] = None,
    log_dir: Annotated[Path, typer.Option(help="Where the servers' logs go.")] = Path("out/logs"),
    out: Annotated[
        Path | None,
        typer.Option(help="Keep every finished turn in this folder; the same command then goes on from it."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the report here; - for standard output.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write one row per scenario and metric here.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a self-contained page here.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
) -> int:
    """Dense against compressed: same servers, same prompts, in turns; ratios above 1 favour compressed.

    Example: vllm-sparse bench compare --dense models/dense --compressed models/sparse
    --serve-args "--dtype bfloat16" --json compare.json --html compare.html
    """
    from bench import output
    from bench.compare import CompareConfig, compare_models
    from bench.scenarios import choose

    if (dense_url is None) != (not compressed_url):
        raise UserError("--dense-url and --compressed-url go together.")
    if quality_text is not None and not quality_text.is_file():
        raise UserError(f"--quality-text {quality_text}: no such file.")
    config = CompareConfig(
        dense=dense,
        compressed=tuple(compressed or ()),
        baselines=tuple(baseline or ()),
        baseline_args=baseline_args,
        baseline_urls=tuple(baseline_url or ()),
        api_key=api_key,
        urls=(dense_url, *(compressed_url or ())) if dense_url is not None else (),
        scenarios=tuple(choose(scenario or ())),
        repeats=repeats,
        scale=scale,
        seed=seed,
        serve_args=serve_args,
        env=_environment(env or ()),
        servers=servers,
        quality=quality,
        quality_text=quality_text,
        log_dir=log_dir,
        keep=out,
    )
    config.check()
    console = _console()
    if dry_run:
        _show_plan(console, config)
        return 0
    output.check_writable(json, csv, html)
    with LiveComparison(console) as live:
        report = compare_models(config, live)
    # Written first: no trouble with the terminal may cost the measurement.
    output.write_json(report, json)
    if csv is not None:
        output.write_rows(output.comparison_rows(report), csv)
    if html is not None:
        output.write_html(report, html)
    print_comparison(console, report)
    output.say_written(console, json, csv, html)
    return 0 if report["ok"] else 1


def _console() -> "Console":
    from rich.console import Console

    return Console(stderr=True)


def _environment(words: Sequence[str]) -> dict[str, str]:
    pairs = [word.partition("=") for word in words]
    for name, equals, _ in pairs:
        if not equals or not name:
            raise UserError(f"--env {name!r}: expected NAME=VALUE.")
    return {name: value for name, _, value in pairs}


def _show_plan(console: "Console", config: "CompareConfig") -> None:
    from rich.table import Table

    from bench.compare import prepare
    from bench.scenarios import fit
    from bench.server import check_model_dir

    for directory in config.directories():
        check_model_dir(directory)
    models = len(config.roles())
    table = Table(title=f"{models} models, {config.repeats} repeats", title_justify="left")
    for head in ("scenario", "what", "in", "out", "requests", "load"):
        table.add_column(head)
    for s in config.scenarios:
        load = "all at once" if s.concurrency is None else f"{s.concurrency} at a time"
        words = [s.name, s.title, str(s.input_len), str(s.output_len), str(s.num_requests), load]
        table.add_row(*words)
    console.print(table)
    tokens = sum(round(s.num_requests * config.scale) * s.output_len for s in config.scenarios)
    console.print(
        f"{len(config.scenarios) * models * config.repeats} load tests generating "
        f"{tokens * models * config.repeats} tokens, and {0 if config.urls else models} server starts."
    )
    loads = [fit(scenario, None, config.scale) for scenario in config.scenarios] * config.repeats
    if config.keep is not None:
        plan = prepare(config)
        console.print(f"{plan.kept} of the {plan.runs} load tests are in {config.keep}.", highlight=False)
        loads = plan.left
    console.print(_expected(config, loads))


def _expected(config: "CompareConfig", loads: "Sequence[Scenario]") -> str:
    """How long ``loads`` take on all models."""
    from bench import estimate

    if not loads:
        return "expected: nothing is left to measure."
    speeds = [estimate.of_directory(directory) for directory in config.directories()]
    for url in config.servers_up():
        speed = estimate.of_server(url, config.api_key)
        if speed is None:
            return f"expected: unknown, {url} does not answer."
        speeds.append(speed)
    seconds = sum(
        speed.seconds(s.num_requests, s.concurrency or s.num_requests, s.input_len, s.output_len)
        for speed in speeds
        for s in loads
    )
    starts = 0 if config.urls else len(speeds) * (config.repeats if config.servers == "one" else 1)
    by = "one short request to each" if config.urls else "the checkpoints' bytes and this processor's speed"
    total = estimate.in_words(seconds + starts * estimate.START_SECONDS)
    return f"expected: about {total}, by {by}" + (", without the quality part." if config.quality else ".")


class LiveComparison(Observer):
    """Live table of a comparison: what is going on, and the figures so far."""

    def __init__(self, console: "Console") -> None:
        from rich.live import Live

        self._console = console
        self._live = Live(console=console, refresh_per_second=4, transient=True)
        self._text, self._done, self._planned = "preparing", 0, 0
        self._rows: dict[str, dict[str, str]] = {}
        self._models: list[str] = []

    def __enter__(self) -> "LiveComparison":
        if self._console.is_terminal:
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.__exit__(kind, error, trace)

    def say(self, text: str) -> None:
        """Show what is going on; without a terminal only the first words of a step, once."""
        step = text.partition(":")[0]
        if not self._console.is_terminal and step != self._text.partition(":")[0]:
            self._console.print(step, highlight=False, markup=False)
        self._text = text
        self._draw()

    def planned(self, runs: int) -> None:
        """Note the number of load tests."""
        self._planned = runs

    def measured(self, scenario: "Scenario", model: "Contestant", reports: Reports) -> None:
        """Show the newest figure."""
        from bench.entries import RATIO_METRICS

        self._done += 1
        if model.name not in self._models:
            self._models.append(model.name)
        statistic = RATIO_METRICS[scenario.headline][0]
        values = [report["metrics"][scenario.headline] for report in reports[scenario.name, model.name]]
        numbers = [value if statistic is None else value[statistic] for value in values]
        known = [number for number in numbers if number is not None]
        shown = f"{sum(known) / len(known):.2f}" if known else "failed"
        self._rows.setdefault(f"{scenario.name} {scenario.headline}", {})[model.name] = shown
        self._text = f"measuring {scenario.name}"
        if not self._console.is_terminal:
            line = f"[{self._done}/{self._planned}] {scenario.name} {scenario.headline} {model.name}: {shown}"
            self._console.print(line, highlight=False, markup=False)
        self._draw()

    def _draw(self) -> None:
        if not self._console.is_terminal:
            return
        from rich.console import Group
        from rich.markup import escape
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        table = Table()
        table.add_column("means so far")
        for name in self._models:
            table.add_column(escape(name), justify="right")
        for row, figures in self._rows.items():
            table.add_row(row, *(figures.get(name, "") for name in self._models))
        status = Text(
            f"{self._done}/{self._planned} load tests; {self._text}", overflow="ellipsis", no_wrap=True
        )
        bar = ProgressBar(total=max(1, self._planned), completed=self._done)
        self._live.update(Group(table, bar, status) if self._rows else Group(bar, status))


def print_comparison(console: "Console", report: Mapping[str, Any]) -> None:
    """Ratios, then size and quality."""
    console.print(_ratio_table(report))
    console.print(_model_table(report))
    failed = sum(entry["failed"] for entry in report["scenarios"])
    if failed:
        console.print(f"[red]{failed} requests were not completed[/]; see `requests` in the servers' logs")


def _ratio_table(report: Mapping[str, Any]) -> "Table":
    from rich.markup import escape
    from rich.table import Table

    from bench.report import METRIC_NAMES, TABLE_ONLY, entry_title, interval, verdict

    colours = {"better": "green", "worse": "red", "": "white"}
    caption = "above 1 the compressed model is better"
    table = Table(
        title="Compressed against dense", title_justify="left", caption=caption, caption_justify="left"
    )
    for head in ("scenario", "metric", "dense", "compressed", "ratio", "95 % interval"):
        table.add_column(head, justify="left" if head in ("scenario", "metric") else "right")
    for entry in report["scenarios"]:
        title = escape(entry_title(entry, report["scenarios"]))
        for metric, ratio in entry["ratio"].items():
            if metric in TABLE_ONLY:
                continue
            sides = [entry[side][metric] for side in ("dense", "compressed")]
            figures = [f"{s[ratio['statistic']] if isinstance(s, Mapping) else s:.2f}" for s in sides]
            colour = colours[verdict(ratio)]
            table.add_row(
                title, METRIC_NAMES[metric], *figures, f"[{colour}]{ratio['value']:.3f}[/]", interval(ratio)
            )
            title = ""
    return table


def _model_table(report: Mapping[str, Any]) -> "Table":
    from rich.markup import escape
    from rich.table import Table

    from bench.page import megabytes, number

    table = Table(title="Size and quality", title_justify="left")
    heads = (
        "model",
        "checkpoint",
        "weights resident",
        "server memory",
        "KV tokens",
        "perplexity",
        "mean |Δ logprob|",
        "top-1",
    )
    for head in heads:
        table.add_column(head, justify="left" if head == "model" else "right")
    distances = report["parity"].get("by_candidate", {})
    for model in report["models"]:
        distance = distances.get(model["name"], {})
        agreement = distance.get("top1_agreement")
        table.add_row(
            escape(model["name"]),
            megabytes(model.get("checkpoint_bytes")),
            megabytes(model.get("resident_bytes")),
            megabytes(model.get("memory", {}).get("pss_bytes")),
            number(model.get("kv_cache_tokens"), 0),
            number(model.get("perplexity"), 3),
            number(distance.get("mean_dlogprob"), 4),
            "–" if agreement is None else f"{agreement:.2%}",
        )
    return table
