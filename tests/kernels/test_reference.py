"""The reference backend against the dense twin, for every format."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from converters import quantize
from vllm_sparse.errors import FormatError, NumericsError
from vllm_sparse.kernels.base import ActivationQuant, CanonicalWeight, LinearSpec, WeightFormat
from vllm_sparse.kernels.reference import ReferenceBackend, expand, quantize_per_token
from vllm_sparse.sparse24 import compress, decompress, topk_mask, unpack_mask

BACKEND = ReferenceBackend()


def quantized(kind: WeightFormat, n: int, k: int, group: int | None):
    """A spec, its canonical weight and the float32 dequantised twin."""
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(n, k, generator=generator)
    w = w * topk_mask(w.abs())
    if kind is WeightFormat.INT8:
        q = (w * 40).round().clamp(-128, 127).to(torch.int8)
    elif kind is WeightFormat.INT4:
        q = (w * 3).round().clamp(-8, 7).to(torch.int8)
    else:
        q = w.to(torch.float8_e4m3fn)
    values, bitmask = compress(q)
    scale = torch.rand(n, 1 if group is None else k // group, generator=generator) + 0.5
    dense = q.float().reshape(n, scale.shape[1], -1) * scale.unsqueeze(-1)
    spec = LinearSpec(n, k, kind, torch.float32, group_size=group)
    return spec, CanonicalWeight(values, bitmask, scale), dense.reshape(n, k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("k", [4, 12, 64, 132])
def test_float_weights_round_trip_and_multiply(dtype, k):
    w = torch.randn(9, k)
    w = (w * topk_mask(w.abs())).to(dtype)
    values, bitmask = compress(w)
    spec = LinearSpec(9, k, WeightFormat.from_dtype(dtype), dtype)
    packed = BACKEND.pack(spec, CanonicalWeight(values, bitmask))
    assert packed.packed.dtype == torch.uint8
    assert packed.packed.numel() == values.numel() * dtype.itemsize + bitmask.numel()
    assert torch.equal(BACKEND.unpack(spec, packed.packed, None), w)
    x, bias = torch.randn(3, 5, k, dtype=dtype), torch.randn(9, dtype=dtype)
    assert torch.equal(BACKEND.linear(spec, x, packed.packed, None, bias), F.linear(x, w, bias))


@pytest.mark.parametrize(
    ("kind", "group"),
    [
        (WeightFormat.INT8, None),
        (WeightFormat.INT8, 32),
        (WeightFormat.FP8_E4M3, None),
        (WeightFormat.INT4, None),
        (WeightFormat.INT4, 64),
    ],
)
def test_quantized_weights_equal_their_dequantized_twin(kind, group):
    spec, weight, dense = quantized(kind, 7, 128, group)
    packed = BACKEND.pack(spec, weight)
    assert torch.equal(BACKEND.unpack(spec, packed.packed, packed.scale), dense)
    x = torch.randn(4, 128)
    torch.testing.assert_close(BACKEND.linear(spec, x, packed.packed, packed.scale, None), x @ dense.T)


def test_int4_takes_half_a_byte_per_value():
    spec, weight, _ = quantized(WeightFormat.INT4, 8, 128, 64)
    assert BACKEND.pack(spec, weight).packed.numel() == 8 * 128 // 4 + 8 * 128 // 8


@pytest.mark.parametrize("quant", [ActivationQuant.INT8_PER_TOKEN, ActivationQuant.FP8_PER_TOKEN])
def test_activation_quantisation_is_per_token(quant):
    spec, weight, dense = quantized(WeightFormat.INT8, 16, 128, None)
    spec = LinearSpec(16, 128, WeightFormat.INT8, torch.float32, activation_quant=quant)
    packed = BACKEND.pack(spec, weight)
    x = torch.randn(4, 128) * torch.tensor([1e-3, 1.0, 50.0, 0.0]).unsqueeze(-1)
    out = BACKEND.linear(spec, x, packed.packed, packed.scale, None)
    step = 1 / 127 if quant is ActivationQuant.INT8_PER_TOKEN else 2**-3
    bound = 0.5 * step * x.abs().amax(-1, keepdim=True) * dense.abs().sum(-1)
    assert bool(((out - x @ dense.T).abs() <= bound + 1e-6).all())
    assert not torch.equal(out[:3], (x @ dense.T)[:3])
    assert bool((out[3] == 0).all())


def test_expand_agrees_with_the_codec():
    w = torch.randn(5, 64)
    values, bitmask = compress(w * topk_mask(w.abs()))
    assert torch.equal(expand(values, unpack_mask(bitmask, 64)), decompress(values, bitmask))


def test_compiles_without_graph_breaks():
    w = torch.randn(16, 64)
    w = w * topk_mask(w.abs())
    values, bitmask = compress(w)
    spec = LinearSpec(16, 64, WeightFormat.FP32, torch.float32)
    packed = BACKEND.pack(spec, CanonicalWeight(values, bitmask)).packed
    compiled = torch.compile(
        lambda x, p: BACKEND.linear(spec, x, p, None, None), fullgraph=True, backend="aot_eager"
    )
    x = torch.randn(3, 64)
    torch.testing.assert_close(compiled(x, packed), x @ w.T)


class DividesLikeCuda(TorchDispatchMode):
    """Division by a Python number as torch does it on CUDA: a product with the rounded reciprocal."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.div.Tensor and not isinstance(args[1], torch.Tensor):
            return args[0] * (1 / torch.tensor(args[1], dtype=args[0].dtype))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("quant", [ActivationQuant.INT8_PER_TOKEN, ActivationQuant.FP8_PER_TOKEN])
def test_a_gpu_s_division_changes_no_quantised_number(quant):
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(5)).bfloat16().float()
    with DividesLikeCuda():
        assert not torch.equal(x / 448.0, x / torch.full_like(x, 448.0))
        on_gpu = quantize_per_token(x, quant)
        weights = [quantize.quantize_int8(x), quantize.quantize_fp8(x), quantize.quantize_int4(x, 32)]
    assert torch.equal(on_gpu, quantize_per_token(x, quant))
    plain = [quantize.quantize_int8(x), quantize.quantize_fp8(x), quantize.quantize_int4(x, 32)]
    for (codes, scale), (expected, expected_scale) in zip(weights, plain, strict=True):
        assert torch.equal(codes.float(), expected.float())
        assert torch.equal(scale, expected_scale)


def test_refuses_weights_that_disagree_with_the_spec():
    w = torch.randn(8, 64)
    values, bitmask = compress(w * topk_mask(w.abs()))
    spec = LinearSpec(8, 64, WeightFormat.FP32, torch.float32)
    with pytest.raises(FormatError, match="stored as"):
        BACKEND.pack(spec, CanonicalWeight(values.half(), bitmask))
    with pytest.raises(FormatError, match="not 2:4"):
        BACKEND.pack(spec, CanonicalWeight(values, torch.full_like(bitmask, 0xFF)))
    with pytest.raises(FormatError, match="no scale"):
        BACKEND.pack(spec, CanonicalWeight(values, bitmask, torch.ones(8, 1)))
    int4 = LinearSpec(8, 64, WeightFormat.INT4, torch.float32)
    with pytest.raises(NumericsError, match=r"\[-8, 7\]"):
        BACKEND.pack(int4, CanonicalWeight(values.clamp(8, 9).to(torch.int8), bitmask, torch.ones(8, 1)))
