"""Several load tests in a row: sweeps over rate or concurrency, and the highest rate within limits.

Every point is written to its own file as soon as it is measured. A sweep that is started again takes the
points that are there, provided they were measured with the same configuration and all requests were answered.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from bench import environment, output, probe
from bench.client import normalise_base_url
from bench.entries import is_complete
from bench.runner import RunConfig, run
from vllm_sparse.errors import UserError

SCHEMA = "vllm-sparse/bench-sweep/1"
MIN_REQUESTS = 8
MAX_DOUBLINGS = 12
_HALVINGS = 6
"""A search goes down to the first rate divided by two to that power."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class SweepConfig:
    """A sweep.

    Attributes:
        base: The load test that is repeated.
        by: ``request_rate`` or ``concurrency``.
        values: The points; for a search the first rate to try.
        directory: Where the points are kept.
        search: Look for the highest rate instead: doubled until the limits of ``base.goodput`` break,
            then bisected.
        attain: Share of requests that must keep the limits.
        precision: The search ends when the bracket is narrower than that share of the rate.
        seconds: Length of a point by rate: its number of requests is rate times seconds.
    """

    base: RunConfig
    by: str
    values: tuple[float, ...]
    directory: Path
    search: bool = False
    attain: float = 0.95
    precision: float = 0.05
    seconds: float | None = None

    def check(self) -> None:
        """Raise :class:`UserError` for a sweep that cannot be made."""
        self.base.check()
        if not self.values:
            raise UserError("a sweep needs --rates, --concurrencies or --search-from.")
        if any(not value > 0 for value in self.values):
            raise UserError(f"sweep values are {list(self.values)}; all must be positive.")
        bounded = self.search or self.seconds is not None or self.by == "concurrency"
        if bounded and any(math.isinf(value) for value in self.values):
            raise UserError("inf has no length and is no number of users; it goes with --rates alone.")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise UserError(f"--seconds is {self.seconds}; it must be positive.")
        if self.by == "concurrency" and any(value != int(value) for value in self.values):
            raise UserError(f"concurrencies are {list(self.values)}; they must be whole numbers.")
        if self.search and self.base.goodput is None:
            raise UserError("--search-from needs --goodput, for example ttft:500,tpot:100.")
        if not 0 < self.attain <= 1:
            raise UserError(f"--attain is {self.attain}; it must be above 0 and at most 1.")

    def point(self, value: float) -> RunConfig:
        """The load test of one point."""
        spec = self.base.workload
        if self.by == "concurrency":
            users = int(value)
            spec = replace(spec, num_requests=max(spec.num_requests, 2 * users))
            return replace(self.base, workload=spec, concurrency=users, request_rate=None)
        if self.seconds is not None:
            spec = replace(spec, num_requests=max(MIN_REQUESTS, round(value * self.seconds)))
        return replace(self.base, workload=spec, request_rate=value)


@dataclass(frozen=True, slots=True)
class PointPlan:
    """A point that is to be measured.

    Attributes:
        value: Its rate or number of users.
        requests: Measured requests.
        seconds: Of sending; None where the server decides how long it takes.
        kept: It has been measured already.
    """

    value: float
    requests: int
    seconds: float | None
    kept: bool


def plan(config: SweepConfig) -> list[PointPlan]:
    """The points of a sweep; of a search the first one."""
    return [_plan_point(config, value) for value in config.values]


def _plan_point(config: SweepConfig, value: float) -> PointPlan:
    requests = config.point(value).workload.num_requests
    seconds = requests / value if config.by == "request_rate" else None
    return PointPlan(value, requests, seconds, _kept(config, value, None) is not None)


def search_seconds(config: SweepConfig) -> tuple[float, float]:
    """Shortest and longest time of sending that a search can take, over all rates it may find."""
    first, totals = config.values[0], []
    for doublings in range(-_HALVINGS, MAX_DOUBLINGS + 1):
        points = [_plan_point(config, rate) for rate in _visited(config, 0.9 * first * 2**doublings)]
        totals.append(sum(point.seconds or 0.0 for point in points if not point.kept))
    return min(totals), max(totals)


def _visited(config: SweepConfig, limit: float) -> list[float]:
    """The rates that a search asks for when ``limit`` is the highest that holds."""
    rates: list[float] = []

    def holds(rate: float) -> bool:
        rates.append(rate)
        return rate <= limit

    _walk(config.values[0], config.precision, holds)
    return rates


def sweep(config: SweepConfig, say: Say) -> dict[str, Any]:
    """Measure all points and return the report.

    Args:
        config: What to measure.
        say: Told about every point.

    Raises:
        UserError: The configuration is wrong, or no server answers.
        KeyboardInterrupt: Ctrl-C; the points that are done are kept.
    """
    config.check()
    config.directory.mkdir(parents=True, exist_ok=True)
    served = config.base.model or _served(config.base)
    best: dict[str, Any] | None = None
    if config.search:
        points, best = _search(config, say, served)
    else:
        points = [_measure(config, value, say, served) for value in config.values]
    points.sort(key=lambda point: point["value"])
    return {
        "schema": SCHEMA,
        "config": {
            **config.base.as_json(),
            "model": points[0]["model"],
            "by": config.by,
            "search": config.search,
            "attain": config.attain,
        },
        "environment": {**environment.describe(), "command": environment.command_line()},
        "points": points,
        "best": None if best is None else {"value": best["value"], "attained": attained(best)},
        "ok": all(point["ok"] for point in points),
    }


def fingerprint(config: RunConfig) -> str:
    """Identifies a configuration; secrets and the number of client processes do not count."""
    facts = {**config.as_json(), "workers": None}
    return hashlib.sha256(orjson.dumps(facts, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


def _path(config: SweepConfig, value: float) -> Path:
    """Where a point is kept."""
    return config.directory / f"{config.by}-{value:g}-{fingerprint(config.point(value))}.json"


def _served(base: RunConfig) -> str | None:
    """The first model the server lists; None when it does not answer: what is kept can be used without it."""
    try:
        facts = probe.ask(normalise_base_url(base.base_url), base.api_key)
    except probe.UnreachableError:
        return None
    return facts.models[0] if facts.models else None


def _kept(config: SweepConfig, value: float, served: str | None) -> dict[str, Any] | None:
    """The report of a point that need not be measured again, of model ``served`` where that is known."""
    path = _path(config, value)
    if not path.is_file():
        return None
    report = output.read_report(path)
    same = served is None or report["config"]["model"] == served
    # What failed is worth another try.
    return report if same and is_complete(report) else None


def _measure(config: SweepConfig, value: float, say: Say, served: str | None) -> dict[str, Any]:
    point = config.point(value)
    path = _path(config, value)
    kept = _kept(config, value, served)
    if kept is not None:
        say(f"{config.by} {value:g}: taken from {path}")
        return _entry(value, kept)
    say(f"{config.by} {value:g}: {point.workload.num_requests} requests")
    result = run(point)
    if result.load.interrupted:
        raise KeyboardInterrupt
    output.write_json(result.report, path)
    return _entry(value, result.report)


def _entry(value: float, report: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "value": value,
        "model": report["config"]["model"],
        "requests": report["requests"],
        "metrics": report["metrics"],
        "validity": report["validity"],
        "ok": is_complete(report),
    }


def attained(point: Mapping[str, Any]) -> float:
    """Share of the planned requests of a point that kept all limits."""
    metrics = point["metrics"]
    good = metrics["goodput_rps"] * metrics["duration_s"]
    return float(good / point["requests"]["planned"])


def _search(
    config: SweepConfig, say: Say, served: str | None
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Double the rate until too few requests keep the limits, then bisect between the last two."""
    points: list[dict[str, Any]] = []

    def holds(rate: float) -> bool:
        points.append(_measure(config, rate, say, served))
        share = attained(points[-1])
        say(f"at {rate:g} requests/s {share:.1%} keep the limits")
        return share >= config.attain

    if not _walk(config.values[0], config.precision, holds):
        say(f"the limits hold even at {points[-1]['value']:g} requests/s; the search ends there")
        return points, points[-1]
    kept = [point for point in points if attained(point) >= config.attain]
    return points, max(kept, key=lambda point: point["value"], default=None)


def _walk(first: float, precision: float, holds: Callable[[float], bool]) -> bool:
    """Ask ``holds`` for one rate after the other; False when even the highest one held."""
    low, high = 0.0, first
    for _ in range(MAX_DOUBLINGS):
        if not holds(high):
            break
        low, high = high, 2 * high
    else:
        return False
    while high - low > precision * high:
        middle = float(f"{(low + high) / 2:.3g}")
        if middle in (low, high) or (low == 0 and middle < first / 2**_HALVINGS):
            break
        low, high = (middle, high) if holds(middle) else (low, middle)
    return True


def parse_values(text: str) -> tuple[float, ...]:
    """Numbers separated by commas."""
    words: Sequence[str] = [word.strip() for word in text.split(",") if word.strip()]
    try:
        return tuple(float(word) for word in words)
    except ValueError as error:
        raise UserError(f"{text!r}: expected numbers separated by commas, for example 1,2,4.") from error
