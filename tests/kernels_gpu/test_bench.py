"""The GPU kernel table's arithmetic, with a clock that is told the times."""

import json
import sys

import pytest
import torch

from bench import cuda_timing, kernels_cli, kernels_cuda
from bench.cuda_timing import Timing, copies_needed
from bench.kernels_cuda import FORMATS, make_spec, measure, random_weight
from vllm_sparse import sparse24
from vllm_sparse.errors import UnsupportedError
from vllm_sparse.kernels.base import WeightFormat
from vllm_sparse.kernels.reference import check_canonical

CPU = torch.device("cpu")


def told(times):
    """A timer that runs each competitor once and returns the times it was told."""

    def timer(calls):
        for competitor in calls.values():
            competitor[0]()
        return {name: Timing(times[name], times[name] * 0.9) for name in calls}

    return timer


def test_ratios_bandwidth_and_missing_backends():
    spec = make_spec("bf16", 64, 128)
    timer = told({"reference": 2.0, "cublas 16-bit": 3.0})
    rows = measure("bf16", spec, 4, CPU, 100.0, 1024, ("reference", "triton"), timer)
    by_name = {row.backend: row for row in rows}
    ours = by_name["reference"]
    assert ours.us == 2.0
    assert ours.gbs == pytest.approx(64 * 128 * 9 / 8 / 2.0 / 1e3)
    assert ours.limit_fraction == pytest.approx(ours.gbs / 100)
    assert ours.ratio_vs_best_dense == ours.ratio_vs_vllm_dense == 1.5
    assert by_name["cublas 16-bit"].ratio_vs_best_dense == 1.0
    assert by_name["triton"].us is None
    assert "weight is on the CPU" in by_name["triton"].note


def test_a_dense_kernel_that_is_not_here_is_a_note(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    rows = measure(
        "int4-g128",
        make_spec("int4-g128", 64, 256),
        1,
        CPU,
        100.0,
        1024,
        ("reference",),
        told({"reference": 1.0, "cublas 16-bit": 4.0}),
    )
    by_name = {row.backend: row for row in rows}
    assert by_name["vllm marlin int4"].us is None
    assert by_name["vllm marlin int4"].note
    assert by_name["reference"].ratio_vs_best_dense == 4.0
    assert by_name["reference"].ratio_vs_vllm_dense is None


@pytest.mark.parametrize("name", list(FORMATS))
def test_random_weights_are_well_formed(name):
    spec = make_spec(name, 32, 256)
    weight = random_weight(spec, CPU)
    check_canonical(spec, weight)
    if spec.weight is WeightFormat.BF16:
        assert sparse24.is_24(sparse24.decompress(weight.values, weight.bitmask))


def test_unknown_formats_are_refused():
    with pytest.raises(UnsupportedError, match="int4-g128"):
        make_spec("int3", 8, 8)


def test_operands_overflow_the_cache():
    assert copies_needed(10 << 20, 50 << 20) == 20
    assert copies_needed(1 << 30, 50 << 20) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert kernels_cuda.main([]) == 2
    assert "no NVIDIA GPU" in capsys.readouterr().err


def test_bench_kernels_measures_the_gpu_where_there_is_one(monkeypatch, tmp_path):
    asked = {}

    def table(shapes, tokens, formats, progress):
        asked.update(shapes=shapes, tokens=tokens, formats=formats)
        progress("a line")
        return {"schema": kernels_cuda.SCHEMA, "rows": []}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels_cuda, "table", table)
    out = tmp_path / "t.json"
    kernels_cli.kernels_command(
        shapes="64x128", m="1,8", formats="bf16", repeats=3, threads=None, quick=False, json=out
    )
    assert asked == {"shapes": [(64, 128)], "tokens": [1, 8], "formats": ["bf16"]}
    assert json.loads(out.read_text())["schema"] == "vllm-sparse/bench-kernels/1"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_times_are_plausible():
    device = torch.device("cuda")
    bandwidth = cuda_timing.copy_bandwidth(device)
    assert 50 < bandwidth < 20_000
    rows = measure(
        "bf16", make_spec("bf16", 4096, 4096), 1, device, bandwidth, cuda_timing.cache_bytes(device)
    )
    assert all(0 < row.limit_fraction < 1.2 for row in rows if row.us is not None)
