"""The server's own view of a run: its ``/metrics`` page, read before, during and after.

A background thread fetches the page and keeps only the lines of interest; parsing waits until the run is
over, so that it cannot delay the client's timestamps.
"""

import re
import threading
import time
import urllib.error
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.direct import open_url

GAUGES = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "kv_cache_usage",
}
COUNTERS = {
    "vllm:num_preemptions_total": "preemptions",
    "vllm:prompt_tokens_total": "prompt_tokens",
    "vllm:generation_tokens_total": "generation_tokens",
    "vllm:prefix_cache_queries_total": "prefix_cache_queries",
    "vllm:prefix_cache_hits_total": "prefix_cache_hits",
}
HISTOGRAMS = {
    "vllm:request_queue_time_seconds": "queue_time_ms",
    "vllm:time_to_first_token_seconds": "ttft_ms",
    "vllm:e2e_request_latency_seconds": "e2e_ms",
    "vllm:request_prefill_time_seconds": "prefill_time_ms",
    "vllm:request_decode_time_seconds": "decode_time_ms",
}
_LINE = re.compile(rb"^((?:vllm|vllm_sparse):\w+(?:\{[^\n]*\})? [^\s]+)", re.MULTILINE)
_SAMPLE = re.compile(r"^([\w:]+)(?:\{(.*)\})? (\S+)$")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')

Samples = list[tuple[str, dict[str, str], float]]


def fetch(base_url: str, timeout_s: float = 5.0) -> bytes | None:
    """The interesting lines of ``/metrics``; None when the server has no such page."""
    try:
        with open_url(base_url + "/metrics", timeout_s) as response:
            return b"\n".join(_LINE.findall(response.read()))
    except (urllib.error.URLError, OSError, ValueError):
        return None


def parse(page: bytes) -> Samples:
    """Samples of a page as (name, labels, value)."""
    samples: Samples = []
    for line in page.decode("utf-8", "replace").splitlines():
        match = _SAMPLE.match(line)
        if match:
            samples.append((match[1], dict(_LABEL.findall(match[2] or "")), float(match[3])))
    return samples


def total(samples: Samples, name: str) -> float | None:
    """Sum of a metric over its labels; None when it is not there."""
    values = [value for found, _, value in samples if found == name]
    return sum(values) if values else None


def plugin_weight_bytes(samples: Samples) -> dict[str, int]:
    """``vllm_sparse:weight_bytes`` by kind (``resident``, ``dense_equivalent``); empty without plugin."""
    return {
        labels["kind"]: int(value)
        for name, labels, value in samples
        if name == "vllm_sparse:weight_bytes" and "kind" in labels
    }


def kv_cache_tokens(samples: Samples) -> int | None:
    """KV cache size in tokens, from the labels of ``vllm:cache_config_info``."""
    for name, labels, _ in samples:
        blocks, size = labels.get("num_gpu_blocks", ""), labels.get("block_size", "")
        if name == "vllm:cache_config_info" and blocks.isdigit() and size.isdigit():
            return int(blocks) * int(size)
    return None


@dataclass(slots=True)
class Watch:
    """Samples ``/metrics`` while it is entered.

    Args:
        base_url: Server root.
        interval_s: Time between two readings.
    """

    base_url: str
    interval_s: float = 1.0
    pages: list[tuple[int, bytes]] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> "Watch":
        if self._read():
            self._thread = threading.Thread(target=self._loop, name="metrics-watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=10)
            self._read()

    def _read(self) -> bool:
        page = fetch(self.base_url)
        if page:
            self.pages.append((time.monotonic_ns(), page))
        return bool(page)

    def _loop(self) -> None:
        while not self._stop.wait(self.interval_s):
            self._read()

    def summary(self) -> dict[str, Any] | None:
        """Mean and highest gauges, increases of counters, means of histograms; None without page."""
        if len(self.pages) < 2:
            return None
        readings = [(moment, parse(page)) for moment, page in self.pages]
        first, last = readings[0][1], readings[-1][1]
        result: dict[str, Any] = {"readings": len(readings)}
        for name, short in GAUGES.items():
            values = [value for _, samples in readings if (value := total(samples, name)) is not None]
            if values:
                result[short] = {"mean": sum(values) / len(values), "max": max(values)}
        for name, short in COUNTERS.items():
            increase = _increase(first, last, name)
            if increase is not None:
                result[short] = increase
        for name, short in HISTOGRAMS.items():
            count, seconds = _increase(first, last, name + "_count"), _increase(first, last, name + "_sum")
            if count and seconds is not None:
                result[short] = {"mean": 1000 * seconds / count, "n": int(count)}
        result["kv_cache_tokens"] = kv_cache_tokens(last)
        result["weight_bytes"] = plugin_weight_bytes(last)
        return result


def _increase(first: Samples, last: Samples, name: str) -> float | None:
    after = total(last, name)
    return None if after is None else after - (total(first, name) or 0.0)


def ttft_gap_ms(summary: Mapping[str, Any] | None, client_mean_ms: float | None) -> float | None:
    """Client's mean TTFT minus the server's: network, HTTP and client; None when one is not known."""
    server = (summary or {}).get("ttft_ms")
    if server is None or client_mean_ms is None:
        return None
    return float(client_mean_ms - server["mean"])
