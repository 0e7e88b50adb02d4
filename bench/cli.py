"""``vllm-sparse bench``: run, compare, sweep, report, kernels, and checks of the client itself."""

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bench.compare_cli import compare_command
from bench.sweep_cli import crosscheck_command, selftest_command, sweep_command
from vllm_sparse.errors import UserError

if TYPE_CHECKING:
    from bench.runner import RunConfig

app = typer.Typer(help="Load tests and kernel tables.", no_args_is_help=True)

EXIT_INTERRUPTED = 130


@app.command("run")
def run_command(
    base_url: Annotated[str, typer.Option(help="Server root, for example http://127.0.0.1:8000.")],
    model: Annotated[str | None, typer.Option(help="Served name; default: the first one listed.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer directory for text prompts; default: the served model's.")
    ] = None,
    endpoint: Annotated[str, typer.Option(help="completions or chat.")] = "completions",
    dataset: Annotated[str, typer.Option(help="random, text, sharegpt, prefix or trace.")] = "random",
    dataset_path: Annotated[Path | None, typer.Option(help="File for text, sharegpt and trace.")] = None,
    input_len: Annotated[int, typer.Option(help="Prompt tokens.")] = 512,
    output_len: Annotated[
        int | None, typer.Option(help="Tokens to generate; default 128, or as recorded (sharegpt, trace).")
    ] = None,
    range_ratio: Annotated[float, typer.Option(help="Vary both lengths by ± this share.")] = 0.0,
    prefix_len: Annotated[int, typer.Option(help="Shared tokens (prefix).")] = 256,
    num_prefixes: Annotated[int, typer.Option(help="Different prefixes (prefix).")] = 1,
    trace_speed: Annotated[float, typer.Option(help="Replay faster than recorded (trace).")] = 1.0,
    turns: Annotated[
        int,
        typer.Option(help="Turns per conversation, with the answers as history; 0: as recorded."),
    ] = 1,
    think_time: Annotated[float, typer.Option(help="Seconds from an answer to the next turn.")] = 0.0,
    vocab_size: Annotated[int | None, typer.Option(help="Random ids stay below it (no tokenizer).")] = None,
    text_prompts: Annotated[bool, typer.Option(help="Send text even to completions.")] = False,
    ignore_eos: Annotated[bool, typer.Option(help="Generate exactly --output-len tokens.")] = False,
    num_requests: Annotated[int, typer.Option(help="Requests to send; conversations with --turns.")] = 100,
    concurrency: Annotated[
        int | None, typer.Option(help="Closed loop: users at a time (default 1). With a rate: cap in flight.")
    ] = None,
    request_rate: Annotated[
        float | None, typer.Option(help="Open loop: requests per second; inf sends all at once.")
    ] = None,
    ramp_from: Annotated[float | None, typer.Option(help="Let the rate grow from this one.")] = None,
    burstiness: Annotated[float, typer.Option(help="1 Poisson, below 1 burstier, inf constant.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of prompts and arrivals.")] = 0,
    stream: Annotated[bool, typer.Option(help="Ask for streamed answers.")] = True,
    continuous_usage: Annotated[
        bool, typer.Option(help="Ask for running token counts, where offered.")
    ] = True,
    num_warmups: Annotated[
        int | None, typer.Option(help="Unmeasured requests before; default up to 4.")
    ] = None,
    goodput: Annotated[str | None, typer.Option(help="Limits in ms, for example ttft:200,tpot:50.")] = None,
    timeout: Annotated[float, typer.Option(help="Longest time for one request, seconds.")] = 600.0,
    retries: Annotated[int, typer.Option(help="Further attempts for refused requests.")] = 0,
    max_seconds: Annotated[float | None, typer.Option(help="Cancel the run after that time.")] = None,
    workers: Annotated[int, typer.Option(help="Client processes; 0 chooses.")] = 0,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", show_envvar=True)] = None,
    extra_body: Annotated[str | None, typer.Option(help="JSON object merged into every request.")] = None,
    server_metrics: Annotated[bool, typer.Option(help="Read /metrics during the run.")] = True,
    push: Annotated[
        str | None, typer.Option(help="Pushgateway for the run's own metrics, for example http://host:9091.")
    ] = None,
    push_interval: Annotated[float, typer.Option(help="Seconds between two pushes.")] = 5.0,
    push_label: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE for the pushed group; may be repeated.")
    ] = None,
    raw: Annotated[str, typer.Option(help="Keep per request: none, requests or chunks.")] = "requests",
    json: Annotated[Path | None, typer.Option(help="Write the report here; - for standard output.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write one row per request here.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a self-contained page here.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
) -> int:
    """One load test. Exit 1 when a request failed; the report is written all the same.

    Example: vllm-sparse bench run --base-url http://127.0.0.1:8000 --model m --dataset random
    --input-len 256 --output-len 64 --ignore-eos --num-requests 64 --concurrency 8 --json run.json
    """
    from bench.metrics import Goodput
    from bench.push import PushConfig, parse_labels
    from bench.runner import RunConfig
    from bench.workloads import WorkloadSpec

    recorded = dataset in ("sharegpt", "trace")
    spec = WorkloadSpec(
        dataset=dataset,
        num_requests=num_requests,
        input_len=input_len,
        output_len=output_len if output_len is not None or recorded else 128,
        path=dataset_path,
        range_ratio=range_ratio,
        prefix_len=prefix_len,
        num_prefixes=num_prefixes,
        ignore_eos=ignore_eos,
        seed=seed,
        as_text=text_prompts,
        trace_speed=trace_speed,
        turns=turns,
        think_time_s=think_time,
    )
    config = RunConfig(
        base_url=base_url,
        model=model,
        endpoint=endpoint,
        workload=spec,
        concurrency=concurrency,
        request_rate=request_rate,
        ramp_from=ramp_from,
        burstiness=burstiness,
        stream=stream,
        continuous_usage=continuous_usage,
        num_warmups=num_warmups,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        goodput=None if goodput is None else Goodput.parse(goodput),
        timeout_s=timeout,
        retries=retries,
        api_key=api_key,
        workers=workers,
        max_seconds=max_seconds,
        extra_body=_json_object(extra_body),
        scrape=server_metrics,
        push=None if push is None else PushConfig(push, parse_labels(push_label or []), push_interval),
        raw=raw,
    )
    return _show_plan(config) if dry_run else _run(config, json, csv, html)


app.command("compare")(compare_command)
app.command("sweep")(sweep_command)
app.command("crosscheck")(crosscheck_command)
app.command("selftest")(selftest_command)


@app.command("report")
def report_command(
    report: Annotated[Path, typer.Argument(help="A JSON report of bench run, compare or sweep.")],
    html: Annotated[Path, typer.Option(help="Write the page here.")],
) -> int:
    """Rebuild the HTML page of a JSON report.

    Example: vllm-sparse bench report compare.json --html compare.html
    """
    from rich.console import Console

    from bench import output

    output.check_writable(html)
    output.write_html(output.read_report(report), html)
    output.say_written(Console(stderr=True), html)
    return 0


def _show_plan(config: "RunConfig") -> int:
    from rich.console import Console

    from bench.plan import plan

    console = Console(stderr=True)
    for line in plan(config).lines():
        console.print(line, highlight=False, markup=False)
    return 0


def _run(config: "RunConfig", json: Path | None, csv: Path | None, html: Path | None) -> int:
    from rich.console import Console

    from bench import output
    from bench.console import LiveRun, print_run
    from bench.runner import run

    if csv is not None and config.raw == "none":
        raise UserError("--csv needs the per-request times; leave --raw at requests or chunks.")
    output.check_writable(json, csv, html)
    console = Console(stderr=True)
    with LiveRun(console) as live:
        result = run(config, on_progress=live.update, on_plan=live.planned)
    # Written first: no trouble with the terminal may cost the measurement.
    output.write_json(result.report, json)
    if csv is not None:
        output.write_csv(result.report, csv)
    if html is not None:
        output.write_html(result.report, html)
    print_run(console, result.report)
    output.say_written(console, json, csv, html)
    if result.load.interrupted:
        return EXIT_INTERRUPTED
    return 0 if result.ok else 1


def _json_object(text: str | None) -> dict[str, Any]:
    import orjson

    if text is None:
        return {}
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise UserError(f"--extra-body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"--extra-body is a JSON {type(value).__name__}; expected an object.")
    return value


def _add_kernels() -> None:
    """Add ``bench kernels`` when this installation has it."""
    if importlib.util.find_spec("bench.kernels_cli") is not None:
        importlib.import_module("bench.kernels_cli").add_kernels_command(app)


_add_kernels()
