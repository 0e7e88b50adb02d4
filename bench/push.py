"""Pushes a run's own metrics to a Prometheus Pushgateway while it is on, so that a long soak can be watched.

A background thread pushes totals and latency histograms at an interval. The clients then run in processes of
their own, so that neither a slow gateway nor the thread delays a timestamp. A gateway that does not answer at
the start is an error; one that goes away later is counted, and the run goes on.
"""

import logging
import math
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bench.tally import EDGES_S, LATENCIES, Progress
from vllm_sparse.errors import UserError

PREFIX = "vllm_sparse_bench"
JOB = "vllm-sparse-bench"
QUANTILES = (50, 90, 95, 99)
_TITLES = {
    "ttft": "Sent to first token.",
    "tpot": "Time per output token after the first.",
    "e2e": "Sent to last token.",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PushConfig:
    """Where and how often.

    Attributes:
        url: Address of the gateway, for example ``http://127.0.0.1:9091``.
        labels: Grouping labels beside the job; a later push with the same ones replaces the earlier.
        interval_s: Time between two pushes.
        timeout_s: Longest time one push may take.
    """

    url: str
    labels: Mapping[str, str]
    interval_s: float = 5.0
    timeout_s: float = 5.0

    def check(self) -> None:
        """Raise :class:`UserError` for settings that cannot work."""
        if not self.interval_s > 0:
            raise UserError(f"--push-interval is {self.interval_s}; it must be positive, in seconds.")
        for name in self.labels:
            if not name.isidentifier() or name == "job" or name.startswith("__"):
                raise UserError(
                    f"--push-label {name!r}: label names are letters, digits and _, and not `job`."
                )


def parse_labels(words: list[str]) -> dict[str, str]:
    """Labels of ``NAME=VALUE`` words."""
    labels = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not value:
            raise UserError(f"--push-label {word!r}: expected NAME=VALUE.")
        labels[name] = value
    return labels


class Pusher:
    """Pushes while it is entered; :meth:`update` gives it the newest totals.

    Raises:
        UserError: On entering, when the gateway does not take the first push.
    """

    def __init__(self, config: PushConfig, model: str, planned: int) -> None:
        from prometheus_client import CollectorRegistry

        config.check()
        self._config = config
        self._model = model
        self._progress = Progress()
        self._planned = planned
        self._final: Mapping[str, Any] | None = None
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.pushed = 0
        self.failures: list[str] = []

    def __enter__(self) -> "Pusher":
        problem = self._push()
        if problem is not None:
            raise UserError(
                f"no Pushgateway at {self._config.url} ({problem}). Start one, or correct --push."
            )
        self._thread = threading.Thread(target=self._loop, name="metrics-push", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=2 * self._config.timeout_s)
            self._push()

    def update(self, progress: Progress) -> None:
        """Take the newest totals."""
        self._progress = progress

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """Take the final figures (the ``metrics`` block); they go out with the last push."""
        self._final = metrics

    def collect(self) -> Iterator[Any]:
        """What prometheus-client asks of a collector."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        progress = Progress(self._progress.values)
        yield GaugeMetricFamily(f"{PREFIX}_requests_planned", "Requests of this run.", value=self._planned)
        yield GaugeMetricFamily(
            f"{PREFIX}_requests_in_flight", "Sent and not answered.", value=progress.in_flight
        )
        requests = CounterMetricFamily(f"{PREFIX}_requests", "Requests that are over.", labels=["outcome"])
        requests.add_metric(["completed"], progress.completed)
        requests.add_metric(["failed"], progress.failed)
        yield requests
        tokens = CounterMetricFamily(f"{PREFIX}_tokens", "Tokens of completed requests.", labels=["kind"])
        tokens.add_metric(["prompt"], progress.prompt_tokens)
        tokens.add_metric(["output"], progress.output_tokens)
        yield tokens
        for latency in LATENCIES:
            counts, total_ns = progress.histogram(latency)
            family = HistogramMetricFamily(f"{PREFIX}_{latency}_seconds", _TITLES[latency])
            family.add_metric([], _cumulative(counts), total_ns / 1e9)
            yield family
        yield from self._final_families()

    def _final_families(self) -> Iterator[Any]:
        from prometheus_client.core import GaugeMetricFamily

        if self._final is None:
            return
        for latency in (*LATENCIES, "itl"):
            summary = self._final[f"{latency}_ms"]
            family = GaugeMetricFamily(
                f"{PREFIX}_final_{latency}_seconds", "Percentiles of the finished run.", labels=["quantile"]
            )
            for percent in QUANTILES:
                if summary[f"p{percent}"] is not None:
                    family.add_metric([f"{percent / 100:g}"], summary[f"p{percent}"] / 1000)
            yield family
        for name in ("output_tokens_per_s", "requests_per_s", "goodput_rps"):
            if self._final[name] is not None:
                yield GaugeMetricFamily(
                    f"{PREFIX}_final_{name}", "Of the finished run.", value=self._final[name]
                )

    def _loop(self) -> None:
        while not self._stop.wait(self._config.interval_s):
            self._push()

    def _push(self) -> str | None:
        """Push once; returns what went wrong."""
        from prometheus_client import push_to_gateway

        try:
            push_to_gateway(
                self._config.url,
                job=JOB,
                registry=self._registry,
                grouping_key={"model": self._model, **self._config.labels},
                timeout=self._config.timeout_s,
            )
        except (OSError, ValueError) as error:
            problem = str(getattr(error, "reason", None) or error)
            self.failures.append(problem)
            logger.warning("push to %s failed: %s", self._config.url, problem)
            return problem
        self.pushed += 1
        return None

    def warning(self) -> list[str]:
        """A sentence for the report when pushes were lost."""
        if not self.failures:
            return []
        return [f"{len(self.failures)} pushes to {self._config.url} failed; the last: {self.failures[-1]}."]


def _cumulative(counts: list[int]) -> list[tuple[str, float]]:
    """Buckets in Prometheus' form: all that is at or below each bound."""
    total, buckets = 0, []
    for edge, count in zip((*EDGES_S, math.inf), counts, strict=True):
        total += count
        buckets.append(("+Inf" if math.isinf(edge) else repr(edge), float(total)))
    return buckets
