"""Terminal output of inspect, verify and doctor."""

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from converters.sizes import size

if TYPE_CHECKING:
    from converters.doctor import Diagnosis
    from converters.inspect import Inspection, LayerReport
    from converters.verify import Verification

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
# Tensors that verify names on the terminal.
_SHOWN_NAMES = 10


def _console() -> Console:
    """Stdout; wide when it is not a terminal, so that logs keep one row per line."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def _grouped(layers: Iterable["LayerReport"]) -> list[tuple["LayerReport", str, list["LayerReport"]]]:
    """Layers that differ only in their number, as one row."""
    rows: defaultdict[tuple, list[LayerReport]] = defaultdict(list)
    for layer in layers:
        pattern = _NUMBER.sub("*", layer.name)
        key = (pattern, layer.shape, layer.dtype, layer.stored, layer.is_24, layer.action, layer.reason)
        rows[key].append(layer)
    return [(members[0], key[0], members) for key, members in rows.items()]


def print_inspection(found: "Inspection") -> None:
    """A summary and one row per kind of layer."""
    console = _console()
    title = f"[bold]{escape(found.path)}[/bold]  {escape(found.architecture or found.model_type)}"
    console.print(title, highlight=False)
    ratio = found.bytes / found.dense_bytes if found.dense_bytes else 1.0
    console.print(
        f"format {found.format}, {found.parameters / 1e6:.1f} M parameters, {size(found.bytes)} "
        f"({ratio:.3f} of dense), zeros in linears {100 * found.sparsity:.1f} %",
        highlight=False,
    )
    if found.layers:
        table = Table(show_edge=False)
        for name, justify in (
            ("weight", "left"),
            ("count", "right"),
            ("shape", "left"),
            ("numbers", "left"),
            ("stored", "left"),
            ("zeros", "right"),
            ("2:4", "left"),
            ("bytes", "right"),
            ("in vLLM", "left"),
        ):
            table.add_column(name, justify=justify, no_wrap=name != "in vLLM")  # type: ignore[arg-type]
        for layer, pattern, members in _grouped(found.layers):
            zeros = [member.sparsity for member in members if member.sparsity is not None]
            mark = {True: "yes", False: "no", None: ""}[layer.is_24 if layer.kind == "linear" else None]
            action = layer.action + (f" ({layer.backend})" if layer.backend else "")
            table.add_row(
                escape(pattern.removesuffix(".weight")),
                str(len(members)),
                "x".join(map(str, layer.shape)),
                layer.dtype,
                layer.stored,
                f"{100 * sum(zeros) / len(zeros):.1f} %" if zeros else "",
                mark,
                size(sum(member.bytes for member in members)),
                action,
            )
        console.print(table)
    for reason in dict.fromkeys(
        layer.reason for layer in found.layers if layer.action in ("fallback", "refused")
    ):
        console.print(reason, style="yellow", markup=False, highlight=False)
    for warning in found.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False)
    console.print(found.verdict, markup=False, highlight=False)


def print_verification(result: "Verification") -> None:
    """The figures and the verdict."""
    console = _console()
    console.print(
        f"tensors: {result.tensors_equal} of {result.tensors_checked} equal, "
        f"{result.tensors_quantized} quantised with zeros kept, {len(result.different)} different",
        highlight=False,
    )
    if result.tensors_padded:
        console.print(
            f"{result.tensors_padded} equal but for channels of zeros that one side has more of",
            highlight=False,
        )
    if result.max_rounding_steps is not None:
        console.print(
            f"quantised values are at most {result.max_rounding_steps:.2f} steps of their format away "
            "(0.50 is rounding to nearest)",
            highlight=False,
        )
    for name in result.different[:_SHOWN_NAMES]:
        console.print(f"  different: {name}", markup=False, highlight=False)
    if len(result.different) > _SHOWN_NAMES:
        console.print(f"  and {len(result.different) - _SHOWN_NAMES} more; --json lists all", highlight=False)
    if result.kl_mean is not None:
        console.print(
            f"logits ({'; '.join(result.notes)}, {result.positions} positions): mean KL "
            f"{result.kl_mean:.3g}, "
            f"top-1 {100 * (result.top1_agreement or 0):.2f} %, max |difference| {result.max_abs_diff:.3g}",
            highlight=False,
        )
    console.print("[green]ok[/green]" if result.ok else "[red]failed[/red]")


def print_diagnosis(found: "Diagnosis") -> None:
    """Versions, device, backends and one row per format."""
    console = _console()
    console.print(
        f"vllm-sparse {found.version}, Python {found.python}, torch {found.torch}, "
        f"vLLM {found.vllm or 'not installed'}",
        highlight=False,
    )
    console.print(
        f"{found.device}: {found.device_name} ({', '.join(found.isa) or 'no ISA flags'})", highlight=False
    )
    for name, state in found.backends.items():
        console.print(f"backend {name}: {state}", markup=False, highlight=False)
    table = Table(show_edge=False)
    for name in ("format", "backend", "passed over"):
        table.add_column(name, overflow="fold")
    for row in found.formats:
        passed = "; ".join(f"{name}: {why}" for name, why in row.passed_over.items())
        table.add_row(row.format, row.backend or "none", escape(passed))
    console.print(table)
    for advice in found.advice:
        console.print(advice, style="yellow", markup=False, highlight=False)
    for problem in found.problems:
        console.print(problem, style="red", markup=False, highlight=False)
