"""The compiled kernels for int8, fp8 and int4 weights, at every instruction-set level, against float64."""

import pytest
import torch

from vllm_sparse.errors import NumericsError
from vllm_sparse.kernels import dispatch
from vllm_sparse.kernels.base import ActivationQuant, CanonicalWeight, LinearSpec, WeightFormat
from vllm_sparse.kernels.cpu import CpuBackend
from vllm_sparse.sparse24 import compress

from .conftest import LEVELS, assert_close_to_exact, assert_integers_are_exact, quantized_layer

pytestmark = pytest.mark.skipif(not LEVELS, reason="the compiled kernels are not built")
BACKEND = CpuBackend()
DTYPES = [torch.bfloat16, torch.float16]
CPU = torch.device("cpu")


CASES = [
    (WeightFormat.INT8, None),
    (WeightFormat.FP8_E4M3, None),
    (WeightFormat.INT4, None),
    (WeightFormat.INT4, 128),
    (WeightFormat.INT4, 32),
    (WeightFormat.INT8, 64),
    (WeightFormat.FP8_E4M3, 128),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "group"), CASES)
def test_weight_only(isa, kind, group, dtype):
    for n, k in [(16, 128), (33, 384), (8, 2176)]:
        spec, weight, exact = quantized_layer(kind, n, k, dtype, group)
        assert BACKEND.unsupported_reason(spec, CPU) is None
        packed = BACKEND.pack(spec, weight)
        twin = exact.to(dtype)  # what a dequantised dense layer holds
        assert torch.equal(BACKEND.unpack(spec, packed.packed, packed.scale), twin)
        for m in (1, 2, 5, 8, 9, 16, 17, 40):
            x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
            out = BACKEND.linear(spec, x, packed.packed, packed.scale, bias)
            # Weights that are decoded in registers are not rounded.
            rounded = group is not None and not (isa == "avx2" and m <= in_registers(kind))
            assert_close_to_exact(out, x, twin if rounded else exact, bias)


def in_registers(kind):
    """For how many tokens ``avx2`` decodes weights in registers."""
    return 16 if kind is WeightFormat.INT8 else 8


@pytest.mark.parametrize("dtype", DTYPES)
def test_k_that_is_not_a_multiple_of_the_block(isa, dtype):
    for kind in (WeightFormat.INT8, WeightFormat.FP8_E4M3, WeightFormat.INT4):
        spec, weight, exact = quantized_layer(kind, 9, 76, dtype)
        packed = BACKEND.pack(spec, weight)
        x = torch.randn(3, 76).to(dtype)
        assert_close_to_exact(BACKEND.linear(spec, x, packed.packed, packed.scale, None), x, exact)


@pytest.mark.parametrize("kind", [WeightFormat.INT8, WeightFormat.FP8_E4M3, WeightFormat.INT4])
def test_every_value_of_the_format(isa, kind):
    """All codes, in a weight that multiplies a unit vector per column: the output is the weight itself."""
    if kind is WeightFormat.INT8:
        codes = torch.arange(-128, 128).to(torch.int8)
    elif kind is WeightFormat.INT4:
        codes = torch.arange(-8, 8).repeat(16).to(torch.int8)
    else:
        codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
        codes = torch.where(codes.float().isnan(), torch.zeros(256), codes.float()).to(torch.float8_e4m3fn)
    dense = torch.zeros(8, 64, dtype=torch.float32)
    values = codes.float().reshape(8, 16, 2)
    dense.view(8, 16, 4)[:, :, 1] = values[:, :, 0]
    dense.view(8, 16, 4)[:, :, 3] = values[:, :, 1]
    q = dense.to(codes.dtype)
    packed_values, bitmask = compress(q)
    spec = LinearSpec(8, 64, kind, torch.bfloat16)
    packed = BACKEND.pack(spec, CanonicalWeight(packed_values, bitmask, torch.ones(8, 1)))
    out = BACKEND.linear(spec, torch.eye(64, dtype=torch.bfloat16), packed.packed, packed.scale, None)
    assert torch.equal(out.float().T, dense)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_activations_are_exact_in_integers(isa, dtype):
    for n, k in [(16, 128), (9, 76), (40, 4160)]:
        layer = quantized_layer(WeightFormat.INT8, n, k, dtype, quant=ActivationQuant.INT8_PER_TOKEN)
        assert_integers_are_exact(BACKEND, layer, (0, 1, 2, 7, 16, 19, 300))


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_activations_of_any_size(isa, dtype):
    spec, weight, exact = quantized_layer(
        WeightFormat.INT8, 24, 256, dtype, quant=ActivationQuant.INT8_PER_TOKEN
    )
    packed = BACKEND.pack(spec, weight)
    x = torch.randn(5, 256) * torch.tensor([1e-4, 1.0, 300.0, 0.0, 1.0]).unsqueeze(-1)
    x = x.to(dtype)
    x[4, 3] = float("inf")
    out = BACKEND.linear(spec, x, packed.packed, packed.scale, None)
    assert bool(out[4].isnan().all())
    assert bool((out[3] == 0).all())
    error = (out[:3].double() - x[:3].double() @ exact.T).abs()
    step = x[:3].double().abs().amax(-1, keepdim=True) / 127
    bound = 0.5001 * step * exact.abs().sum(-1) + 2**-7 * (x[:3].double().abs() @ exact.abs().T)
    assert bool((error <= bound + 1e-6).all())


def test_extreme_int8_sums_do_not_overflow(isa):
    k = 28672
    q = torch.zeros(8, k, dtype=torch.int8)
    q[:, 0::4], q[:, 1::4] = 127, -128
    values, bitmask = compress(q)
    spec = LinearSpec(
        8, k, WeightFormat.INT8, torch.bfloat16, activation_quant=ActivationQuant.INT8_PER_TOKEN
    )
    packed = BACKEND.pack(spec, CanonicalWeight(values, bitmask, torch.full((8, 1), 1e-3)))
    x = torch.where(torch.arange(k) % 4 == 0, 127.0, -127.0).to(torch.bfloat16).expand(2, -1).contiguous()
    out = BACKEND.linear(spec, x, packed.packed, packed.scale, None)
    assert_close_to_exact(out, x, q.double() * float(packed.scale[0, 0]))


def test_fp8_activations(isa):
    quant = ActivationQuant.FP8_PER_TOKEN
    spec, weight, exact = quantized_layer(WeightFormat.FP8_E4M3, 24, 256, torch.bfloat16, quant=quant)
    packed = BACKEND.pack(spec, weight)
    x = torch.randn(4, 256).to(torch.bfloat16)
    token_scale = x.float().abs().amax(-1, keepdim=True) / 448
    rounded = (x.float() / token_scale).to(torch.float8_e4m3fn).double() * token_scale.double()
    out = BACKEND.linear(spec, x, packed.packed, packed.scale, None)
    expected = rounded @ exact.T
    error = (out.double() - expected).abs()
    assert bool((error <= 2**-7 * expected.abs() + 1e-5).all())


def test_non_finite_activations_reach_all_rows_that_dense_would_reach(isa):
    spec, weight, exact = quantized_layer(WeightFormat.INT8, 24, 128, torch.bfloat16)
    packed = BACKEND.pack(spec, weight)
    x = torch.randn(3, 128).to(torch.bfloat16)
    x[0, 9], x[2, 100] = float("inf"), float("nan")
    out = BACKEND.linear(spec, x, packed.packed, packed.scale, None)
    dense = x.double() @ exact.T
    assert torch.equal(out.isnan(), dense.isnan())
    assert torch.equal(out.isinf(), dense.isinf())


def test_bytes_per_weight():
    for kind, bits in [(WeightFormat.INT8, 5), (WeightFormat.FP8_E4M3, 5), (WeightFormat.INT4, 3)]:
        spec, weight, _ = quantized_layer(kind, 64, 512, torch.bfloat16)
        assert BACKEND.pack(spec, weight).packed.numel() == 64 * 512 * bits // 8


def test_nan_in_fp8_weights_is_refused():
    spec, weight, _ = quantized_layer(WeightFormat.FP8_E4M3, 8, 64, torch.bfloat16)
    values = weight.values.view(torch.uint8).clone()
    values[3, 3] = 0x7F
    with pytest.raises(NumericsError, match="NaN"):
        BACKEND.pack(spec, CanonicalWeight(values.view(torch.float8_e4m3fn), weight.bitmask, weight.scale))


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (LinearSpec(8, 64, WeightFormat.INT4, torch.float32, group_size=32), "float32"),
        (LinearSpec(8, 64, WeightFormat.INT4, torch.bfloat16, group_size=16), "multiple of 32"),
        (LinearSpec(8, 64, WeightFormat.INT4, torch.bfloat16, ActivationQuant.FP8_PER_TOKEN), "no kernel"),
        (LinearSpec(8, 64, WeightFormat.INT8, torch.bfloat16, ActivationQuant.INT8_PER_TOKEN, 32), "channel"),
    ],
)
def test_what_has_no_kernel_goes_to_reference_with_a_reason(spec, reason, monkeypatch):
    monkeypatch.delenv("VLLM_SPARSE_BACKEND", raising=False)
    selection = dispatch.select(spec, CPU)
    assert selection.backend.name == "reference"
    assert reason in dict(selection.rejected)["cpu"]


def test_opcheck():
    spec, weight, _ = quantized_layer(WeightFormat.INT4, 16, 128, torch.bfloat16, 64)
    packed = BACKEND.pack(spec, weight)
    x = torch.randn(3, 128).to(torch.bfloat16)
    args = (x, packed.packed, packed.scale, None, 16, 128, 4, 64)
    torch.library.opcheck(torch.ops.vllm_sparse.linear_24, args)


def test_scales_of_a_wrong_shape_are_refused_by_the_op():
    spec, weight, _ = quantized_layer(WeightFormat.INT8, 16, 128, torch.bfloat16)
    packed = BACKEND.pack(spec, weight)
    x = torch.randn(3, 128).to(torch.bfloat16)
    op = torch.ops.vllm_sparse.linear_24
    with pytest.raises(RuntimeError, match="need a scale"):
        op(x, packed.packed, None, None, 16, 128, 2, 0)
    with pytest.raises(RuntimeError, match="float32 numbers"):
        op(x, packed.packed, packed.scale[:8], None, 16, 128, 2, 0)
