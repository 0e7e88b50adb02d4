"""Writes text and JSON files whole or not at all, with nothing but the standard library."""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from vllm_sparse.errors import UserError

STANDARD_OUTPUT = Path("-")


def check_writable(*paths: Path | None) -> None:
    """Make the parent folders now: a run of an hour must not end in a missing directory."""
    for path in paths:
        if path is None or path == STANDARD_OUTPUT:
            continue
        if path.is_dir():
            raise UserError(f"{path} is a directory; give a file name.")
        if path.exists() and not path.is_file():
            continue
        parent = path.resolve().parent
        parent.mkdir(parents=True, exist_ok=True)
        if not os.access(parent, os.W_OK):
            raise UserError(f"{parent} is not writable.")


def write_text(text: str | bytes, path: Path) -> None:
    """Write through a temporary file beside ``path``; ``-`` is standard output.

    What is there and is no file, such as /dev/null or a pipe, is written to and not replaced; of a link it is
    what the link points to.
    """
    data = text.encode() if isinstance(text, str) else text
    if path == STANDARD_OUTPUT:
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    path = path.resolve()
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise


def line_writer(stream: TextIO) -> Callable[[str], None]:
    """A function that writes one line at once, for progress."""

    def say(line: str) -> None:
        stream.write(line + "\n")
        stream.flush()

    return say


def write_document(document: Mapping[str, Any], path: Path | None) -> None:
    """Write plain values as JSON; ``-`` is standard output, None writes nothing."""
    if path is not None:
        write_text(json.dumps(document, indent=1) + "\n", path)
