"""The compiled kernels for int4 weights with int8 activations, at every instruction-set level."""

import pytest
import torch
from torch import Tensor

from vllm_sparse.kernels import dispatch
from vllm_sparse.kernels.base import ActivationQuant, CanonicalWeight, LinearSpec, WeightFormat
from vllm_sparse.kernels.cpu import CpuBackend
from vllm_sparse.kernels.reference import ReferenceBackend
from vllm_sparse.sparse24 import compress

from .conftest import LEVELS, assert_close_to_exact, assert_integers_are_exact, quantized_layer

pytestmark = pytest.mark.skipif(not LEVELS, reason="the compiled kernels are not built")
BACKEND = CpuBackend()
INT4, INT8_TOKENS = WeightFormat.INT4, ActivationQuant.INT8_PER_TOKEN
DTYPES = [torch.bfloat16, torch.float16]
# N, K, scale group: whole blocks and not, groups that end inside a block, slabs that end inside a group.
CASES = [
    (16, 128, None),
    (9, 76, None),
    (33, 384, 128),
    (8, 2176, 128),
    (24, 192, 64),
    (17, 352, 32),
    (40, 4160, 32),
    (12, 2208, 96),
    (8, 3200, 160),
    (10, 2560, 2560),
]


def w4a8_layer(
    n: int, k: int, dtype: torch.dtype, group: int | None = None
) -> tuple[LinearSpec, CanonicalWeight, Tensor]:
    return quantized_layer(INT4, n, k, dtype, group, INT8_TOKENS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "group"), CASES)
def test_integers_are_exact(isa, n, k, group, dtype):
    tokens = (0, 1, 2, 3, 5, 7, 8, 9, 12, 16, 17, 40, 300)
    assert_integers_are_exact(BACKEND, w4a8_layer(n, k, dtype, group), tokens)


@pytest.mark.parametrize("m", range(1, 17))
def test_every_tile_size(isa, m):
    spec, weight, exact = w4a8_layer(19, 672, torch.bfloat16, 96)
    packed = BACKEND.pack(spec, weight)
    x = torch.randint(-127, 128, (m, 672)).to(torch.bfloat16)
    x[:, 5] = 127
    assert_close_to_exact(BACKEND.linear(spec, x, packed.packed, packed.scale, None), x, exact)


def test_every_value_at_every_column(isa):
    """A unit vector for each column: the outputs are the weights themselves, -8 among them."""
    codes = torch.arange(-8, 8).repeat(32).to(torch.int8).reshape(8, 32, 2)
    for first, second in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)):
        dense = torch.zeros(8, 128, dtype=torch.int8)
        dense.view(8, 32, 4)[:, :, first] = codes[:, :, 0]
        dense.view(8, 32, 4)[:, :, second] = codes[:, :, 1]
        spec = LinearSpec(8, 128, INT4, torch.bfloat16, INT8_TOKENS, 32)
        scale = torch.tensor([1.0, 2.0, 4.0, 8.0]).repeat(8, 1) * torch.arange(1, 9).unsqueeze(1)
        packed = BACKEND.pack(spec, CanonicalWeight(*compress(dense), scale))
        expected = dense.float().reshape(8, 4, 32) * scale.unsqueeze(-1)
        for tokens in (torch.eye(128), torch.eye(128)[77:78], -torch.eye(128)[3:9]):
            out = BACKEND.linear(spec, tokens.to(torch.bfloat16), packed.packed, packed.scale, None)
            # In float32 sums the offset of the activations cancels to a rounding of its size.
            torch.testing.assert_close(
                out.float(), tokens @ expected.reshape(8, 128).T, rtol=2**-8, atol=1e-3
            )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [None, 32, 128])
def test_tokens_of_any_size(isa, dtype, group):
    torch.manual_seed(5)
    spec, weight, exact = w4a8_layer(24, 256, dtype, group)
    packed = BACKEND.pack(spec, weight)
    x = torch.randn(6, 256) * torch.tensor([1e-4, 1.0, 300.0, 0.0, 1.0, 1.0]).unsqueeze(-1)
    x = x.to(dtype)
    x[4, 3], x[5, 255] = float("inf"), float("nan")
    out = BACKEND.linear(spec, x, packed.packed, packed.scale, None)
    assert bool(out[4:].isnan().all())
    assert bool((out[3] == 0).all())
    # An activation that lies between two integers may go to either side: one step more for a few columns.
    step = x[:3].double().abs().amax(-1, keepdim=True) / 127
    expected = (x[:3].double() / step).round() * step @ exact.T
    bound = torch.finfo(dtype).eps * expected.abs() + 2.01 * step * exact.abs().amax(-1) + 1e-7
    assert bool(((out[:3].double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("group", [None, 64, 128])
def test_agrees_with_the_reference_backend(isa, group):
    spec, weight, _ = w4a8_layer(64, 512, torch.bfloat16, group)
    packed, reference = BACKEND.pack(spec, weight), ReferenceBackend().pack(spec, weight)
    for m in (1, 4, 33):
        x, bias = torch.randn(2, m, 512).to(torch.bfloat16), torch.randn(64)
        # A power of two as the step: the one divides and the other multiplies, and both are exact then.
        x[..., 7] = 127 / 16
        out = BACKEND.linear(spec, x, packed.packed, packed.scale, bias)
        other = ReferenceBackend().linear(spec, x, reference.packed, reference.scale, bias)
        torch.testing.assert_close(out, other, rtol=2**-7, atol=1e-4)


def test_one_sided_weights_of_a_long_row(isa):
    """All weights at the ends of the range: neither sums of integers nor the offset's may overflow."""
    k = 28672
    for group in (None, 128, k):
        q = torch.zeros(8, k, dtype=torch.int8)
        q[:, 0::4] = q[:, 1::4] = -8
        q[4:, 0::4] = q[4:, 1::4] = 7
        spec = LinearSpec(8, k, INT4, torch.bfloat16, INT8_TOKENS, group)
        scale = torch.full((8, 1 if group is None else k // group), 1e-3)
        packed = BACKEND.pack(spec, CanonicalWeight(*compress(q), scale))
        for sign in (1.0, -1.0):
            x = torch.full((2, k), 127.0 * sign, dtype=torch.bfloat16)
            out = BACKEND.linear(spec, x, packed.packed, packed.scale, None)
            assert_close_to_exact(out, x, q.double() * float(scale[0, 0]))


@pytest.mark.parametrize("m", [1, 5, 40])
def test_results_do_not_depend_on_threads(isa, threads, m):
    spec, weight, _ = w4a8_layer(200, 512, torch.bfloat16, 128)
    packed = BACKEND.pack(spec, weight)
    x = torch.randn(m, 512).to(torch.bfloat16)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(BACKEND.linear(spec, x, packed.packed, packed.scale, None))
    assert all(torch.equal(results[0], other) for other in results)


def test_takes_no_more_than_weight_only_int4():
    weight_only = quantized_layer(INT4, 64, 512, torch.bfloat16, 128)
    packed, other = (
        BACKEND.pack(spec, weight)
        for spec, weight, _ in (w4a8_layer(64, 512, torch.bfloat16, 128), weight_only)
    )
    assert torch.equal(packed.packed, other.packed)
    assert packed.packed.numel() == 64 * 512 * 3 // 8
    assert packed.scale.numel() == other.scale.numel() + 64


def test_the_compiled_backend_serves_it(monkeypatch):
    monkeypatch.delenv("VLLM_SPARSE_BACKEND", raising=False)
    for group in (None, 32, 128):
        spec = LinearSpec(8, 128, INT4, torch.bfloat16, INT8_TOKENS, group)
        assert dispatch.select(spec, torch.device("cpu")).backend.name == "cpu"
    odd = LinearSpec(8, 128, INT4, torch.bfloat16, INT8_TOKENS, 16)
    selection = dispatch.select(odd, torch.device("cpu"))
    assert selection.backend.name == "reference"
    assert "multiple of 32" in dict(selection.rejected)["cpu"]


def test_opcheck_and_wrong_scales():
    spec, weight, _ = w4a8_layer(16, 128, torch.bfloat16, 64)
    packed = BACKEND.pack(spec, weight)
    x = torch.randn(3, 128).to(torch.bfloat16)
    op = torch.ops.vllm_sparse.linear_24
    torch.library.opcheck(op, (x, packed.packed, packed.scale, None, 16, 128, 6, 64))
    with pytest.raises(RuntimeError, match="need a scale"):
        op(x, packed.packed, None, None, 16, 128, 6, 64)
    with pytest.raises(RuntimeError, match="float32 numbers"):
        op(x, packed.packed, packed.scale[:32], None, 16, 128, 6, 64)
    with pytest.raises(RuntimeError, match="multiples of 32"):
        op(x, packed.packed, packed.scale, None, 16, 128, 6, 16)
