"""All experts of a layer in one call, against the same experts one by one in float64."""

import pytest
import torch
from torch.nn import functional as F

from vllm_sparse.errors import UnsupportedError
from vllm_sparse.kernels.base import (
    ActivationQuant,
    CanonicalWeight,
    GatedActivation,
    LinearSpec,
    StackedWeight,
    WeightFormat,
)
from vllm_sparse.kernels.cpu import CpuBackend
from vllm_sparse.sparse24 import compress

from .conftest import LEVELS, random_24

pytestmark = pytest.mark.skipif(not LEVELS, reason="the compiled kernels are not built")
BACKEND = CpuBackend()
EXPERTS, HIDDEN, WIDTH = 5, 96, 40
BF16 = (WeightFormat.BF16, torch.bfloat16)
ACTIVATIONS = {
    GatedActivation.SILU: F.silu,
    GatedActivation.GELU: F.gelu,
    GatedActivation.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
}
# Weight format, activation quantisation, scale group, relative error that quantising activations may add.
CASES = [
    (None, ActivationQuant.NONE, None, 0.0),
    (WeightFormat.INT8, ActivationQuant.NONE, None, 0.0),
    (WeightFormat.INT8, ActivationQuant.INT8_PER_TOKEN, None, 0.03),
    (WeightFormat.FP8_E4M3, ActivationQuant.NONE, None, 0.0),
    (WeightFormat.INT4, ActivationQuant.NONE, 32, 0.0),
    (WeightFormat.INT4, ActivationQuant.INT8_PER_TOKEN, 32, 0.03),
    (WeightFormat.INT4, ActivationQuant.INT8_PER_TOKEN, None, 0.03),
]


def canonical(dense, kind, group):
    """The canonical weight of ``dense`` (float32, 2:4), and what it stands for in float64."""
    if kind in (None, WeightFormat.BF16, WeightFormat.FP16):
        return CanonicalWeight(*compress(dense)), dense.double()
    grouped = dense.reshape(dense.shape[0], -1, group or dense.shape[1])
    most = {WeightFormat.INT8: 127, WeightFormat.INT4: 7, WeightFormat.FP8_E4M3: 448}[kind]
    scale = grouped.abs().amax(-1, keepdim=True) / most
    dtype = torch.float8_e4m3fn if kind is WeightFormat.FP8_E4M3 else torch.int8
    stored = grouped / scale
    stored = (stored if dtype is torch.float8_e4m3fn else stored.round()).to(dtype)
    exact = (stored.double() * scale.double()).reshape(dense.shape)
    values, bitmask = compress(stored.reshape(dense.shape))
    return CanonicalWeight(values, bitmask, scale.squeeze(-1).float()), exact


def make(dtype, kind, quant, group, width=WIDTH):
    float_kind = WeightFormat.from_dtype(dtype)
    stacks, exact = [], []
    for n, k in ((2 * width, HIDDEN), (HIDDEN, width)):
        spec = LinearSpec(n, k, kind or float_kind, dtype, quant, group)
        dense = [random_24(n, k, seed) * k**-0.5 for seed in range(EXPERTS)]
        pairs = [canonical(w.to(dtype) if kind is None else w, kind, group) for w in dense]
        packed = [BACKEND.pack(spec, weight) for weight, _ in pairs]
        stack = BACKEND.empty_stack(packed[0].packed, EXPERTS)
        for target, one in zip(stack, packed, strict=True):
            target.copy_(one.packed)
        scales = [one.scale for one in packed if one.scale is not None]
        stacks.append(StackedWeight(spec, stack, torch.stack(scales) if scales else None))
        exact.append([twin for _, twin in pairs])
    return stacks, exact


def forward(experts, activation, x, weights, ids):
    assert BACKEND.layer_unsupported_reason(*(stack.spec for stack in experts)) is None
    return BACKEND.experts_layer(*experts, activation, x, weights, ids)


def routing(m, top_k):
    ids = torch.rand(m, EXPERTS).argsort(-1)[:, :top_k]
    return torch.rand(m, top_k), ids.contiguous()


def expected(exact, activation, x, weights, ids):
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, chosen in enumerate(ids.tolist()):
        for weight, expert in zip(weights[token].tolist(), chosen, strict=True):
            if expert >= 0:
                gate, up = (x[token].double() @ exact[0][expert].T).chunk(2)
                out[token] += weight * (ACTIVATIONS[activation](gate) * up @ exact[1][expert].T)
    return out


def assert_close(out, wanted, dtype, extra=0.0):
    # Two roundings on the way and one at the end, each relative to what is summed.
    eps = 4 * torch.finfo(dtype).eps + extra
    error = (out.double() - wanted).abs().amax()
    assert error <= eps * wanted.abs().amax(), f"{float(error / wanted.abs().amax())}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "quant", "group", "extra"), CASES)
def test_every_format(isa, dtype, kind, quant, group, extra):
    torch.manual_seed(1)
    experts, exact = make(dtype, kind, quant, group, width=WIDTH if group is None else 64)
    for m, top_k in [(0, 2), (1, 2), (1, 5), (3, 1), (20, 2), (70, 3)]:
        x = torch.randn(m, HIDDEN).to(dtype)
        weights, ids = routing(m, top_k)
        out = forward(experts, GatedActivation.SILU, x, weights, ids)
        assert out.dtype == dtype
        assert out.shape == x.shape
        if m:
            assert_close(out, expected(exact, GatedActivation.SILU, x, weights, ids), dtype, extra)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_experts_of_other_ranks(activation):
    experts, exact = make(torch.bfloat16, None, ActivationQuant.NONE, None)
    x = torch.randn(6, HIDDEN).bfloat16()
    weights, ids = routing(6, 3)
    ids[0] = -1
    ids[3, 1] = -1
    out = forward(experts, activation, x, weights, ids.int())
    assert bool((out[0] == 0).all())
    assert_close(out, expected(exact, activation, x, weights, ids), torch.bfloat16)


def test_results_do_not_depend_on_threads(threads):
    experts, _ = make(torch.bfloat16, None, ActivationQuant.NONE, None)
    x = torch.randn(33, HIDDEN).bfloat16()
    weights, ids = routing(33, 2)
    results = []
    for count in (1, 2, 3, 4):
        threads(count)
        results.append(forward(experts, GatedActivation.SILU, x, weights, ids))
    assert all(torch.equal(results[0], other) for other in results)


def test_opcheck_and_compile():
    experts, _ = make(torch.bfloat16, None, ActivationQuant.NONE, None)
    x = torch.randn(4, HIDDEN).bfloat16()
    weights, ids = routing(4, 2)
    args = (x, weights, ids, experts[0].packed, None, experts[1].packed, None, WIDTH, 0, 0, 0)
    torch.library.opcheck(torch.ops.vllm_sparse.experts_packed_24, args)

    def layer(x):
        return forward(experts, GatedActivation.SILU, x, weights, ids) * 2

    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))


def test_what_does_not_fit_is_refused():
    experts, _ = make(torch.bfloat16, None, ActivationQuant.NONE, None)
    x = torch.randn(4, HIDDEN).bfloat16()
    weights, ids = routing(4, 2)
    ids[2, 1] = EXPERTS
    with pytest.raises(RuntimeError, match="5 experts"):
        forward(experts, GatedActivation.SILU, x, weights, ids)
    with pytest.raises(RuntimeError, match="packed weight"):
        forward(experts, GatedActivation.SILU, x[:, :60], *routing(4, 2))
    with pytest.raises(RuntimeError, match="top_k"):
        forward(experts, GatedActivation.SILU, x, weights[:, :1], ids)
    fp8 = (WeightFormat.FP8_E4M3, torch.bfloat16, ActivationQuant.FP8_PER_TOKEN)
    for gate_up, down, reason in (
        (BF16, (WIDTH + 4, *BF16), "do not fit"),
        (BF16, (WIDTH, WeightFormat.INT8, torch.bfloat16), "differ in format"),
        (fp8, (WIDTH, *fp8), "outside the kernels"),
    ):
        specs = LinearSpec(2 * WIDTH, HIDDEN, *gate_up), LinearSpec(HIDDEN, *down)
        assert reason in BACKEND.layer_unsupported_reason(*specs)
        stacks = [StackedWeight(spec, torch.empty(0)) for spec in specs]
        with pytest.raises(UnsupportedError, match=f"no operator of their own: .*{reason}"):
            BACKEND.experts_layer(*stacks, GatedActivation.SILU, x, weights, ids)
