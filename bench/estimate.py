"""How long a planned measurement will take, roughly: for ``--dry-run``, before anything is started."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.runner import RunConfig, run
from bench.weights import checkpoint_bytes
from bench.workloads import WorkloadSpec
from vllm_sparse.errors import UserError

START_SECONDS = 40.0
"""Start of one server: imports, loading, profiling (seen: 20 to 60 s with models of this machine's size)."""
_STEP_OVERHEAD_S = 0.005
_PROBE = WorkloadSpec(num_requests=1, input_len=32, output_len=8, ignore_eos=True)


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds per prompt token and per decoding step, whatever the batch."""

    prompt_token_s: float
    step_s: float

    def seconds(self, requests: int, users: int, input_len: int, output_len: int) -> float:
        """Duration of a closed loop: users proceed in step, prompts share the arithmetic."""
        users = min(users, requests)
        turn = users * input_len * self.prompt_token_s + output_len * self.step_s
        return math.ceil(requests / users) * turn


def of_directory(directory: Path) -> Speed:
    """From the checkpoint's bytes and this processor's memory and arithmetic speed (not a GPU's).

    Every step reads the weights once; every prompt token multiplies and adds once per weight of two bytes.
    """
    size = checkpoint_bytes(directory)
    return Speed(size / _flops(), _STEP_OVERHEAD_S + size / _bandwidth())


def of_server(base_url: str, api_key: str | None = None, model: str | None = None) -> Speed | None:
    """From one short request; None when the server does not answer it."""
    config = RunConfig(
        base_url, model=model, workload=_PROBE, num_warmups=1, scrape=False, api_key=api_key, timeout_s=60
    )
    try:
        metrics = run(config).report["metrics"]
    except UserError:
        return None
    ttft, tpot = metrics["ttft_ms"]["p50"], metrics["tpot_ms"]["p50"]
    return None if ttft is None or tpot is None else Speed(ttft / 1000 / _PROBE.input_len, tpot / 1000)


def in_words(seconds: float) -> str:
    """A duration as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _bandwidth() -> float:
    """Bytes per second that one thread reads."""
    data = np.ones(2**24, dtype=np.float64)
    return data.nbytes / _shortest(lambda: data.sum())


def _flops() -> float:
    """Multiplications and additions per second of a float32 matrix product."""
    matrix = np.ones((1024, 1024), dtype=np.float32)
    return 2 * 1024**3 / _shortest(lambda: matrix @ matrix)


def _shortest(work: Callable[[], object]) -> float:
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)
