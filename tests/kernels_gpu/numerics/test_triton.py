"""Every route of the Triton backend against float64."""

import pytest
import torch

from vllm_sparse.errors import UnsupportedError
from vllm_sparse.kernels.base import ActivationQuant, CanonicalWeight, WeightFormat
from vllm_sparse.kernels.reference import ReferenceBackend, quantize_per_token
from vllm_sparse.kernels.triton import ops
from vllm_sparse.kernels.triton.backend import TritonBackend
from vllm_sparse.kernels.triton.configs import Config, Route
from vllm_sparse.kernels.triton.layout import FORMAT_NUMBER
from vllm_sparse.sparse24 import compress

from .conftest import DEVICE, INTERPRETED, PLAIN, assert_close_to_exact, make_layer, random_24

BACKEND = TritonBackend()
BF16, FP16 = torch.bfloat16, torch.float16
SELECT = Config(Route.SELECT, 16, 1, 1, 4, 2)
SELECT_SPLIT = Config(Route.SELECT, 32, 4, 2, 4, 2)
DOT = Config(Route.DOT, 32, 16, 1, 4, 2)
DOT_SPLIT = Config(Route.DOT, 64, 16, 2, 4, 2)
EXPAND = Config(Route.EXPAND)
QUANTIZED = [
    (WeightFormat.INT8, None),
    (WeightFormat.FP8_E4M3, None),
    (WeightFormat.INT4, 128),
    (WeightFormat.INT4, 32),
    (WeightFormat.INT4, None),
    (WeightFormat.INT8, 300),
]


def run(layer, x, bias=None, config=None):
    """The product by the packed weight, in a given configuration."""
    packed = BACKEND.pack(layer.spec, layer.weight)
    if config is None:
        return BACKEND.linear(layer.spec, x, packed.packed, packed.scale, bias)
    spec = layer.spec
    weight = FORMAT_NUMBER[BACKEND._layout(spec).weight]
    quant = {ActivationQuant.INT8_PER_TOKEN: 1, ActivationQuant.FP8_PER_TOKEN: 2}.get(
        spec.activation_quant, 0
    )
    group = spec.group_size or 0
    return ops.linear(x, packed.packed, packed.scale, bias, spec.n, spec.k, weight, group, quant, config)


def tokens(m, k, dtype=BF16):
    return torch.randn(m, k).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(
    ("m", "config"), [(1, SELECT), (3, SELECT_SPLIT), (5, DOT_SPLIT), (18, DOT), (9, EXPAND)]
)
def test_float_weights_on_every_route(dtype, m, config):
    """Odd N, K that is no multiple of a block, bias."""
    layer = make_layer(random_24(41, 300), PLAIN[dtype], dtype)
    x, bias = tokens(m, 300, dtype), torch.randn(41).to(DEVICE, dtype)
    out = run(layer, x, bias, config)
    assert out.dtype == dtype
    assert_close_to_exact(out, x, layer.exact, bias)


@pytest.mark.parametrize(("weight", "group"), QUANTIZED)
@pytest.mark.parametrize(("m", "config"), [(2, SELECT_SPLIT), (4, DOT), (3, EXPAND)])
def test_quantised_weights(weight, group, m, config):
    k = 300 if group == 300 else 384
    layer = make_layer(random_24(20, k), weight, BF16, group)
    x = tokens(m, k)
    # The scale meets the weight in 16 bits only where one tile holds several, and in the dense expansion.
    in_sixteen_bits = config is EXPAND or (config is DOT and group is not None and group % 128 != 0)
    out = run(layer, x, None, config)
    assert_close_to_exact(out, x, layer.exact, weight_rounding=2.0**-8 if in_sixteen_bits else 0.0)


@pytest.mark.parametrize("weight", [WeightFormat.INT8, WeightFormat.FP8_E4M3])
@pytest.mark.parametrize("config", [SELECT_SPLIT, DOT, EXPAND])
def test_quantised_activations(weight, config):
    fp8 = weight is WeightFormat.FP8_E4M3
    quant = ActivationQuant.FP8_PER_TOKEN if fp8 else ActivationQuant.INT8_PER_TOKEN
    layer = make_layer(random_24(17, 260), weight, BF16, quant=quant)
    x = tokens(3, 260) * torch.tensor([[1.0], [30.0], [0.0]], device=DEVICE, dtype=BF16)
    bias = torch.randn(17).to(DEVICE, BF16)
    out = run(layer, x, bias, config)
    assert_close_to_exact(out, quantize_per_token(x.float(), quant), layer.exact, bias)


def test_quantisation_of_tokens_is_the_reference_s():
    """Numbers and scales bit for bit, ties and subnormal fp8 numbers among them, on CPU and device."""
    x = torch.cat([torch.linspace(-448, 448, 1793), torch.linspace(-0.04, 0.04, 1023)])[:2816]
    # Scales of exactly 1, and scales whose rounding decides the ties.
    x = (x * torch.tensor([[1.0], [0.03125], [0.98828125], [0.00743], [7.0]])).to(torch.float16).to(DEVICE)
    for quant, number in ((ActivationQuant.FP8_PER_TOKEN, 2), (ActivationQuant.INT8_PER_TOKEN, 1)):
        call = ops.Call(x, x, None, None, ops.Layout(1, 2816, WeightFormat.INT8), 0)
        call.quantize(fp8=number == 2)
        expected = quantize_per_token(x.float(), quant)
        assert torch.equal(call.x.float() * call.token_scale[:, None], expected)
        assert torch.equal(expected.cpu(), quantize_per_token(x.cpu().float(), quant))


@pytest.mark.parametrize("config", [SELECT_SPLIT, DOT])
def test_adversarial_weights(config):
    w = random_24(24, 264).to(BF16)
    w[0] = 0
    w[1, ::2] = -0.0
    w[2, 1::2] = 0
    w[3] = 0
    w[3, 263] = 3.0
    w[4] = torch.where(w[4] != 0, torch.tensor(torch.finfo(BF16).max, dtype=BF16), w[4])
    w[5] = torch.where(w[5] != 0, torch.tensor(torch.finfo(BF16).tiny, dtype=BF16), w[5])
    layer = make_layer(w, WeightFormat.BF16, BF16)
    packed = BACKEND.pack(layer.spec, layer.weight)
    assert torch.equal(BACKEND.unpack(layer.spec, packed.packed, None).cpu(), w)
    x = tokens(4, 264) * 2.0**-20
    assert_close_to_exact(run(layer, x, None, config), x, layer.exact)


@pytest.mark.parametrize("config", [SELECT_SPLIT, DOT])
def test_each_pair_of_positions(config):
    """Six strips of rows, each with one of the six patterns throughout, pick exactly those columns."""
    w = torch.zeros(12, 256)
    for row, (i, j) in enumerate([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]):
        w[row, i::4], w[row, j::4] = 1.0, 2.0
        w[row + 6, i:128:4], w[row + 6, (128 + j) :: 4] = 1.0, -1.0
    layer = make_layer(w, WeightFormat.BF16, BF16)
    x = torch.arange(256).remainder(61).expand(2, -1).to(DEVICE, BF16)
    assert torch.equal(run(layer, x, None, config).cpu(), (x.cpu().double() @ layer.exact.T).to(BF16))


def test_all_fp8_numbers_decode():
    """Every finite e4m3 number as a weight, subnormals included, through both kernels."""
    bits = torch.tensor([b for b in range(256) if b & 0x7F not in (0, 0x7F)], dtype=torch.uint8)
    w = torch.zeros(len(bits), 4)
    w[:, 1] = bits.view(torch.float8_e4m3fn).float()
    values, bitmask = compress(w.to(torch.float8_e4m3fn))
    layer = make_layer(w, WeightFormat.FP8_E4M3, FP16)
    ones = torch.ones(len(bits), 1, device=DEVICE)
    weight = CanonicalWeight(values.to(DEVICE), bitmask.to(DEVICE), ones)
    packed = BACKEND.pack(layer.spec, weight)
    x = torch.ones(1, 4, device=DEVICE, dtype=FP16)
    for config in (Config(Route.SELECT, 64, 1), Config(Route.DOT, 64, 16)):
        out = ops.linear(
            x,
            packed.packed,
            packed.scale,
            None,
            len(bits),
            4,
            FORMAT_NUMBER[layer.spec.weight],
            0,
            0,
            config,
        )
        assert torch.equal(out[0].cpu().float(), w[:, 1])


def test_inputs_of_any_stride_and_rank():
    layer = make_layer(random_24(16, 64), WeightFormat.BF16, BF16)
    x = tokens(24, 130).reshape(6, 4, 130)[:, ::2, 1:129:2]
    out = run(layer, x)
    assert out.shape == (6, 2, 16)
    assert_close_to_exact(out.reshape(-1, 16), x.reshape(-1, 64), layer.exact)
    padded_rows = tokens(3, 128)[:, :64]
    assert_close_to_exact(run(layer, padded_rows, None, SELECT_SPLIT), padded_rows, layer.exact)
    misaligned = tokens(1, 67)[:, 2:66]
    assert_close_to_exact(run(layer, misaligned, None, SELECT), misaligned, layer.exact)
    assert run(layer, x[:0]).shape == (0, 2, 16)
    vector = tokens(1, 64)[0]
    assert_close_to_exact(run(layer, vector)[None], vector[None], layer.exact)


@pytest.mark.parametrize("m", [1, 2, 3, 8, 33, 130] if INTERPRETED else [*range(131), 255, 256, 257, 600])
def test_default_configurations(m):
    layer = make_layer(random_24(24, 260), WeightFormat.BF16, BF16)
    x, bias = tokens(m, 260), torch.randn(24).to(DEVICE, BF16)
    assert_close_to_exact(run(layer, x, bias if m % 2 else None), x, layer.exact, bias if m % 2 else None)


def test_the_dense_route_works_in_strips(monkeypatch):
    monkeypatch.setattr(ops, "_SCRATCH_BYTES", 64)
    layer = make_layer(random_24(272, 8), WeightFormat.BF16, BF16)
    x, bias = tokens(3, 8), torch.randn(272).to(DEVICE, BF16)
    # cuBLAS may round a product to 16 bits before it adds the bias, as it may for a dense layer.
    rounding = 0.0 if INTERPRETED else torch.finfo(BF16).eps
    out = run(layer, x, bias, EXPAND)
    assert_close_to_exact(out, x, layer.exact, bias, product_rounding=rounding)
    assert_close_to_exact(run(layer, x, None, EXPAND), x, layer.exact)


@pytest.mark.parametrize("m", [1, 8])
def test_activations_of_another_dtype_are_refused(m):
    """As a dense layer refuses them: the kernels would read their bits as what they are not."""
    floats = make_layer(random_24(16, 64), WeightFormat.BF16, torch.bfloat16)
    whole = make_layer(random_24(16, 64), WeightFormat.INT8, torch.bfloat16)
    for layer, dtype in ((floats, torch.float16), (floats, torch.float32), (whole, torch.float32)):
        with pytest.raises(UnsupportedError, match=f"was given {dtype} activations; it takes torch.bfloat16"):
            run(layer, torch.randn(m, 64).to(DEVICE, dtype))


def test_the_operator_is_what_torch_compile_expects():
    layer = make_layer(random_24(16, 64), WeightFormat.INT8, BF16)
    packed = BACKEND.pack(layer.spec, layer.weight)
    number = FORMAT_NUMBER[WeightFormat.INT8]
    torch.library.opcheck(
        torch.ops.vllm_sparse.linear_24_triton.default,
        (tokens(2, 64), packed.packed, packed.scale, None, 16, 64, number, 0, 0),
        test_utils=("test_faketensor",),
    )


def test_compiled_as_one_operator():
    layer = make_layer(random_24(16, 64), WeightFormat.BF16, BF16)
    packed = BACKEND.pack(layer.spec, layer.weight)

    def forward(x):
        return BACKEND.linear(layer.spec, x * 2, packed.packed, packed.scale, None)

    x = tokens(2, 64)
    assert torch.equal(torch.compile(forward, backend="eager", fullgraph=True)(x), forward(x))


def test_unpack_agrees_with_the_reference():
    reference = ReferenceBackend()
    for weight, group in [(WeightFormat.BF16, None), *QUANTIZED[:5]]:
        layer = make_layer(random_24(20, 384), weight, BF16, group)
        ours, theirs = BACKEND.pack(layer.spec, layer.weight), reference.pack(layer.spec, layer.weight)
        assert torch.equal(
            BACKEND.unpack(layer.spec, ours.packed, ours.scale),
            reference.unpack(layer.spec, theirs.packed, theirs.scale),
        )


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("m", [1, 16, 64, 600])
def test_captured_in_a_graph(m):
    """Replay on new inputs gives what eager calls give, bit for bit."""
    layer = make_layer(random_24(1024, 2048), WeightFormat.BF16, BF16)
    packed = BACKEND.pack(layer.spec, layer.weight)
    x = tokens(m, 2048)

    def call():
        return BACKEND.linear(layer.spec, x, packed.packed, packed.scale, None)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(out, call())
