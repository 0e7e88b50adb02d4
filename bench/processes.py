"""Process trees on Linux: who belongs to a server, how much memory they hold, how to end them all."""

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process, told apart from a later one with the same number by its start time (clock ticks)."""

    pid: int
    started: int

    def alive(self) -> bool:
        """Whether this very process still runs (a zombie does not)."""
        found = _stat(self.pid)
        return found is not None and found.state not in "ZX" and found.started == self.started


@dataclass(frozen=True, slots=True)
class _Stat:
    state: str
    parent: int
    session: int
    started: int
    cpu_ticks: int


def _stat(pid: int) -> _Stat | None:
    try:
        text = (_PROC / str(pid) / "stat").read_text()
    except OSError:
        return None
    # The command name is in parentheses and may hold anything, also spaces and parentheses.
    fields = text.rpartition(")")[2].split()
    return _Stat(
        fields[0], int(fields[1]), int(fields[3]), int(fields[19]), int(fields[11]) + int(fields[12])
    )


def family(leader: int) -> list[ProcessId]:
    """``leader``, all its descendants, and whoever else is in its session."""
    stats = {int(p.name): stat for p in _PROC.iterdir() if p.name.isdigit() and (stat := _stat(int(p.name)))}
    members = {pid for pid, stat in stats.items() if stat.session == leader or pid == leader}
    grown = True
    while grown:
        found = {pid for pid, stat in stats.items() if stat.parent in members} - members
        members |= found
        grown = bool(found)
    return [ProcessId(pid, stats[pid].started) for pid in sorted(members)]


def send_signal(processes: Iterable[ProcessId], number: signal.Signals) -> None:
    """Signal those that still run."""
    for process in processes:
        if process.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)


def wait_gone(processes: Iterable[ProcessId], timeout_s: float) -> list[ProcessId]:
    """Wait until all have ended; returns those that have not."""
    left = list(processes)
    deadline = time.monotonic() + timeout_s
    while left and time.monotonic() < deadline:
        left = [process for process in left if process.alive()]
        if left:
            time.sleep(0.05)
    return left


def memory_bytes(processes: Iterable[ProcessId]) -> int:
    """Proportional set size of all of them: shared pages are counted once."""
    total = 0
    for process in processes:
        try:
            text = (_PROC / str(process.pid) / "smaps_rollup").read_text()
        except OSError:
            continue
        for line in text.splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


def cpu_seconds(processes: Iterable[ProcessId]) -> float:
    """Processor time, user and system, that those which still run have used since their start."""
    found = [_stat(process.pid) for process in processes]
    return sum(stat.cpu_ticks for stat in found if stat is not None) / os.sysconf("SC_CLK_TCK")


def peak_memory_bytes(processes: Iterable[ProcessId]) -> int:
    """Sum of the highest resident set of each; an upper bound, as shared pages count several times."""
    total = 0
    for process in processes:
        try:
            text = (_PROC / str(process.pid) / "status").read_text()
        except OSError:
            continue
        for line in text.splitlines():
            if line.startswith("VmHWM:"):
                total += int(line.split()[1]) * 1024
    return total


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Hold back SIGINT, SIGTERM and SIGHUP: tidying up must not be cut short by a second Ctrl-C."""
    numbers = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
