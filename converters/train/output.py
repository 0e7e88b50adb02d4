"""Model directories that appear whole or not at all."""

import contextlib
import errno
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from converters.destination import check_not_mounted, check_parent, existing_parent, lock_file
from converters.sizes import size
from converters.train.write_errors import errno_of
from vllm_sparse.errors import UserError

logger = logging.getLogger(__name__)

_LOCK, _NEW, _OLD = "lock", "new", "old"
_FULL = (errno.ENOSPC, errno.EDQUOT)
# Of writing alone; others, such as a missing file, may be of what is read meanwhile.
_OTHER = (errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE)


@contextlib.contextmanager
def atomic_directory(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder to fill; rename it to ``target`` if the block succeeds.

    It lies in a hidden sibling on the same file system, so the rename is atomic. On any error, Ctrl-C
    included, it is deleted and ``target`` is as before; after a kill :func:`clear_leftovers` sees to that.
    Where ``target`` is a link, what it points to is replaced.

    Raises:
        UserError: ``target`` may not be replaced; see :func:`check_free`.
    """
    target = target.resolve()
    clear_leftovers(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = work_folder(target)
    work.mkdir(exist_ok=True)
    with lock_file(work / _LOCK, target):
        try:
            check_free(target, overwrite)
            (work / _NEW).mkdir()
            with told_when_full(target, "Nothing of it was left behind."):
                yield work / _NEW
            for path in (work / _NEW).rglob("*"):
                # safetensors writes files only their owner reads; a server often runs as somebody else.
                path.chmod(path.stat().st_mode | 0o044)
            if target.exists():
                os.replace(target, work / _OLD)
            os.replace(work / _NEW, target)
        finally:
            _settle(work, target)


@contextlib.contextmanager
def told_when_full(target: Path, kept: str) -> Iterator[None]:
    """Say why nothing could be written, above all that the disk is full, in place of what a library raises.

    Args:
        target: what is written in the block.
        kept: a sentence on what is there now.

    Raises:
        UserError: the disk of ``target`` is full, or the system refused a write for another reason.
    """
    try:
        yield
    except UserError:
        raise
    # torch.distributed.checkpoint's is no Exception.
    except BaseException as error:
        number = errno_of(error)
        if number not in (*_FULL, *_OTHER):
            raise
        raise UserError(_not_written(target, number, kept)) from error


def _not_written(target: Path, number: int, kept: str) -> str:
    """The message for a failed write; ``number`` is one of ``_FULL`` or ``_OTHER``."""
    if number in _FULL:
        said = f"could not be written, the disk is full: {size(_free_space(target))} are free there"
        todo = "Free some space or choose another disk"
    elif number == errno.EFBIG:
        said = (
            "could not be written: a file is larger than this process or its file system allows (ulimit -f)"
        )
        todo = "Raise the limit or choose another disk"
    else:
        said = f"could not be written: {os.strerror(number)}"
        todo = "Look at the disk or choose another one"
    return f"{target} {said}. {kept} {todo}; methods that train then go on with --resume."


def check_room(target: Path, needed: int) -> None:
    """Refuse, before any work is done, a disk that has not ``needed`` bytes left for ``target``.

    Raises:
        UserError: it has fewer.
    """
    free = _free_space(target)
    if free < needed:
        raise UserError(
            f"no space for {target}: its weights need {size(needed)}, and {size(free)} are free there; "
            "free some space or choose another --out"
        )


def _free_space(target: Path) -> int:
    return shutil.disk_usage(existing_parent(target)).free


def work_folder(target: Path) -> Path:
    """Where a model directory is made, and where what it replaces waits: a hidden sibling."""
    return target.parent / f".{target.name}.writing"


def clear_leftovers(target: Path) -> None:
    """Undo what a killed process left beside ``target``: as before it, or as after its last rename.

    Raises:
        UserError: another process is writing there now, or the folder is not one of ours.
    """
    target = target.resolve()
    work = work_folder(target)
    if not work.is_dir():
        return
    found = {path.name for path in work.iterdir()}
    # The lock is the first to come and the last to go.
    if found and (_LOCK not in found or found - {_LOCK, _NEW, _OLD}):
        raise UserError(
            f"{work} is needed as a working folder, but is somebody else's: it holds "
            f"{', '.join(sorted(found)[:3])}; move it away"
        )
    with lock_file(work / _LOCK, target):
        logger.warning("%s was left by a run that was killed; removed", work)
        _settle(work, target)


def _settle(work: Path, target: Path) -> None:
    """Put back what is not replaced yet and remove the working folder, its lock last."""
    if (work / _OLD).exists() and not target.exists():
        os.replace(work / _OLD, target)
    for name in (_NEW, _OLD):
        shutil.rmtree(work / name, ignore_errors=True)
    if {path.name for path in work.iterdir()} <= {_LOCK}:
        (work / _LOCK).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the next process may be at it already
            work.rmdir()


def check_free(target: Path, overwrite: bool = False, source: Path | None = None) -> None:
    """Refuse a target that holds something, before any work is done.

    Args:
        target: where a model directory shall appear.
        overwrite: replace a model directory that is there, and nothing else.
        source: the model that is read, which must not go with what is replaced.

    Raises:
        UserError: the target exists, is not an empty folder, and ``overwrite`` is false; or it is no model
            directory; or ``source`` is it or lies in it; or something is mounted there; or nothing can be
            made there.
    """
    check_not_mounted(target)
    check_parent(target, "--out")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise UserError(f"{target} already exists; choose another --out, or pass --overwrite to replace it")
    if not (target / "config.json").is_file():
        raise UserError(
            f"{target} is no model directory (it has no config.json), so --overwrite does not replace it; "
            "choose another --out, or remove it yourself"
        )
    if source is not None and target.resolve() == source.resolve():
        raise UserError(
            f"{target} is the model to be compressed, and --overwrite would replace it with the result; "
            "choose another --out"
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
