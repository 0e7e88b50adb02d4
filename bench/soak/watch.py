"""What a server's processes hold: resident memory, file descriptors, threads; sampled from /proc."""

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import processes

_FIELDS = {"VmRSS:": "rss_bytes", "RssAnon:": "anonymous_bytes", "Threads:": "threads"}


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at all processes of a server, summed.

    Attributes:
        at_s: seconds since the start of the soak.
        rss_bytes: resident sets; pages that processes share count once for each.
        anonymous_bytes: the part that is not backed by files, where leaks are.
        fds: open file descriptors.
        cpu_s: processor time used since their start.
    """

    at_s: float
    processes: int
    rss_bytes: int
    anonymous_bytes: int
    fds: int
    threads: int
    cpu_s: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """For the report."""
        return {**asdict(self), "at_s": round(self.at_s, 1), "cpu_s": round(self.cpu_s, 2)}


def sample(leader: int, started: float) -> Sample:
    """Look at process ``leader`` and its family now; ``started`` is a :func:`time.monotonic` reading."""
    sums = dict.fromkeys(_FIELDS.values(), 0)
    fds = seen = 0
    members = processes.family(leader)
    for process in members:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            fds += len(os.listdir(f"/proc/{process.pid}/fd"))
        except OSError:
            continue
        seen += 1
        for line in status.splitlines():
            name, *rest = line.split()
            if name in _FIELDS:
                sums[_FIELDS[name]] += int(rest[0]) * (1024 if rest[1:] else 1)
    return Sample(time.monotonic() - started, seen, fds=fds, cpu_s=processes.cpu_seconds(members), **sums)
