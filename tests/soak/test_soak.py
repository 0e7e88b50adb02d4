"""What counts as flat, as a failure, as a leak."""

import asyncio
import json
import time
from pathlib import Path

import pytest

from bench.client import Target
from bench.loopback import LoopbackServer, Script
from bench.soak.load import MIX, MixedLoad, Shape
from bench.soak.run import SoakConfig, error_lines
from bench.soak.verdict import MIB, Limits, cores_busy, fds_block, growth, memory_block
from bench.soak.watch import Sample, sample
from vllm_sparse.errors import UserError


def samples(rss: list[float], fds: int = 40) -> list[Sample]:
    return [Sample(10.0 * i, 3, int(r * MIB), int(r * MIB / 2), fds, 60) for i, r in enumerate(rss)]


def test_a_plateau_with_peaks_is_flat() -> None:
    course = [400.0 + 20 * i for i in range(20)] + [
        800.0 + (300 if i % 17 == 0 else i % 3) for i in range(80)
    ]
    block = memory_block(samples(course), 200.0, Limits())
    assert block["ok"] is True
    assert abs(block["growth_percent"]) < 0.5
    assert abs(block["slope_mib_per_hour"]) < 10


def test_a_slow_leak_is_found() -> None:
    course = [1000.0 + 0.5 * i for i in range(100)]  # 0.5 MiB every 10 s
    block = memory_block(samples(course), 200.0, Limits())
    assert block["ok"] is False
    assert block["slope_mib_per_hour"] == pytest.approx(180)
    assert block["growth_percent"] > 2


def test_too_short_to_say() -> None:
    assert growth(samples([1.0] * 7), "rss_bytes", 0.0) is None
    assert memory_block(samples([1.0] * 7), 0.0, Limits())["ok"] is None


def test_descriptors_at_rest() -> None:
    before, after = samples([1.0], fds=40)[0], samples([1.0], fds=43)[0]
    assert fds_block(before, before, Limits())["ok"] is True
    assert fds_block(before, after, Limits())["ok"] is False


def test_this_process_is_seen() -> None:
    import os

    found = sample(os.getpid(), 0.0)
    assert found.processes >= 1
    assert found.rss_bytes > 10 * MIB
    assert found.fds > 2


def test_processor_time_is_counted() -> None:
    import os

    before = sample(os.getpid(), 0.0)
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    after = sample(os.getpid(), 0.0)
    assert after.cpu_s - before.cpu_s >= 0.15
    assert cores_busy([before, after]) > 0
    assert cores_busy([before]) is None


@pytest.mark.parametrize(
    ("field", "value"), [("minutes", 0.0), ("users", 0), ("max_len", 64), ("rate", 0.0), ("rate", -1.0)]
)
def test_bad_settings(field: str, value: float) -> None:
    with pytest.raises(UserError, match=r"it must be|needs at least"):
        SoakConfig(Path("m"), **{field: value}).check()


class WordTokenizer:
    def __init__(self) -> None:
        self.allowed_ids = list(range(3, 200))

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


async def run_for(load: MixedLoad, seconds: float) -> None:
    await load.run(time.monotonic() + seconds)


async def run_until_all_kinds(load: MixedLoad) -> None:
    deadline = time.monotonic() + 120
    while set(load.tally.sent) != set(MIX):
        assert time.monotonic() < deadline
        await run_for(load, 1.0)


def test_every_kind_is_sent_and_counted() -> None:
    with LoopbackServer(Script(ttft_ms=1, gap_ms=1)) as server:
        load = MixedLoad(Target(server.base_url, "loopback"), WordTokenizer(), Shape(256), users=4)
        asyncio.run(run_until_all_kinds(load))
    tally = load.tally
    assert set(tally.sent) == set(MIX)
    # A server that takes a prompt beyond its limit fails the soak; everything else went well.
    assert set(tally.failed) == {"refused"}
    assert tally.failed["refused"] == tally.sent["refused"]
    assert "expected status 400" in tally.details[0]
    done = sum(tally.completed.values()) + tally.hung_up + sum(tally.failed.values())
    assert done == sum(tally.sent.values())


def test_a_rate_holds_for_all_users_together() -> None:
    with LoopbackServer(Script(ttft_ms=1, gap_ms=1)) as server:
        target = Target(server.base_url, "loopback")
        load = MixedLoad(target, WordTokenizer(), Shape(256), users=4, rate=5.0)
        asyncio.run(run_for(load, 2.0))
    # The first at once, then one every 0.2 s at the earliest; none is due at the very end.
    assert 2 <= sum(load.tally.sent.values()) <= 10


def test_a_dead_server_is_a_failure_not_a_flood() -> None:
    load = MixedLoad(Target("http://127.0.0.1:9", "m"), WordTokenizer(), Shape(256), users=2)
    asyncio.run(run_for(load, 2.5))
    assert 2 <= sum(load.tally.failed.values()) <= 10
    assert sum(load.tally.completed.values()) == 0


def test_errors_count_until_the_engine_was_stopped_as_asked() -> None:
    """vLLM's own race at its end is told apart; the same words before it are a dead engine."""
    stop = "INFO [core_client.py:775] [shutdown] MPClient: cleaning up background resources"
    dead = "(APIServer pid=1) ERROR 11-27 [async_llm.py:906] AsyncLLM output_handler failed."
    assert error_lines("\n".join(["INFO hello", stop, dead])) == ([], [dead])
    assert error_lines("\n".join([dead, stop, "INFO bye"])) == ([dead], [])
    assert error_lines("\n".join(["INFO hello", dead])) == ([dead], [])
    other = "(Worker pid=2) ERROR 11-27 [multiproc_executor.py:1] Worker failed."
    assert error_lines("\n".join([stop, dead, other])) == ([other], [dead])


@pytest.mark.slow
@pytest.mark.e2e
def test_a_short_soak_of_a_real_server(tmp_path: Path) -> None:
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "bench.soak", "--minutes", "0.5", "--out", str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=580,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "soak.json").read_text())
    assert report["schema"] == "vllm-sparse/soak/1"
    assert report["ok"] is True
    assert report["requests"]["failed"] == 0
    assert report["drain"]["with_all_tokens"] == report["drain"]["in_flight"] == 4
    assert report["plugin"]["vllm_sparse:layers sparse"] == 8
