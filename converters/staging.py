"""A folder that appears whole or not at all, and whose making can be taken up again after a kill."""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from converters.destination import check_not_mounted, check_parent, lock_file
from converters.sizes import size
from vllm_sparse.errors import UserError

logger = logging.getLogger(__name__)

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
JOURNAL = "conversion-journal.json"
_LOCK = "conversion.lock"
# Of the partial folder itself, and gone in the end.
OWN_FILES = (JOURNAL, _LOCK)


class Staging:
    """A hidden sibling of the destination with a journal of the files that are finished.

    Args:
        destination: the folder to make; it must not exist, or be empty.
        fingerprint: identifies source and options; a partial of another conversion is not taken up.
        resume: take up a matching partial; otherwise any partial is thrown away.

    Raises:
        UserError: the destination is not free, or another process is at work on it.
    """

    def __init__(self, destination: Path, fingerprint: str, resume: bool) -> None:
        check_free(destination)
        # A link to a folder cannot be replaced by one; what it names can.
        self.destination = Path(os.path.realpath(destination))
        self.path = partial_path(self.destination)
        self._made = [parent for parent in self.destination.parents if not parent.exists()]
        self.destination.parent.mkdir(parents=True, exist_ok=True)
        self.path.mkdir(exist_ok=True)
        self._lock = lock_file(self.path / _LOCK, self.destination)
        self._recording = threading.Lock()
        self.journal: dict[str, Any] = {"fingerprint": fingerprint, "files": {}}
        self.resumed = False
        found = self._read_journal()
        if resume and found.get("fingerprint") == fingerprint:
            self.journal, self.resumed = found, True
            # What is not recorded may be half-written, and must not be taken for a part of the result.
            self._clear(keep={JOURNAL, *found["files"]})
        else:
            if resume and found:
                logger.warning("the partial conversion is of another source or options; starting over")
            self._clear()
            self._save_journal()

    def _read_journal(self) -> dict[str, Any]:
        try:
            found = json.loads((self.path / JOURNAL).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        return found if isinstance(found, dict) and isinstance(found.get("files"), dict) else {}

    def _save_journal(self) -> None:
        write_file(self.path / JOURNAL, json.dumps(self.journal).encode())

    def _clear(self, keep: Collection[str] = ()) -> None:
        for path in self.path.iterdir():
            if path.name != _LOCK and path.name not in keep:
                path.unlink()

    def note(self, key: str, value: Any) -> None:
        """Remember a fact about the conversion for a later resume."""
        self.journal[key] = value
        self._save_journal()

    def finished(self, name: str) -> Mapping[str, Any] | None:
        """The journal's record of a finished file whose bytes still have the recorded hash."""
        record = self.journal["files"].get(name)
        path = self.path / name
        if record is None or not path.is_file() or path.stat().st_size != record["bytes"]:
            return None
        with path.open("rb") as file:
            same = hashlib.file_digest(file, "sha256").hexdigest() == record["sha256"]
        return record if same else None

    def record(self, name: str, sha256: str, nbytes: int, **facts: Any) -> None:
        """Note, from any thread, that a file is complete and on disk."""
        with self._recording:
            self.journal["files"][name] = {"sha256": sha256, "bytes": nbytes, **facts}
            self._save_journal()

    def commit(self) -> None:
        """Make the folder appear under its name."""
        for name in OWN_FILES:
            (self.path / name).unlink(missing_ok=True)
        _sync_folder(self.path)
        os.replace(self.path, self.destination)
        _sync_folder(self.destination.parent)
        self._lock.close()

    def leave(self) -> None:
        """Keep what is done for a later resume, by this process too."""
        self._lock.close()

    def discard(self) -> None:
        """Leave no trace."""
        self._lock.close()
        shutil.rmtree(self.path, ignore_errors=True)
        # Nearest first; one that somebody else uses by now stays, and with it those above.
        with contextlib.suppress(OSError):
            for parent in self._made:
                parent.rmdir()


def partial_path(destination: Path) -> Path:
    """Where an unfinished conversion to ``destination`` is kept."""
    return destination.parent / f".{destination.name}.partial"


def check_free(destination: Path) -> None:
    """Refuse a destination that holds something.

    Raises:
        UserError: it exists and is not an empty folder, or something is mounted there, or nothing can be
            made there.
    """
    check_not_mounted(destination)
    check_parent(destination, "destination")
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise UserError(f"{destination} already exists; choose another destination or remove it")


@contextlib.contextmanager
def discarded_on_error(staging: Staging) -> Iterator[Staging]:
    """Remove the partial when the block fails; keep it when it is interrupted, for a resume.

    Raises:
        UserError: instead of the operating system's error when the disk is full.
    """
    keep = False
    try:
        yield staging
        keep = True
    except (KeyboardInterrupt, SystemExit):
        keep = True
        staging.leave()
        logger.warning("interrupted; %s keeps what is done, --resume continues it", staging.path)
        raise
    except UserError:
        # A limit set too low or a disk too full is no reason to lose what an earlier run has done.
        if staging.resumed:
            keep = True
            staging.leave()
            logger.warning("%s keeps what was done before", staging.path)
        raise
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        staging.discard()
        if error.errno == errno.EFBIG:
            raise UserError(
                f"a file of {staging.destination} is larger than this process or its file system allows "
                "(ulimit -f). Nothing was left behind; raise the limit or choose another disk."
            ) from error
        folder = next(parent for parent in staging.destination.parents if parent.exists())
        free = shutil.disk_usage(folder).free
        raise UserError(
            f"no space left for {staging.destination}: {size(free)} are free there. Nothing was left "
            "behind; free some space or choose another disk."
        ) from error
    finally:
        if not keep:
            staging.discard()


def write_file(path: Path, data: bytes) -> None:
    """Write a small file whole: temporary name, sync, rename."""
    partial = path.with_name(path.name + ".tmp")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
