"""``python -m bench.demo``: dense -> compressed -> served -> measured, on this machine, in one command."""

import sys
from pathlib import Path
from typing import Annotated

import orjson
import typer
from rich.console import Console

from bench.demo.steps import Steps
from converters.train.threads import wait_passively
from vllm_sparse.errors import UserError

# A log file has no width of its own, and 80 columns cut the tables.
LOG_WIDTH = 110


def main(
    out: Annotated[Path, typer.Option(help="Working directory; finished parts are reused.")] = Path(
        "out/demo"
    ),
    model: Annotated[str | None, typer.Option(help="Model directory or hub id instead of training.")] = None,
    preset: Annotated[str, typer.Option(help="Training recipe of the demo's own model.")] = "demo",
    speed: Annotated[bool, typer.Option(help="Also measure speed at a real size.")] = True,
) -> None:
    """Make, compress, convert, serve and compare; exit 1 if a served model answers wrongly."""
    wait_passively()
    from bench.demo import measure, models, page, report
    from bench.demo import speed as speed_at_size

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=LOG_WIDTH)
    steps = Steps(console)
    out.mkdir(parents=True, exist_ok=True)
    made = models.build(out, model, preset, steps)
    measured = measure.serve_and_measure(made, out, steps)
    compared = speed_at_size.measure(out, made.dense.directory, steps) if speed else None
    log = None if model else made.dense.directory / "log.jsonl"
    result = report.build(measured, made.perplexity_unigram, compared, log)
    (out / "report.json").write_bytes(
        orjson.dumps(result, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY)
    )
    (out / "report.html").write_text(page.render(result), encoding="utf-8")
    report.print_tables(result, console)
    console.print(f"written: {out / 'report.json'}, {out / 'report.html'}", markup=False)
    if not result["ok"]:
        sys.exit(1)


def run() -> int:
    """Run with user errors as one sentence and exit code 2."""
    try:
        typer.run(main)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except OSError as error:
        sys.stderr.write(f"error: {error.strerror or error}: {error.filename or ''}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; every server that was started is stopped\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run())
