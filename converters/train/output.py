"""Model directories that appear whole or not at all."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_sparse.errors import UserError


@contextlib.contextmanager
def atomic_directory(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a hidden sibling folder to fill; rename it to ``target`` if the block succeeds.

    The sibling lies on the same file system, so the rename is atomic. On any error, Ctrl-C included, it
    is deleted and ``target`` is as before.

    Raises:
        UserError: ``target`` exists, is not an empty folder, and ``overwrite`` is false.
    """
    target = target.absolute()
    check_free(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.parent / f".{target.name}.partial-{os.getpid()}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        for path in staging.rglob("*"):
            # safetensors writes files only their owner reads; a server often runs as somebody else.
            path.chmod(path.stat().st_mode | 0o044)
        if target.exists():
            shutil.rmtree(target)
        os.replace(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_free(target: Path, overwrite: bool = False) -> None:
    """Refuse a target that holds something, before any work is done.

    Raises:
        UserError: it exists, is not an empty folder, and ``overwrite`` is false.
    """
    if target.exists() and not overwrite and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target} already exists; choose another --out, or pass --overwrite to replace it")


def to_json(value: Any) -> str:
    """JSON as commands print it."""
    return json.dumps(value, indent=2)


def write_json(path: Path, value: Any) -> None:
    """Readable JSON with a final newline, replaced atomically."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(to_json(value) + "\n", encoding="utf-8")
    os.replace(partial, path)
