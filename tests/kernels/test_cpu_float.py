"""The compiled bf16 and fp16 kernels at every instruction-set level, against float64."""

import pytest
import torch

from vllm_sparse.errors import FormatError
from vllm_sparse.kernels.base import CanonicalWeight
from vllm_sparse.kernels.cpu import CpuBackend

from .conftest import LEVELS, assert_close_to_exact, float_layer, from_dense, random_24

pytestmark = pytest.mark.skipif(not LEVELS, reason="the compiled kernels are not built")
BACKEND = CpuBackend()
DTYPES = [torch.bfloat16, torch.float16]
CPU = torch.device("cpu")


def run(layer, x, bias=None):
    packed = BACKEND.pack(layer.spec, layer.weight).packed
    return BACKEND.linear(layer.spec, x, packed, None, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(8, 64), (1, 4), (33, 132), (64, 512), (100, 260), (24, 2112)])
def test_every_token_count(isa, dtype, n, k):
    layer = float_layer(n, k, dtype)
    packed = BACKEND.pack(layer.spec, layer.weight).packed
    generator = torch.Generator().manual_seed(1)
    for m in [*range(18), 31, 64, 255, 300]:
        x = torch.randn(m, k, generator=generator).to(dtype)
        bias = torch.randn(n, generator=generator).to(dtype) if m % 2 else None
        out = BACKEND.linear(layer.spec, x, packed, None, bias)
        assert out.shape == (m, n)
        assert out.dtype == dtype
        assert_close_to_exact(out, x, layer.dense, bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adversarial_weights(isa, dtype):
    w = random_24(40, 320).to(dtype)
    w[0] = 0  # a row of empty groups
    w[1, ::2] = -0.0  # -0.0 is a zero and may not claim a slot
    w[2, 1::2] = 0
    w[3] = 0
    w[3, 319] = 3.0  # groups with one non-zero, at the last position
    w[4] = torch.where(w[4] != 0, torch.tensor(torch.finfo(dtype).max, dtype=dtype), w[4])
    w[5] = torch.where(w[5] != 0, torch.tensor(torch.finfo(dtype).tiny, dtype=dtype), w[5])
    layer = from_dense(w)
    packed = BACKEND.pack(layer.spec, layer.weight).packed
    assert torch.equal(BACKEND.unpack(layer.spec, packed, None), w)
    for m in (1, 3, 8, 20):
        x = torch.randn(m, 320).to(dtype) * (2.0**-14 if dtype == torch.float16 else 2.0**-20)
        assert_close_to_exact(BACKEND.linear(layer.spec, x.to(dtype), packed, None, None), x.to(dtype), w)


@pytest.mark.parametrize("position", range(6))
def test_each_pair_of_positions(isa, position):
    """A weight that uses one of the six possible patterns throughout picks exactly those columns."""
    first, second = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)][position]
    w = torch.zeros(16, 192, dtype=torch.bfloat16)
    w[:, first::4], w[:, second::4] = 1.0, 2.0
    x = torch.arange(192, dtype=torch.bfloat16).remainder(61).expand(2, -1).contiguous()
    assert_close_to_exact(run(from_dense(w), x), x, w)


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_contiguous_and_batched_inputs(isa, dtype):
    layer = float_layer(24, 128, dtype)
    x = torch.randn(6, 5, 256, dtype=dtype)[:, ::2, ::2]
    out = run(layer, x)
    assert out.shape == (6, 3, 24)
    assert_close_to_exact(out, x, layer.dense)
    vector = torch.randn(128, dtype=dtype)
    assert_close_to_exact(run(layer, vector), vector, layer.dense)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 4, 11])
def test_non_finite_activations_propagate_as_in_dense(isa, dtype, m):
    layer = float_layer(40, 132, dtype)
    x = torch.randn(m, 132, dtype=dtype)
    x[0, 5], x[m - 1, 130] = float("inf"), float("-inf")
    if m > 1:
        x[m // 2, 77] = float("nan")
    out = run(layer, x)
    dense = x.float() @ layer.dense.float().T
    assert torch.equal(out.isnan(), dense.isnan())
    assert torch.equal(out.isposinf(), dense.isposinf())
    assert torch.equal(out.isneginf(), dense.isneginf())


def test_infinite_weights_propagate(isa):
    w = random_24(8, 64).to(torch.bfloat16)
    w[3, int(w[3].nonzero()[0])] = float("inf")
    x = torch.ones(2, 64, dtype=torch.bfloat16)
    out = run(from_dense(w), x)
    assert bool(out[:, 3].isposinf().all())
    assert bool(out[:, :3].isfinite().all())


def test_results_do_not_depend_on_threads_or_on_the_batch(isa, threads):
    layer = float_layer(200, 576, torch.bfloat16)
    packed = BACKEND.pack(layer.spec, layer.weight).packed
    x = torch.randn(21, 576).to(torch.bfloat16)
    results = []
    for count in (1, 2, 3, 4):
        threads(count)
        results.append(BACKEND.linear(layer.spec, x, packed, None, None))
    assert all(torch.equal(results[0], other) for other in results)
    assert_close_to_exact(results[0], x, layer.dense)


def test_layout_is_nine_bits_per_weight_and_pads():
    layer = float_layer(64, 512, torch.bfloat16)
    assert BACKEND.pack(layer.spec, layer.weight).packed.numel() == 64 * 512 * 9 // 8
    odd = float_layer(9, 68, torch.bfloat16)
    assert BACKEND.pack(odd.spec, odd.weight).packed.numel() == 2 * 2 * 576


def test_a_broken_bitmask_is_refused_with_its_place():
    layer = float_layer(16, 64, torch.bfloat16)
    bitmask = layer.weight.bitmask.clone()
    bitmask[7, 2] = 0x3F
    with pytest.raises(FormatError, match="row 7, columns 16"):
        BACKEND.pack(layer.spec, CanonicalWeight(layer.weight.values, bitmask))


def test_opcheck_and_compile():
    layer = float_layer(32, 128, torch.bfloat16)
    packed = BACKEND.pack(layer.spec, layer.weight).packed
    bias = torch.randn(32).to(torch.bfloat16)
    x = torch.randn(3, 128).to(torch.bfloat16)
    for args in [(x, packed, None, bias, 32, 128, 0, 0), (x, packed, None, None, 32, 128, 0, 0)]:
        torch.library.opcheck(torch.ops.vllm_sparse.linear_24, args)

    def forward(x, packed):
        return torch.relu(BACKEND.linear(layer.spec, x * 2, packed, None, bias)) + 1

    compiled = torch.compile(forward, fullgraph=True, dynamic=True)
    for m in (1, 5, 17):
        x = torch.randn(m, 128).to(torch.bfloat16)
        torch.testing.assert_close(compiled(x, packed), forward(x, packed))


def test_wrong_arguments_are_refused_by_the_op():
    layer = float_layer(32, 128, torch.bfloat16)
    packed = BACKEND.pack(layer.spec, layer.weight).packed
    x = torch.randn(3, 128).to(torch.bfloat16)
    op = torch.ops.vllm_sparse.linear_24
    with pytest.raises(RuntimeError, match="packed weight"):
        op(x, packed[:-1], None, None, 32, 128, 0, 0)
    with pytest.raises(RuntimeError, match="input must be"):
        op(x[:, :64], packed, None, None, 32, 128, 0, 0)
    with pytest.raises(RuntimeError, match="input must be"):
        op(x.float(), packed, None, None, 32, 128, 0, 0)
    with pytest.raises(RuntimeError, match="bias"):
        op(x, packed, None, torch.ones(31), 32, 128, 0, 0)
