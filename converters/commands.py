"""Command-line face of inspect, convert, verify and doctor."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_sparse.errors import UserError

if TYPE_CHECKING:
    from converters.report import Report

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\Z")


def parse_size(text: str) -> int:
    """Bytes of a size such as ``8GiB``, ``500MB`` or ``1048576``.

    Raises:
        UserError: not a size.
    """
    match = _SIZE.match(text.strip().upper())
    if match is None:
        raise UserError(
            f"--max-memory {text!r} is not a size; write for example 8GiB, 500MB or a number of bytes"
        )
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " KMGT".index(match[2] or " "))


def add_commands(app: typer.Typer) -> None:
    """Register the converter commands on the root ``app``."""
    app.command("inspect", epilog="Example: vllm-sparse inspect ./model")(inspect_command)
    app.command("verify", epilog="Example: vllm-sparse verify ./dense ./dense-24 --prompts prompts.txt")(
        verify_command
    )
    app.command("doctor", epilog="Example: vllm-sparse doctor --json")(doctor_command)
    app.command("convert", epilog="Example: vllm-sparse convert ./pruned ./pruned-24 --weights int8")(
        convert_command
    )


def convert_command(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Checkpoint folder, or a hub id.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to make.")],
    source_format: Annotated[str, typer.Option("--format", help="Source format; auto detects it.")] = "auto",
    to: Annotated[str, typer.Option("--to", help="sparse24, structured or dense.")] = "sparse24",
    weights: Annotated[
        str, typer.Option("--weights", help="Numbers of the packed linears: keep, int8, fp8, int4 or w4a8.")
    ] = "keep",
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted conversion.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and plan; write nothing.")] = False,
    max_memory: Annotated[
        str | None, typer.Option("--max-memory", help="Refuse to need more than this, e.g. 8GiB.")
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Open .bin and .pt files, as data only, in a sandbox.")
    ] = False,
    align: Annotated[
        int, typer.Option("--align", help="Round widths of structured layers up to multiples of this.")
    ] = 0,
    dense: Annotated[
        str | None,
        typer.Option("--dense", help="Unpruned model: --align brings its best removed channels back."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Convert any readable checkpoint into one that vLLM loads."""
    from converters.convert import convert
    from converters.display import byte_progress

    limit = None if max_memory is None else parse_size(max_memory)
    with byte_progress() as progress:
        report = convert(
            source,
            destination,
            to,
            weights,
            format=source_format,
            resume=resume,
            dry_run=dry_run,
            max_memory=limit,
            allow_pickle=allow_pickle,
            align=align,
            dense=dense,
            progress=progress,
        )
    if as_json:
        _echo_json(report.as_json())
    else:
        _print_report(report)


def inspect_command(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Checkpoint folder, or a hub id.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Say what a checkpoint is and what vLLM with this plugin will do with each layer."""
    from converters.inspect import inspect

    found = inspect(path)
    if as_json:
        _echo_json(found.as_json())
        return
    from converters.tables import print_inspection

    print_inspection(found)


def verify_command(
    a: Annotated[str, typer.Argument(metavar="A", help="The reference checkpoint.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The checkpoint to check.")],
    prompts: Annotated[Path | None, typer.Option("--prompts", help="Text file, one prompt per line.")] = None,
    logits: Annotated[bool, typer.Option("--logits/--no-logits", help="Compare logits too.")] = True,
    max_kl: Annotated[
        float | None,
        typer.Option("--max-kl", help="Largest mean KL that passes; default 1e-6, 0.1 when quantised."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Compare the weights and the logits of two checkpoints; exit code 1 when the check fails."""
    from converters.verify import read_prompts, verify

    texts = read_prompts(prompts) if prompts else []
    result = verify(a, b, texts, logits=logits, max_kl=max_kl)
    if as_json:
        _echo_json(result.as_json())
    else:
        from converters.tables import print_verification

        print_verification(result)
    if not result.ok:
        raise typer.Exit(1)


def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Say what this machine can run, with which kernels, and why not with others."""
    from converters.doctor import diagnose

    found = diagnose()
    if as_json:
        _echo_json(found.as_json())
    else:
        from converters.tables import print_diagnosis

        print_diagnosis(found)
    if found.problems:
        raise typer.Exit(1)


def _echo_json(value: dict[str, Any]) -> None:
    import orjson

    typer.echo(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode())


def _print_report(report: "Report") -> None:
    total = report.packed + len(report.dense)
    ratio = report.destination_bytes / report.source_bytes if report.source_bytes else 1.0
    if report.target == "sparse24":
        typer.echo(f"{report.packed} of {total} linears packed as 2:4")
        for reason, count in sorted(report.dense_reasons().items()):
            modules = [name for name, why in report.dense.items() if why == reason]
            shown = ", ".join(modules[:3]) + (", ..." if count > 3 else "")
            typer.echo(f"  left dense, {reason}: {count} ({shown})")
    typer.echo(f"zeros in linear weights: {100 * report.sparsity:.2f} %")
    typer.echo(
        f"tensors: {report.source_bytes / 1e6:.1f} MB -> "
        f"{report.destination_bytes / 1e6:.1f} MB ({ratio:.3f})"
    )
    for note in report.notes[:10]:
        typer.echo(f"note: {note}")
    if len(report.notes) > 10:
        typer.echo(f"note: {len(report.notes) - 10} more in the manifest")
    typer.echo("dry run: nothing written" if report.dry_run else f"written: {report.destination}")
