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
    is deleted and ``target`` is as before. Where ``target`` is a link, what it points to is replaced.

    Raises:
        UserError: ``target`` may not be replaced; see :func:`check_free`.
    """
    target = target.resolve()
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
        _put(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _put(staging: Path, target: Path) -> None:
    """Rename ``staging`` to ``target``; what is there steps aside first and is deleted last."""
    aside = target.parent / f".{target.name}.replaced-{os.getpid()}"
    if target.exists():
        os.replace(target, aside)
    try:
        os.replace(staging, target)
    except OSError:
        if aside.exists():
            os.replace(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def check_free(target: Path, overwrite: bool = False, source: Path | None = None) -> None:
    """Refuse a target that holds something, before any work is done.

    Args:
        target: where a model directory shall appear.
        overwrite: replace a model directory that is there, and nothing else.
        source: the model that is read, which must not go with what is replaced.

    Raises:
        UserError: the target exists, is not an empty folder, and ``overwrite`` is false; or it is no model
            directory; or ``source`` lies in it.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise UserError(f"{target} already exists; choose another --out, or pass --overwrite to replace it")
    if not (target / "config.json").is_file():
        raise UserError(
            f"{target} is no model directory (it has no config.json), so --overwrite does not replace it; "
            "choose another --out, or remove it yourself"
        )
    if source is not None and target.resolve() in source.resolve().parents:
        raise UserError(
            f"{target} holds the model {source}, which --overwrite would delete with it; choose another --out"
        )


def to_json(value: Any) -> str:
    """JSON as commands print it."""
    return json.dumps(value, indent=2)


def write_json(path: Path, value: Any) -> None:
    """Readable JSON with a final newline, replaced atomically."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(to_json(value) + "\n", encoding="utf-8")
    os.replace(partial, path)
