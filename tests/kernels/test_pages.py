"""Memory of packed weights: whole 2 MB pages, which small weights share."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vllm_sparse.kernels import library
from vllm_sparse.kernels.cpu import CpuBackend

pytestmark = pytest.mark.skipif(library.load_failure() is not None, reason="the CPU kernels were not built")
HUGE = 2 << 20


def settled(values: torch.Tensor) -> torch.Tensor:
    return CpuBackend().settle(values)


@pytest.mark.parametrize("size", [0, 1, 4095, 3 << 20, 40 << 20])
def test_a_settled_weight_is_the_same_and_its_own(size):
    values = torch.randint(0, 256, (size,), dtype=torch.uint8)
    before = values.clone()
    one, other = settled(values), settled(values)
    other.zero_()
    assert torch.equal(one, before)
    assert torch.equal(values, before)
    assert one.dtype == torch.uint8
    assert one.data_ptr() % 4096 == 0 or size == 0


def test_large_weights_start_on_a_page():
    assert settled(torch.zeros(40 << 20, dtype=torch.uint8)).data_ptr() % HUGE == 0


def test_joining_pages_changes_nothing_else():
    values = torch.randint(0, 256, (9_000_000,), dtype=torch.uint8)
    before = values.clone()
    torch.ops.vllm_sparse.join_pages(values[1_000_000:7_000_000])
    assert torch.equal(values, before)


def test_every_byte_of_small_weights_may_be_on_a_large_page():
    weights = [settled(torch.ones(2_400_000, dtype=torch.uint8)) for _ in range(50)]
    advised = list(advised_ranges())
    for weight in weights:
        start, end = weight.data_ptr(), weight.data_ptr() + weight.nbytes
        assert any(low <= start and end <= high for low, high in advised)


def advised_ranges() -> Iterator[tuple[int, int]]:
    """Address ranges for which 2 MB pages were asked for, neighbours joined; whole pages only."""
    low = high = 0
    joined: list[tuple[int, int]] = []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if header := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            low, high = (int(text, 16) for text in header.groups())
        elif line.startswith("VmFlags:") and "hg" in line.split():
            if joined and joined[-1][1] == low:
                low = joined.pop()[0]
            joined.append((low, high))
    for low, high in joined:
        yield -(-low // HUGE) * HUGE, high // HUGE * HUGE
