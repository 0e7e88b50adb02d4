"""Writes reports: JSON, CSV, HTML; files appear whole or not at all."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from bench.files import STANDARD_OUTPUT as STANDARD_OUTPUT
from bench.files import check_writable as check_writable
from bench.files import write_text as write_text
from bench.raw import write_csv as write_raw_csv
from bench.statistics import flatten
from vllm_sparse.errors import FormatError, UserError

if TYPE_CHECKING:
    from rich.console import Console


def dump(report: Mapping[str, Any]) -> bytes:
    """JSON with numpy numbers and without nan (written as null)."""
    return orjson.dumps(report, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_INDENT_2) + b"\n"


def write_json(report: Mapping[str, Any], path: Path | None) -> None:
    """Write a report; ``-`` is standard output, None writes nothing."""
    if path is not None:
        write_text(dump(report), path)


def write_csv(report: Mapping[str, Any], path: Path) -> None:
    """Per-request rows of a run report."""
    if report.get("raw") is None:
        raise UserError("--csv needs the per-request times; leave --raw at requests or chunks.")
    write_raw_csv(report["raw"], path)


def write_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Rows with equal keys as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [])
    writer.writeheader()
    writer.writerows(rows)
    write_text(text.getvalue(), path)


def comparison_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per scenario, pair of models and metric."""
    rows = []
    for entry in report["scenarios"]:
        for metric, ratio in entry["ratio"].items():
            low, high = ratio["ci95"]
            row = {"scenario": entry["name"], "baseline": entry["baseline"], "candidate": entry["candidate"]}
            row |= {"metric": metric, "statistic": ratio["statistic"]}
            for side in ("dense", "compressed"):
                value = entry[side][metric]
                row[side] = value[ratio["statistic"]] if isinstance(value, Mapping) else value
            rows.append(
                row | {"ratio": ratio["value"], "ci95_low": low, "ci95_high": high, "pairs": ratio["pairs"]}
            )
    return rows


def sweep_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per point of a sweep; all figures under dotted names."""
    by = report["config"]["by"]
    flat = [
        {by: point["value"], **flatten(point["requests"]), **flatten(point["metrics"])}
        for point in report["points"]
    ]
    names = list(dict.fromkeys(name for row in flat for name in row))
    return [{name: row.get(name) for name in names} for row in flat]


def write_html(report: Mapping[str, Any], path: Path) -> None:
    """The page of a report."""
    from bench.report import render

    write_text(render(report), path)


def say_written(console: "Console", *paths: Path | None) -> None:
    """Name the files that were written, as the last line on the terminal."""
    names = [str(path) for path in paths if path is not None and path != STANDARD_OUTPUT]
    if names:
        console.print(f"written: {', '.join(names)}", markup=False, highlight=False, soft_wrap=True)


def read_report(path: Path) -> dict[str, Any]:
    """A report of this project.

    Raises:
        FormatError: The file is missing, not JSON, or of another schema.
    """
    if not path.is_file():
        raise FormatError(f"{path}: no such report. Give the file that --json wrote.")
    try:
        report = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise FormatError(f"{path}: not JSON ({error}).") from error
    schema = report.get("schema") if isinstance(report, dict) else None
    if not isinstance(schema, str) or not schema.startswith("vllm-sparse/"):
        raise FormatError(f"{path}: schema is {schema!r}; expected a vllm-sparse report.")
    return dict(report)
