"""Limits that a process puts on itself before it opens a pickle: no network, no writing elsewhere.

Linux only, and only where the kernel allows it: a user namespace without network interfaces, and Landlock
for the file system. Memory, CPU time and file size limits work everywhere. What could not be had is
returned, so that it can be reported.
"""

import ctypes
import logging
import os
import resource
from pathlib import Path

logger = logging.getLogger(__name__)

_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000
# System call numbers are the same on every architecture for calls this new.
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_RULE_PATH_BENEATH = 1
_PR_SET_NO_NEW_PRIVS = 38
# Bits of Landlock's first version: execute, write file, and making or removing anything.
_WRITE_ACCESS = 0b1_1111_1111_0010
_EXECUTE = 0b1


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32)]


def set_limits(memory: int, seconds: int, file_bytes: int) -> None:
    """Bound address space, CPU time and the size of any file written; no core dumps."""
    for kind, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        limit = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (limit, limit))


def drop_network(libc: ctypes.CDLL) -> str | None:
    """Move into a namespace without network; the reason if that is not allowed here."""
    for flags in (_CLONE_NEWNET, _CLONE_NEWUSER | _CLONE_NEWNET):
        if libc.unshare(flags) == 0:
            return None
    return f"network namespace: {os.strerror(ctypes.get_errno())}"


def restrict_files(libc: ctypes.CDLL, writable: Path) -> str | None:
    """Allow writing below ``writable`` only, and executing nothing; the reason if it cannot be had here."""
    handled = ctypes.c_uint64(_WRITE_ACCESS | _EXECUTE)
    ruleset = libc.syscall(_LANDLOCK_CREATE_RULESET, ctypes.byref(handled), ctypes.sizeof(handled), 0)
    if ruleset < 0:
        return f"landlock: {os.strerror(ctypes.get_errno())}"
    folder = os.open(writable, os.O_PATH | os.O_DIRECTORY)
    try:
        rule = _PathBeneath(_WRITE_ACCESS, folder)
        for failed in (
            libc.syscall(_LANDLOCK_ADD_RULE, ruleset, _RULE_PATH_BENEATH, ctypes.byref(rule), 0),
            libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
            libc.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0),
        ):
            if failed:
                return f"landlock: {os.strerror(ctypes.get_errno())}"
    finally:
        os.close(folder)
        os.close(ruleset)
    return None


def enter(writable: Path, memory: int, seconds: int, file_bytes: int) -> list[str]:
    """Apply everything to this process.

    Args:
        writable: the only folder it may still write in.
        memory: bytes of address space.
        seconds: of CPU time.
        file_bytes: of one file.

    Returns:
        What this system did not allow, empty when all is in place.
    """
    set_limits(memory, seconds, file_bytes)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
    except OSError as error:
        return [f"no C library: {error}"]
    if not hasattr(libc, "unshare"):
        return ["not Linux"]
    return [reason for reason in (drop_network(libc), restrict_files(libc, writable)) if reason]
