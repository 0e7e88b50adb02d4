"""Is it flat? Growth of a series after warm-up, from medians that single peaks do not move."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.soak.watch import Sample

MIB = 2**20
MIN_SAMPLES = 8


@dataclass(frozen=True, slots=True)
class Limits:
    """What still counts as flat.

    Attributes:
        growth_percent: of resident memory between the first and the last quarter after warm-up.
        fds: descriptors more, at rest, than at rest after warm-up.
    """

    growth_percent: float = 2.0
    fds: int = 2


@dataclass(frozen=True, slots=True)
class Growth:
    """A series' course after warm-up.

    Attributes:
        first: median of its first quarter.
        last: median of its last quarter.
        per_hour: median of the slopes between samples half the series apart (Theil-Sen on such pairs).
    """

    first: float
    last: float
    per_hour: float

    @property
    def percent(self) -> float:
        """Growth from first to last quarter."""
        return 100 * (self.last - self.first) / self.first


def growth(samples: Sequence[Sample], name: str, warmup_s: float) -> Growth | None:
    """Growth of attribute ``name`` after ``warmup_s``; None with too few samples to say."""
    points = [(s.at_s, float(getattr(s, name))) for s in samples if s.at_s >= warmup_s]
    if len(points) < MIN_SAMPLES:
        return None
    quarter, half = len(points) // 4, len(points) // 2
    values = [value for _, value in points]
    pairs = zip(points, points[half:], strict=False)
    slopes = [(after - before) / (later - earlier) for (earlier, before), (later, after) in pairs]
    return Growth(
        statistics.median(values[:quarter]),
        statistics.median(values[-quarter:]),
        3600 * statistics.median(slopes),
    )


def cores_busy(samples: Sequence[Sample]) -> float | None:
    """CPU seconds of the server's processes per second between the first and the last sample."""
    if len(samples) < 2:
        return None
    first, last = samples[0], samples[-1]
    return round((last.cpu_s - first.cpu_s) / (last.at_s - first.at_s), 3)


def memory_block(samples: Sequence[Sample], warmup_s: float, limits: Limits) -> dict[str, Any]:
    """The report's verdict on resident memory."""
    found = growth(samples, "rss_bytes", warmup_s)
    if found is None:
        return {"ok": None, "reason": f"fewer than {MIN_SAMPLES} samples after warm-up: too short to say"}
    anonymous = growth(samples, "anonymous_bytes", warmup_s)
    return {
        "ok": found.percent <= limits.growth_percent,
        "first_quarter_mib": round(found.first / MIB, 1),
        "last_quarter_mib": round(found.last / MIB, 1),
        "growth_percent": round(found.percent, 2),
        "limit_percent": limits.growth_percent,
        "slope_mib_per_hour": round(found.per_hour / MIB, 2),
        "anonymous_slope_mib_per_hour": None if anonymous is None else round(anonymous.per_hour / MIB, 2),
    }


def fds_block(rested: Sample, ended: Sample, limits: Limits) -> dict[str, Any]:
    """The report's verdict on descriptors and threads, both times without a request in flight."""
    return {
        "ok": ended.fds - rested.fds <= limits.fds,
        "after_warmup": rested.fds,
        "at_end": ended.fds,
        "limit": limits.fds,
        "threads_after_warmup": rested.threads,
        "threads_at_end": ended.threads,
    }
