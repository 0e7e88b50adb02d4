"""Tokens in the lanes of vectors, for any number of tokens: AVX2 and AVX-512 BF16."""

import pytest
import torch

from vllm_sparse.kernels import library
from vllm_sparse.kernels.base import ActivationQuant, WeightFormat
from vllm_sparse.kernels.cpu import CpuBackend

from .conftest import LEVELS, assert_close_to_exact, float_layer, quantized_layer

pytestmark = pytest.mark.skipif("avx2_lanes" not in LEVELS, reason="needs AVX2, and the kernels to be built")
BACKEND = CpuBackend()
DTYPES = [torch.bfloat16, torch.float16]
KINDS = range(7)
INT4_A8 = 6
# So few tokens are for the loops.
FEW = 4


@pytest.fixture(params=[level for level in LEVELS if level.endswith("lanes")])
def lanes(request):
    before = library.current_isa().name.lower()
    library.set_isa(request.param)
    yield request.param
    library.set_isa(before)


def tokens(m, k, dtype=torch.bfloat16):
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [9, 48, 49, 193, 401])
def test_more_tokens_than_a_tile_or_a_round_holds(lanes, threads, m, dtype, count):
    threads(count)
    layer = float_layer(203, 1100, dtype)
    packed = BACKEND.pack(layer.spec, layer.weight).packed
    x, bias = tokens(m, 1100, dtype), torch.randn(203).to(dtype)
    assert_close_to_exact(BACKEND.linear(layer.spec, x, packed, None, bias), x, layer.dense, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "group", "quant"),
    [
        (WeightFormat.INT8, None, ActivationQuant.NONE),
        (WeightFormat.FP8_E4M3, None, ActivationQuant.NONE),
        (WeightFormat.INT4, 32, ActivationQuant.NONE),
        (WeightFormat.INT4, None, ActivationQuant.NONE),
        (WeightFormat.INT8, None, ActivationQuant.INT8_PER_TOKEN),
        (WeightFormat.INT4, None, ActivationQuant.INT8_PER_TOKEN),
        (WeightFormat.INT4, 64, ActivationQuant.INT8_PER_TOKEN),
        (WeightFormat.INT4, 192, ActivationQuant.INT8_PER_TOKEN),
        (WeightFormat.INT4, 96, ActivationQuant.INT8_PER_TOKEN),  # not whole blocks: the loops themselves
    ],
)
def test_other_formats_agree_with_the_loops(lanes, kind, group, quant, dtype):
    """The same sums in another order; integers are the same to the bit."""
    spec, weight, _ = quantized_layer(kind, 72, 1152, dtype, group, quant)
    packed = BACKEND.pack(spec, weight)
    x = tokens(203, 1152, dtype)
    ours = BACKEND.linear(spec, x, packed.packed, packed.scale, None)
    library.set_isa("avx512bf16" if lanes == "avx512bf16_lanes" else "avx2")
    parts = [BACKEND.linear(spec, part, packed.packed, packed.scale, None) for part in x.split(FEW)]
    loops = torch.cat(parts)
    if quant is not ActivationQuant.NONE and (group is None or group % 64):
        assert torch.equal(ours, loops)
    largest = float(loops.float().abs().max())
    assert float((ours.float() - loops.float()).abs().max()) < 2.0**-7 * largest
    if lanes != "avx2_lanes" or group is None or quant is not ActivationQuant.NONE:
        # Elsewhere few tokens multiply weights that are not rounded to 16 bits after they are scaled.
        assert float((ours != loops).float().mean()) < 0.02


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_tokens_that_are_not_finite_do_as_with_dense_weights_and_leave_the_others_alone(lanes, value):
    layer = float_layer(64, 256, torch.bfloat16)
    packed = BACKEND.pack(layer.spec, layer.weight).packed
    x = tokens(100, 256)
    plain = BACKEND.linear(layer.spec, x, packed, None, None)
    x[37, 130] = value
    out = BACKEND.linear(layer.spec, x, packed, None, None)
    dense = x[37].float() @ layer.dense.float().T
    assert torch.equal(out[37].isnan(), dense.isnan())
    assert torch.equal(out[37].isinf(), dense.isinf())
    others = torch.arange(100) != 37
    assert torch.equal(out[others], plain[others])


def test_avx2_has_lanes_for_many_tokens_only(lanes):
    library.set_isa("avx2")
    found = {kind: library.many_tokens_from(kind) for kind in KINDS}
    assert found.pop(INT4_A8) is None
    assert all(from_ is not None and FEW < from_ <= 64 for from_ in found.values())


@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_are_compared_and_timed(lanes, kind):
    """What a processor whose thresholds are not known goes through at its first product."""
    assert library.many_tokens_from(kind) == 1
    found = library.many_tokens_from(kind, measure=True)
    assert found is None or found >= 2
