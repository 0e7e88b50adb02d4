"""The place where a finished folder shall appear: nothing mounted there, nobody else at work on it."""

import fcntl
import os
import re
from pathlib import Path
from typing import BinaryIO

from vllm_sparse.errors import UserError

_MOUNTS = Path("/proc/self/mountinfo")


def lock_file(path: Path, destination: Path) -> BinaryIO:
    """Take the lock ``path`` of work on ``destination``; closing the file, or the process's end, frees it.

    Raises:
        UserError: another process has it.
    """
    busy = UserError(f"another process is writing {destination}; wait for it")
    try:
        lock = path.open("wb")
    except FileNotFoundError as error:  # it has just finished, and its folder is gone
        raise busy from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A lock that was deleted before it could be taken keeps nobody out.
        if path.stat().st_ino == os.fstat(lock.fileno()).st_ino:
            return lock
    except OSError as error:
        lock.close()
        raise busy from error
    lock.close()
    raise busy


def existing_parent(destination: Path) -> Path:
    """The nearest thing above ``destination``, links resolved, that is there."""
    return next(parent for parent in destination.resolve().parents if parent.exists())


def check_parent(destination: Path, choose: str) -> None:
    """Refuse a place where nothing can be made, before any work is done.

    Args:
        destination: where a folder shall appear.
        choose: what to choose another of, for the message.

    Raises:
        UserError: what is above it is no folder, or may not be written to.
    """
    parent = existing_parent(destination)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        what = "may not be written to" if parent.is_dir() else "is no folder"
        raise UserError(f"cannot make {destination}: {parent} {what}; choose another {choose}")


def mount_points() -> list[Path]:
    """Where something is mounted, as this process sees it; empty where the system does not tell."""
    try:
        lines = os.fsdecode(_MOUNTS.read_bytes()).removesuffix("\n").split("\n")
    except OSError:
        return []
    # Spaces, tabs, line breaks and backslashes are written as octal numbers, proc_pid_mountinfo(5).
    return [
        Path(re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), line.split(" ")[4])) for line in lines
    ]


def check_not_mounted(destination: Path) -> None:
    """Refuse a destination that no folder can take the place of, or that would take a mount with it.

    Bind mounts of the same file system are seen, too.

    Raises:
        UserError: something is mounted on it or in it.
    """
    real = Path(os.path.realpath(destination))
    mounts = mount_points()
    if real.is_mount() or real in mounts:
        raise UserError(
            f"{destination} is a mount point, which no finished folder can take the place of; choose a "
            f"destination inside it, for example {destination / 'model'}"
        )
    inside = next((mount for mount in mounts if real in mount.parents), None)
    if inside is not None:
        raise UserError(
            f"{inside} is a mount point inside {destination}, which therefore cannot be replaced; choose "
            "another destination, or unmount it"
        )
