"""Writes reports: JSON, CSV, HTML; files appear whole or not at all."""

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from bench.raw import write_csv as write_raw_csv
from vllm_sparse.errors import FormatError, UserError

STANDARD_OUTPUT = Path("-")


def check_writable(*paths: Path | None) -> None:
    """Make the parent folders now: a run of an hour must not end in a missing directory."""
    for path in paths:
        if path is None or path == STANDARD_OUTPUT:
            continue
        if path.is_dir():
            raise UserError(f"{path} is a directory; give a file name.")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise UserError(f"{path.parent} is not writable.")


def write_text(text: str | bytes, path: Path) -> None:
    """Write through a temporary file beside ``path``."""
    data = text.encode() if isinstance(text, str) else text
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise


def dump(report: Mapping[str, Any]) -> bytes:
    """JSON with numpy numbers and without nan (written as null)."""
    return orjson.dumps(report, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_INDENT_2) + b"\n"


def write_json(report: Mapping[str, Any], path: Path | None) -> None:
    """Write a report; ``-`` is standard output, None writes nothing."""
    if path is None:
        return
    if path == STANDARD_OUTPUT:
        sys.stdout.buffer.write(dump(report))
        sys.stdout.flush()
        return
    write_text(dump(report), path)


def write_csv(report: Mapping[str, Any], path: Path) -> None:
    """Per-request rows of a run report."""
    if report.get("raw") is None:
        raise UserError("--csv needs the per-request times; leave --raw at requests or chunks.")
    write_raw_csv(report["raw"], path)


def write_html(report: Mapping[str, Any], path: Path) -> None:
    """The page of a report."""
    from bench.report import render

    write_text(render(report), path)


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
