"""Timing GPU kernels: CUDA events around graph replays, over operands that no cache can hold.

A call is captured into a CUDA graph as often as there are copies of its operands, each call on the next copy,
so that launches cost what they cost in a served model and every weight comes from memory. Replays of the
competitors are interleaved; clock and temperature then treat them alike.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

# Operands of one round together fill the last-level cache this many times.
CACHE_MULTIPLE = 4
_CALLS_PER_GRAPH = 20
_BANDWIDTH_BYTES = 1 << 30


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call over the replays.

    Attributes:
        median: the figure to quote.
        best: the least disturbed replay.
    """

    median: float
    best: float


def copies_needed(operand_bytes: int, cache_bytes: int) -> int:
    """Copies of the operands that make one round overflow the cache; at least 2."""
    return max(2, -(-CACHE_MULTIPLE * cache_bytes // max(operand_bytes, 1)))


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def capture(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """Capture the calls, one after another; each runs once before, to compile and allocate."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def time_together(
    competitors: Mapping[str, Sequence[Callable[[], object]]], replays: int = 30
) -> dict[str, Timing]:
    """Time several ways to do one thing.

    Args:
        competitors: per name, the same call on each copy of its operands.
        replays: how often each graph is replayed, in turns.

    Returns:
        Per name, the time of one call.
    """
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    for name, calls in competitors.items():
        rounds = -(-_CALLS_PER_GRAPH // len(calls))
        repeated = [call for _ in range(rounds) for call in calls]
        graphs[name] = (capture(repeated), len(repeated))
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for turn in range(replays + 3):
        for name, (graph, calls_in_graph) in graphs.items():
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            if turn >= 3:  # the first turns warm up
                samples[name].append(1e3 * start.elapsed_time(stop) / calls_in_graph)
    return {name: Timing(statistics.median(times), min(times)) for name, times in samples.items()}


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of a device-to-device copy of 1 GiB, bytes read plus bytes written: the practical limit.

    The faster of two ways: ``copy_``, which a CUDA graph replays through the driver's copy path, and an
    elementwise kernel, which reads and writes as the products do and can be faster.
    """
    source = torch.zeros(_BANDWIDTH_BYTES // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    ways = {
        "copy": [lambda: target.copy_(source)],
        "kernel": [lambda: torch.bitwise_not(source, out=target)],
    }
    timings = time_together(ways, replays=10)
    return 2 * _BANDWIDTH_BYTES / min(timing.median for timing in timings.values()) / 1e3
