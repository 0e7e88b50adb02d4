"""``vllm-sparse bench kernels``: the kernel table of this machine."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_sparse.errors import UnsupportedError

if TYPE_CHECKING:
    from bench.kernels import Row

_HEADER = f"{'format':<12} {'backend':<12} {'N x K':>13} {'M':>5} {'us':>10} {'GB/s':>6} {'limit':>6} " + (
    f"{'vs dense':>8} {'vs vLLM':>8}"
)


def _numbers(text: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 1:
        raise UnsupportedError(f"--m {text!r}: give token counts of at least 1, separated by commas")
    return values


def _line(row: "Row") -> str:
    def ratio(value: float | None) -> str:
        return f"{'-':>8}" if value is None else f"{value:7.2f}x"

    shape = f"{row.n}x{row.k}"
    return (
        f"{row.format:<12} {row.backend:<12} {shape:>13} {row.m:>5} {row.us:>10.1f} {row.gbs:>6.1f} "
        f"{row.limit_fraction:>6.0%} {ratio(row.ratio_vs_best_dense)} {ratio(row.ratio_vs_vllm_dense)}"
    )


def kernels_command(
    shapes: Annotated[
        str | None, typer.Option(help="NxK or model names, comma-separated; default: five models' layers.")
    ] = None,
    m: Annotated[str | None, typer.Option("--m", help="Token counts, comma-separated.")] = None,
    formats: Annotated[
        str | None,
        typer.Option(
            help="bf16, int8, w8a8-int8, fp8, int4-g128; on a CPU w4a8-g128, on a GPU w8a8-fp8; default: all."
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=3, help="Timed calls of each product per row, on a CPU.")] = 40,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads, on a CPU; default: torch's.")] = None,
    quick: Annotated[bool, typer.Option(help="Two shapes, three token counts, fewer repeats.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the table here; - for standard output.")] = None,
) -> int:
    """Time 2:4 kernels against the best dense products on this machine, weights read from memory.

    Measures the GPU where there is an NVIDIA one, else the CPU.

    Example: vllm-sparse bench kernels --shapes llama-3.2-1b --m 1,8,64 --json kernels.json
    """
    import torch

    from bench import kernels
    from bench.output import STANDARD_OUTPUT, check_writable, write_json

    check_writable(json)
    if threads is not None:
        torch.set_num_threads(threads)
    if shapes is not None:
        layers = kernels.parse_shapes(shapes)
    elif quick:
        layers = list(kernels.QUICK_SHAPES)
    else:
        layers = kernels.parse_shapes(",".join(kernels.MODEL_SHAPES))
    default_tokens = kernels.QUICK_TOKENS if quick else kernels.DEFAULT_TOKENS
    tokens = list(default_tokens) if m is None else _numbers(m)
    if torch.cuda.is_available():
        from bench.kernels_cuda import command

        return command(layers if shapes or quick else None, tokens if m or quick else None, formats, json)
    names = list(kernels.FORMATS) if formats is None else [part.strip() for part in formats.split(",")]
    for name in names:
        kernels.make_spec(name, 128, 128)  # refuses an unknown one before anything is timed
    quiet = json == STANDARD_OUTPUT

    def say(row: "Row") -> None:
        if not quiet:
            typer.echo(_line(row))

    if not quiet:
        typer.echo(_HEADER)
    report = kernels.run(layers, tokens, names, min(repeats, 12) if quick else repeats, say)
    if not quiet:
        typer.echo(
            f"{report['threads']} thread(s), {report['clock']}, {report['isa']}, "
            f"pure read {report['read_bandwidth_gbs']:.1f} GB/s. limit: share of the time that reading the "
            "weights alone takes; vs dense: best unquantised product; vs vLLM: its dense kernel of the same "
            "kind."
        )
    write_json(report, json)
    return 0


def add_kernels_command(app: typer.Typer) -> None:
    """Add ``kernels`` to the ``bench`` commands."""
    app.command("kernels")(kernels_command)
