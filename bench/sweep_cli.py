"""Command lines of ``bench sweep``, ``bench crosscheck`` and ``bench selftest``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_sparse.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from bench.sweep import PointPlan, SweepConfig


def sweep_command(
    base_url: Annotated[str, typer.Option(help="Server root, for example http://127.0.0.1:8000.")],
    out: Annotated[Path, typer.Option(help="Folder for the points; started again it goes on from there.")],
    rates: Annotated[str | None, typer.Option(help="Requests per second, for example 1,2,4,8.")] = None,
    concurrencies: Annotated[str | None, typer.Option(help="Users at a time, for example 1,2,4,8.")] = None,
    search_from: Annotated[
        float | None, typer.Option(help="Find the highest rate within --goodput, beginning with this one.")
    ] = None,
    goodput: Annotated[str | None, typer.Option(help="Limits in ms, for example ttft:200,tpot:50.")] = None,
    attain: Annotated[float, typer.Option(help="Share of requests that must keep the limits.")] = 0.95,
    seconds: Annotated[float | None, typer.Option(help="Length of a point by rate.")] = None,
    model: Annotated[str | None, typer.Option(help="Served name; default: the first one listed.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer directory for text prompts.")] = None,
    endpoint: Annotated[str, typer.Option(help="completions or chat.")] = "completions",
    input_len: Annotated[int, typer.Option(help="Prompt tokens.")] = 512,
    output_len: Annotated[int, typer.Option(help="Tokens to generate.")] = 128,
    range_ratio: Annotated[float, typer.Option(help="Vary both lengths by ± this share.")] = 0.0,
    num_requests: Annotated[int, typer.Option(help="Requests per point.")] = 64,
    burstiness: Annotated[float, typer.Option(help="1 Poisson, below 1 burstier, inf constant.")] = 1.0,
    ignore_eos: Annotated[bool, typer.Option(help="Generate exactly --output-len tokens.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of prompts and arrivals.")] = 0,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", show_envvar=True)] = None,
    json: Annotated[Path | None, typer.Option(help="Write the report here; - for standard output.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write one row per point here.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a self-contained page here.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
) -> int:
    """Load tests over several rates or concurrencies; or the highest rate within limits.

    Example: vllm-sparse bench sweep --base-url http://127.0.0.1:8000 --concurrencies 1,2,4,8 --out out/sweep
    --html sweep.html
    """
    from rich.console import Console

    from bench import output
    from bench.metrics import Goodput
    from bench.runner import RunConfig
    from bench.sweep import SweepConfig, parse_values, sweep
    from bench.workloads import WorkloadSpec

    if sum(choice is not None for choice in (rates, concurrencies, search_from)) != 1:
        raise UserError("give exactly one of --rates, --concurrencies and --search-from.")
    values = (search_from,) if search_from is not None else parse_values(rates or concurrencies or "")
    spec = WorkloadSpec(
        num_requests=num_requests,
        input_len=input_len,
        output_len=output_len,
        range_ratio=range_ratio,
        ignore_eos=ignore_eos,
        seed=seed,
    )
    base = RunConfig(
        base_url,
        model=model,
        endpoint=endpoint,
        workload=spec,
        burstiness=burstiness,
        tokenizer=tokenizer,
        goodput=None if goodput is None else Goodput.parse(goodput),
        api_key=api_key,
    )
    config = SweepConfig(
        base=base,
        by="request_rate" if concurrencies is None else "concurrency",
        values=values,
        directory=out,
        search=search_from is not None,
        attain=attain,
        seconds=seconds,
    )
    config.check()
    console = Console(stderr=True)
    if dry_run:
        _show_plan(console, config)
        return 0
    output.check_writable(json, csv, html)
    report = sweep(config, lambda text: console.print(text, highlight=False, markup=False))
    output.write_json(report, json)
    if csv is not None:
        output.write_rows(output.sweep_rows(report), csv)
    if html is not None:
        output.write_html(report, html)
    console.print(_table(report))
    output.say_written(console, json, csv, html)
    if report["config"]["search"] and report["best"] is None:
        return 1
    return 0 if report["ok"] else 1


def _show_plan(console: "Console", config: "SweepConfig") -> None:
    from bench import estimate
    from bench.sweep import plan, search_seconds

    points = plan(config)
    for point in points:
        length = "" if point.seconds is None else f", {point.seconds:.0f} s of sending"
        kept = ", measured already" if point.kept else ""
        console.print(
            f"{config.by} {point.value:g}: {point.requests} requests{length}{kept}", highlight=False
        )
    if config.search:
        console.print("then twice the rate each time, until the limits break, and bisection")
        low, high = (estimate.in_words(seconds) for seconds in search_seconds(config))
        text = f"{low} to {high} of sending, by the rate that is found; more beyond what the server can do"
    elif config.by == "request_rate":
        total = sum(point.seconds or 0.0 for point in points if not point.kept)
        text = f"at least {estimate.in_words(total)}, more where the server cannot keep up"
    else:
        text = _expected_closed(config, [point for point in points if not point.kept])
    console.print(f"expected: {text}", highlight=False)


def _expected_closed(config: "SweepConfig", points: "Sequence[PointPlan]") -> str:
    """How long users wait for their answers depends on the server, so it is asked once."""
    from bench import estimate

    if not points:
        return "nothing is left to measure"
    base = config.base
    speed = estimate.of_server(base.base_url, base.api_key, base.model)
    if speed is None:
        return f"unknown, {base.base_url} does not answer"
    lengths = base.workload.input_len, base.workload.output_len or 0
    seconds = sum(speed.seconds(point.requests, int(point.value), *lengths) for point in points)
    return f"about {estimate.in_words(seconds)}, by one short request"


def _table(report: Mapping[str, Any]) -> "Table":
    from rich.table import Table

    from bench.page import number

    by = report["config"]["by"].replace("_", " ")
    table = Table(title=f"Sweep by {by}", title_justify="left")
    heads = (by, "output tok/s", "TTFT p50", "TTFT p95", "TPOT p50", "E2E p50", "lost")
    for head in heads:
        table.add_column(head, justify="right")
    for point in report["points"]:
        metrics, requests = point["metrics"], point["requests"]
        table.add_row(
            f"{point['value']:g}",
            number(metrics["output_tokens_per_s"]),
            number(metrics["ttft_ms"]["p50"]),
            number(metrics["ttft_ms"]["p95"]),
            number(metrics["tpot_ms"]["p50"]),
            number(metrics["e2e_ms"]["p50"]),
            str(requests["planned"] - requests["completed"]),
        )
    if report["config"]["search"]:
        best = report["best"]
        table.caption = (
            "no rate keeps the limits" if best is None else f"highest: {best['value']:g} requests/s"
        )
    return table


def crosscheck_command(
    base_url: Annotated[str, typer.Option(help="Server root.")],
    model: Annotated[str, typer.Option(help="Served name.")],
    tokenizer: Annotated[Path, typer.Option(help="Tokenizer directory (vLLM's tool needs one).")],
    input_len: Annotated[int, typer.Option(help="Prompt tokens.")] = 128,
    output_len: Annotated[int, typer.Option(help="Tokens to generate.")] = 64,
    num_requests: Annotated[int, typer.Option(help="Requests per run.")] = 64,
    concurrency: Annotated[int, typer.Option(help="Users at a time.")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each tool, in turns.")] = 3,
    tolerance: Annotated[float, typer.Option(help="Allowed relative difference.")] = 0.03,
    guidellm: Annotated[
        str | None, typer.Option(help="The guidellm program, to compare with it as well.")
    ] = None,
    together: Annotated[
        bool, typer.Option("--together", help="All tools at the same time instead of in turns.")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="Write the result here; - for standard output.")] = None,
) -> int:
    """This client, `vllm bench serve` and guidellm in turns on one server; exit 1 when they differ too much.

    All send the same prompts, so the server has to run with --no-enable-prefix-caching.

    Example: vllm-sparse bench crosscheck --base-url http://127.0.0.1:8000 --model m --tokenizer models/m
    """
    from rich.console import Console

    from bench import output
    from bench.crosscheck import cross_check
    from bench.crosscheck_tools import CrossCheckConfig

    config = CrossCheckConfig(
        base_url,
        model,
        tokenizer,
        input_len,
        output_len,
        num_requests,
        concurrency,
        repeats,
        tolerance,
        guidellm,
        together,
    )
    output.check_writable(json)
    console = Console(stderr=True)
    keep = None if json == output.STANDARD_OUTPUT else lambda report: output.write_json(report, json)
    report = cross_check(config, lambda text: console.print(text, highlight=False), keep)
    console.print(_crosscheck_table(report))
    if not report["ok"]:
        console.print(_over_tolerance(report), style="red", markup=False, highlight=False)
    output.write_json(report, json)
    output.say_written(console, json)
    return 0 if report["ok"] else 1


def _crosscheck_table(report: Mapping[str, Any]) -> "Table":
    from rich.table import Table

    title = f"Medians of {report['repeats']} runs each, ± half the range; p99 difference: all runs together"
    table = Table(title=title, title_justify="left")
    heads = (
        "against",
        "figure",
        "this client",
        "the other",
        "difference",
        "from - to",
        "95 %",
        "beside server",
    )
    for head in heads:
        table.add_column(head, justify="left" if head in ("against", "figure") else "right")
    names = {"vllm": "vllm bench serve"}
    for row in report["rows"]:
        colour = "green" if abs(row["difference"]) <= report["tolerance"] else "red"
        table.add_row(
            names.get(row["tool"], row["tool"]),
            row["figure"],
            f"{row['ours']:.3f} ± {row['range_ours'] / 2:.3f}",
            f"{row['theirs']:.3f} ± {row['range_theirs'] / 2:.3f}",
            f"[{colour}]{row['difference']:+.2%}[/]",
            _percent(row["differences"]),
            "" if row["pooled"] is None else _percent(row["pooled"]["ci95"]),
            "" if row["beside_server"] is None else f"{row['beside_server']:+.2%}",
        )
    return table


def _over_tolerance(report: Mapping[str, Any]) -> str:
    """Which figures are too far apart; that is what the exit code says."""
    rows = [row for row in report["rows"] if abs(row["difference"]) > report["tolerance"]]
    figures = ", ".join(f"{row['figure']} ({row['tool']})" for row in rows)
    return f"not within {report['tolerance']:.1%}: {figures}"


def _percent(ends: "Sequence[float]") -> str:
    return " ".join(f"{end:+.1%}" for end in ends)


def selftest_command(
    streams: Annotated[int, typer.Option(help="Streams at the same time.")] = 256,
    rate: Annotated[float, typer.Option(help="New streams per second.")] = 100.0,
    closed: Annotated[
        bool, typer.Option("--closed", help="Closed loop of --streams users, no rate.")
    ] = False,
    bars: Annotated[bool, typer.Option("--bars", help="All of 1, 64, 1024 and 2048 streams.")] = False,
    tolerance_ms: Annotated[float, typer.Option(help="Allowed error of any percentile.")] = 1.0,
    lag_tolerance_ms: Annotated[float, typer.Option(help="How late requests may leave (p99).")] = 5.0,
    json: Annotated[Path | None, typer.Option(help="Write the result here; - for standard output.")] = None,
) -> int:
    """How exact this client is on this machine: percentiles against a scripted server's own notes.

    Example: vllm-sparse bench selftest --streams 1024 --rate 200
    """
    from rich.console import Console

    from bench import output
    from bench.selftest import Load, check_all, check_client

    if streams < 1 or not rate > 0:
        raise UserError(f"--streams is {streams} and --rate is {rate}; both must be positive.")
    output.check_writable(json)
    console = Console(stderr=True)

    def show(result: Mapping[str, Any]) -> None:
        errors = ", ".join(
            f"{name.removesuffix('_ms').upper()} {error:.2f}" for name, error in result["errors_ms"].items()
        )
        how = "closed loop" if result["rate"] is None else f"{result['rate']:g} new streams/s"
        console.print(
            f"{result['streams_seen']:.0f} streams ({how}, {result['requests']} requests): largest error of "
            f"p50, p90, p95, p99 in ms: {errors}; left {result['dispatch_lag_ms']['p99']:.2f} ms late (p99); "
            f"{result['workers']} client process(es); {'ok' if result['ok'] else 'not within the tolerance'}",
            highlight=False,
        )

    if bars:
        report = check_all(tolerance_ms, lag_tolerance_ms, show)
    else:
        load = Load(streams, None, 4 * streams, 50.0) if closed else Load.open_loop(streams, rate)
        report = check_client(load, tolerance_ms, lag_tolerance_ms)
        show(report)
    output.write_json(report, json)
    return 0 if report["ok"] else 1
