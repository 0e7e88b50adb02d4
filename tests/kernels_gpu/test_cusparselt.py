"""The cuSPARSELt backend against an emulation that is as strict as the library, and stricter."""

import pytest
import torch

from vllm_sparse.errors import FormatError
from vllm_sparse.kernels import cusparselt
from vllm_sparse.kernels.base import ActivationQuant, CanonicalWeight, LinearSpec, WeightFormat
from vllm_sparse.kernels.cusparselt import CusparseltBackend
from vllm_sparse.kernels.reference import quantize_per_token
from vllm_sparse.sparse24 import compress, topk_mask

from .cusparselt_emulated import BITS, Emulated, form_bytes

BACKEND = CusparseltBackend()
BF16 = torch.bfloat16
FP16 = torch.float16
NONE, INT8, FP8 = ActivationQuant.NONE, ActivationQuant.INT8_PER_TOKEN, ActivationQuant.FP8_PER_TOKEN
# What cusparseLtSpMMACompressedSize2 of cuSPARSELt 0.8.0 said on an H200, by element size, N and K: the bytes
# where there are more than 9/16 (10/16) of the dense ones, and where there are exactly as many.
PADDED_BYTES = {
    (2, 16, 16): 512,
    (2, 32, 32): 1280,
    (2, 32, 64): 2560,
    (2, 48, 144): 8448,
    (2, 48, 272): 15616,
    (2, 96, 128): 14336,
    (2, 128, 144): 21504,
    (2, 160, 256): 47104,
    (2, 144, 4096): 688128,
    (2, 4096, 144): 688128,
    (1, 32, 32): 1024,
    (1, 32, 64): 1536,
    (1, 96, 128): 8192,
    (1, 160, 256): 26624,
}
EXACT_SIZES = [
    *((2, n, k) for n, k in [(64, 64), (64, 128), (128, 64), (128, 128), (192, 256), (4096, 4096)]),
    *((2, n, k) for n, k in [(6144, 4096), (11008, 4096), (896, 4864), (1152, 896)]),
    *((1, n, k) for n, k in [(64, 64), (64, 128), (192, 256), (896, 4864), (1152, 896)]),
]


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    ops = Emulated()
    monkeypatch.setattr(cusparselt, "_ops", ops)
    monkeypatch.setattr(cusparselt, "_algorithms", {})
    monkeypatch.setattr(cusparselt, "TOKEN_BINS", (16, 64))
    return ops


def random_24(n, k, dtype=torch.float32):
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(n + k))
    return (w * topk_mask(w.abs())).to(dtype)


def plain(w):
    values, bitmask = compress(w)
    return LinearSpec(*w.shape, WeightFormat.from_dtype(w.dtype), w.dtype), CanonicalWeight(values, bitmask)


def product(spec, weight, x, bias=None):
    packed = BACKEND.pack(spec, weight)
    return BACKEND.linear(spec, x, packed.packed, packed.scale, bias)


def assert_close(out, exact):
    assert torch.allclose(out.double(), exact, rtol=torch.finfo(out.dtype).eps, atol=1e-5)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("n", "k"), [(16, 16), (33, 132), (40, 260)])
@pytest.mark.parametrize("m", [0, 1, 7, 8, 65])
def test_any_shape_with_and_without_bias(dtype, n, k, m):
    w = random_24(n, k, dtype)
    x = torch.randn(m, k).to(dtype)
    bias = torch.randn(n).to(dtype)
    exact = x.double() @ w.double().T
    assert_close(product(*plain(w), x), exact)
    assert_close(product(*plain(w), x, bias), exact + bias.double())


@pytest.mark.parametrize("dtype", [BF16, torch.float8_e4m3fn])
def test_negative_zeros_and_short_groups(dtype):
    w = random_24(32, 64)
    w = torch.where(w == 0, -0.0, w)
    w[1] = 0
    w[2, ::2] = 0
    stored = w.to(dtype)
    values, bitmask = compress(stored)
    # Negative zeros also among the kept values, as older compressors wrote them.
    values = values.clone()
    values.view(BITS[values.element_size()])[1] = {1: 0x80, 2: -0x8000}[values.element_size()]
    x = torch.randn(5, 64).to(BF16)
    if dtype == BF16:
        spec, scale = LinearSpec(32, 64, WeightFormat.BF16, BF16), None
        expected = x.double() @ stored.double().T
    else:
        spec, scale = LinearSpec(32, 64, WeightFormat.FP8_E4M3, BF16, FP8), torch.ones(32, 1)
        expected = quantize_per_token(x.float(), FP8).double() @ stored.float().double().T
    assert_close(product(spec, CanonicalWeight(values, bitmask, scale), x), expected)


@pytest.mark.parametrize(("weight", "quant"), [(WeightFormat.INT8, INT8), (WeightFormat.FP8_E4M3, FP8)])
def test_quantised_products(weight, quant):
    w = random_24(40, 96)
    scale = torch.rand(40, 1) + 0.5
    stored = (w * 30).round().to(torch.int8) if quant is INT8 else w.to(torch.float8_e4m3fn)
    values, bitmask = compress(stored)
    spec = LinearSpec(40, 96, weight, BF16, quant)
    x, bias = torch.randn(3, 96).to(BF16), torch.randn(40).to(BF16)
    exact = quantize_per_token(x.float(), quant).double() @ (stored.float().double() * scale.double()).T
    out = product(spec, CanonicalWeight(values, bitmask, scale), x, bias)
    assert out.dtype == BF16
    assert_close(out, exact + bias.double())


def test_strided_and_batched_inputs():
    w = random_24(32, 64, BF16)
    x = torch.randn(6, 5, 128).to(BF16)[:, ::2, ::2]
    out = product(*plain(w), x)
    assert out.shape == (6, 3, 32)
    assert_close(out, x.double() @ w.double().T)


def test_the_emulation_has_the_library_s_sizes():
    for (size, n, k), stated in PADDED_BYTES.items():
        assert form_bytes(n, k, size) == stated > n * k * size * {1: 10, 2: 9}[size] // 16, (size, n, k)
    for size, n, k in EXACT_SIZES:
        assert form_bytes(n, k, size) == n * k * size * {1: 10, 2: 9}[size] // 16, (size, n, k)


def test_the_emulation_refuses_a_part_of_a_form(emulated):
    packed = emulated.compress(torch.zeros(48, 144, dtype=BF16))
    assert packed.shape == (48, 88)
    x = torch.zeros(8, 144, dtype=BF16)
    assert emulated.multiply(packed, x, None, 0).shape == (8, 48)
    with pytest.raises(AssertionError, match=r"is \(48, 88\), this is \(48, 81\)"):
        emulated.multiply(packed.view(-1)[: 48 * 81].view(48, 81), x, None, 0)


@pytest.mark.parametrize("dtype", [BF16, FP16, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(("n", "k"), [(4, 4), (33, 132), (40, 260), (64, 128), (65, 64), (144, 192)])
def test_the_form_of_any_size_has_the_shape_said(dtype, n, k):
    """Which the buffer of two forms relies on."""
    w = random_24(n, k)
    if dtype.itemsize == 2:
        spec, weight = plain(w.to(dtype))
    else:
        stored = (w * 30).round().to(torch.int8) if dtype == torch.int8 else w.to(dtype)
        spec = LinearSpec(n, k, WeightFormat.from_dtype(dtype), BF16, INT8 if dtype == torch.int8 else FP8)
        weight = CanonicalWeight(*compress(stored), torch.ones(n, 1))
    packed = BACKEND.pack(spec, weight).packed
    assert packed.dtype == dtype
    assert packed.shape == cusparselt.compressed_shape(n, k, dtype)


def test_float16_is_never_searched(emulated):
    """On the GPU the search ends the process's work there; the emulation fails as it does, and stays so."""
    w = random_24(33, 132, FP16)
    spec, weight = plain(w)
    packed = BACKEND.pack(spec, weight).packed
    assert cusparselt._algorithms == {}
    x = torch.randn(9, 132).to(FP16)
    assert_close(BACKEND.linear(spec, x, packed, None, None), x.double() @ w.double().T)
    assert emulated.used == [0]
    with pytest.raises(RuntimeError, match="cusparseLtMatmulSearch"):
        emulated.algorithms(packed, x)
    with pytest.raises(RuntimeError, match="illegal instruction"):
        BACKEND.linear(spec, x, packed, None, None)


def test_algorithms_are_searched_once_and_refused_ones_skipped(emulated):
    spec, weight = plain(random_24(32, 64, BF16))
    packed = BACKEND.pack(spec, weight)
    assert set(cusparselt._algorithms) == {(32, 64, BF16, 16), (32, 64, BF16, 64)}
    assert set(cusparselt._algorithms.values()) == {2}
    searched = len(emulated.used)
    BACKEND.pack(spec, weight)
    assert len(emulated.used) == searched
    BACKEND.linear(spec, torch.randn(9, 64).to(BF16), packed.packed, None, None)
    assert emulated.used[searched:] == [2]


def test_unpack_reads_back_what_was_packed():
    w = random_24(20, 36, BF16)
    spec, weight = plain(w)
    packed = BACKEND.pack(spec, weight)
    assert torch.equal(BACKEND.unpack(spec, packed.packed, None), w)


@pytest.mark.parametrize("dtype", [BF16, FP16, torch.int8, torch.float8_e4m3fn])
def test_the_self_test_passes_and_finds_wrong_products(dtype, emulated, monkeypatch):
    cpu = torch.device("cpu")
    assert cusparselt.self_test(cpu, dtype) is None
    right = emulated.multiply
    monkeypatch.setattr(emulated, "multiply", lambda *operands: right(*operands) + 1)
    assert "wrong" in cusparselt.self_test(cpu, dtype)
    monkeypatch.setattr(emulated, "multiply", lambda c, x, b, a: right(c, x, b, 1))
    assert "operation not supported" in cusparselt.self_test(cpu, dtype)


def test_reasons():
    spec = LinearSpec(32, 64, WeightFormat.BF16, BF16)
    assert "weight is on cpu" in BACKEND.unsupported_reason(spec, torch.device("cpu"))
    weight_only = LinearSpec(32, 64, WeightFormat.INT8, BF16)
    assert "no product of int8 weights" in BACKEND.unsupported_reason(weight_only, torch.device("cuda:0"))
    grouped = LinearSpec(32, 64, WeightFormat.INT8, BF16, INT8, group_size=32)
    assert "groups of 32" in BACKEND.unsupported_reason(grouped, torch.device("cuda:0"))


def test_a_weight_that_contradicts_its_spec_is_refused():
    _, weight = plain(random_24(32, 64, BF16))
    with pytest.raises(FormatError, match="needs values"):
        BACKEND.pack(LinearSpec(32, 128, WeightFormat.BF16, BF16), weight)


def test_compiled_as_one_operator():
    spec, weight = plain(random_24(32, 64, BF16))
    packed = BACKEND.pack(spec, weight)

    def layer(x):
        return BACKEND.linear(spec, x * 2, packed.packed, packed.scale, None)

    x = torch.randn(2, 3, 64).to(BF16)
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))
