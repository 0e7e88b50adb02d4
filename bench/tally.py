"""Running totals of a load test: what the display shows and what is pushed to Prometheus.

A flat array of integers, so that client processes can add theirs into shared memory and the sum of several
is again one.
"""

import bisect
from array import array
from collections.abc import Iterable, Sequence

from bench.records import NANOSECONDS, Outcome, RequestRecord

COUNTS = ("sent", "completed", "failed", "prompt_tokens", "output_tokens")
LATENCIES = ("ttft", "tpot", "e2e")
EDGES_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.4, 0.6, 0.8),
    *(1.0, 1.5, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0),
)
"""Upper bucket bounds of all latency histograms in seconds; the last bucket is open."""
_EDGES_NS = [round(edge * NANOSECONDS) for edge in EDGES_S]
_WIDTH = 1 + len(EDGES_S) + 1
SIZE = len(COUNTS) + len(LATENCIES) * _WIDTH


class Progress:
    """Totals so far; ``values`` is the flat form, :data:`SIZE` integers."""

    __slots__ = ("values",)

    def __init__(self, values: Iterable[int] | None = None) -> None:
        self.values = array("q", bytes(8 * SIZE) if values is None else values)

    @classmethod
    def sum_of(cls, parts: Sequence[Sequence[int]]) -> "Progress":
        """One out of several flat forms."""
        return cls(map(sum, zip(*parts, strict=True)))

    @property
    def sent(self) -> int:
        """Requests that left."""
        return self.values[0]

    @property
    def completed(self) -> int:
        """Requests answered completely."""
        return self.values[1]

    @property
    def failed(self) -> int:
        """Requests that failed or were cancelled."""
        return self.values[2]

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens of completed requests."""
        return self.values[3]

    @property
    def output_tokens(self) -> int:
        """Generated tokens of completed requests."""
        return self.values[4]

    @property
    def in_flight(self) -> int:
        """Requests sent and not yet answered."""
        return self.sent - self.completed - self.failed

    def histogram(self, latency: str) -> tuple[list[int], int]:
        """Counts per bucket (one more than :data:`EDGES_S`) and the sum in nanoseconds."""
        begin = len(COUNTS) + LATENCIES.index(latency) * _WIDTH
        return list(self.values[begin + 1 : begin + _WIDTH]), self.values[begin]

    def begin(self) -> None:
        """A request leaves."""
        self.values[0] += 1

    def end(self, record: RequestRecord) -> None:
        """A request is over; latencies of completed ones are counted."""
        values = self.values
        if record.outcome is not Outcome.COMPLETED:
            values[2] += 1
            return
        values[1] += 1
        values[3] += record.prompt_tokens or 0
        values[4] += record.output_tokens or 0
        sent, first, last = record.dispatched_ns, record.first_token_ns, record.last_token_ns
        if sent is None or last is None:
            return
        self._observe(2, last - sent)
        if first is not None:
            self._observe(0, first - sent)
            if record.output_tokens is not None and record.output_tokens > 1:
                self._observe(1, (last - first) // (record.output_tokens - 1))

    def _observe(self, latency: int, value_ns: int) -> None:
        begin = len(COUNTS) + latency * _WIDTH
        self.values[begin] += value_ns
        # A bucket holds what is less than or equal to its bound.
        self.values[begin + 1 + bisect.bisect_left(_EDGES_NS, value_ns)] += 1
