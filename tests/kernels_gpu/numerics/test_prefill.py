"""Two forms of a weight: which one multiplies, what the buffer holds, and that both are right.

On a GPU both ways are the real ones; without one cuSPARSELt is emulated. The clock is told the times.
"""

import logging

import pytest
import torch

from tests.kernels_gpu.cusparselt_emulated import Emulated
from vllm_sparse.errors import UnsupportedError
from vllm_sparse.kernels import cusparselt, dispatch, prefill
from vllm_sparse.kernels.base import ActivationQuant, LinearSpec, WeightFormat
from vllm_sparse.kernels.cuda import configs as cuda_configs
from vllm_sparse.kernels.cuda import library as cuda_library
from vllm_sparse.kernels.cusparselt import CusparseltBackend
from vllm_sparse.kernels.prefill import Times, crossover
from vllm_sparse.kernels.triton.configs import Config, Route
from vllm_sparse.kernels.triton.experts import stack
from vllm_sparse.kernels.triton.layout import Layout

from .conftest import DEVICE, INTERPRETED, PLAIN, assert_close_to_exact, make_layer, random_24

BF16, FP16 = torch.bfloat16, torch.float16
TRITON, BOTH = "triton", "triton+cusparselt"
COUNTS = (4, 8, 16, 32)
TRITON_US = 100.0


class Watched:
    """Passes calls on to cuSPARSELt and counts its products."""

    def __init__(self, ops):
        self.ops = ops
        self.products = 0

    def compress(self, dense):
        return self.ops.compress(dense)

    def multiply(self, compressed, x, bias, algorithm):
        self.products += 1
        return self.ops.multiply(compressed, x, bias, algorithm)

    def algorithms(self, compressed, x):
        return self.ops.algorithms(compressed, x)[:2]


@pytest.fixture(autouse=True)
def library(monkeypatch):
    """A process that has measured nothing, and asks for both forms."""
    watched = Watched(Emulated() if INTERPRETED else cusparselt.TorchOps())
    monkeypatch.setattr(cusparselt, "_ops", watched)
    monkeypatch.setattr(cusparselt, "_algorithms", {})
    monkeypatch.setattr(cusparselt, "TOKEN_BINS", (16, 64))
    monkeypatch.setattr(prefill, "_crossovers", {})
    monkeypatch.setattr(prefill, "TOKENS", COUNTS)
    monkeypatch.setenv(dispatch.ENV_BACKEND, TRITON)
    monkeypatch.setenv(dispatch.ENV_PREFILL, "cusparselt")
    if INTERPRETED:
        real = CusparseltBackend.unsupported_reason

        def anywhere(self, spec, device):
            reason = real(self, spec, device)
            return None if reason is not None and reason.startswith("it runs on NVIDIA") else reason

        monkeypatch.setattr(CusparseltBackend, "unsupported_reason", anywhere)
    return watched


@pytest.fixture
def clock(monkeypatch, library):
    """Microseconds of cuSPARSELt by number of tokens, faster from 16 on; and what the clock was asked."""
    told = {4: 300.0, 8: 200.0, 16: 50.0, 32: 60.0}
    asked = []

    def time(call):
        before = library.products
        out = call()
        many = library.products > before
        asked.append((out.shape[0], many))
        return told[out.shape[0]] if many else TRITON_US

    monkeypatch.setattr(prefill, "_time", time)
    return told, asked


def chosen(layer):
    return dispatch.select(layer.spec, DEVICE)


def packed_by(layer):
    selection = chosen(layer)
    return selection.backend, selection.backend.pack(layer.spec, layer.weight).packed


def tokens(m, k, dtype=BF16):
    return torch.randn(m, k).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("n", "k"), [(33, 132), (48, 260)])
@pytest.mark.parametrize("biased", [False, True])
def test_both_sides_of_the_crossover(dtype, n, k, biased, clock, library):
    layer = make_layer(random_24(n, k), PLAIN[dtype], dtype)
    backend, packed = packed_by(layer)
    assert backend.name == BOTH
    bias = torch.randn(n).to(DEVICE, dtype) if biased else None
    for m in (0, 1, 15, 16, 19, 40):
        x = tokens(m, k, dtype)
        library.products = 0
        out = backend.linear(layer.spec, x, packed, None, bias)
        assert library.products == (m >= 16), m
        assert out.dtype == dtype
        assert_close_to_exact(out, x, layer.exact, bias)


def test_leading_dimensions_and_strides_count_as_tokens(clock, library):
    layer = make_layer(random_24(33, 132), PLAIN[BF16], BF16)
    backend, packed = packed_by(layer)
    x = tokens(2 * 18, 264).view(2, 18, 264)[:, ::2, ::2]
    library.products = 0
    out = backend.linear(layer.spec, x, packed, None, None)
    assert library.products == 1
    assert out.shape == (2, 9, 33)
    assert_close_to_exact(out, x, layer.exact)


def test_the_buffer_holds_our_form_and_then_the_library_s(clock):
    layer = make_layer(random_24(33, 132), PLAIN[BF16], BF16)
    backend, packed = packed_by(layer)
    ours = dispatch.get_backend(TRITON).pack(layer.spec, layer.weight).packed
    forms = prefill.Forms(Layout(33, 132, WeightFormat.BF16), BF16)
    assert packed.dtype == torch.uint8
    assert packed.ndim == 1
    assert packed.nbytes == forms.total_bytes
    assert packed.nbytes % 256 == forms.second.start % 256 == 0
    assert torch.equal(packed[: ours.numel()], ours)
    # N and K of the second form come in multiples of 64.
    assert forms.second.stop - forms.second.start == 64 * 192 * 2 * 9 // 16
    dense = backend.unpack(layer.spec, packed, None)
    assert torch.equal(dense.cpu().double(), layer.exact)
    second = dispatch.get_backend("cusparselt").unpack(layer.spec, forms.second_of(packed), None)
    assert torch.equal(second.cpu().double(), layer.exact)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("n", "k"), [(16, 16), (33, 132), (48, 272), (64, 128), (65, 64), (144, 192)])
def test_the_library_s_form_of_any_size_has_the_shape_said(dtype, n, k):
    """On a GPU it is the library that says it."""
    layer = make_layer(random_24(n, k), PLAIN[dtype], dtype)
    backend = dispatch.get_backend("cusparselt")
    packed = backend.pack(layer.spec, layer.weight).packed
    assert packed.shape == cusparselt.compressed_shape(n, k, dtype)
    assert torch.equal(backend.unpack(layer.spec, packed, None).cpu().double(), layer.exact)


def test_a_shape_is_timed_once_and_said_once(clock, caplog):
    caplog.set_level(logging.INFO, logger=prefill.logger.name)
    layer = make_layer(random_24(33, 132), PLAIN[BF16], BF16)
    packed_by(layer)
    timed = [(m, many) for m in COUNTS for many in (False, True)]
    assert clock[1] == timed
    packed_by(layer)
    assert clock[1] == timed
    assert [record.getMessage() for record in caplog.records] == [
        "2:4 bf16 [33, 132] takes cuSPARSELt from 16 tokens on (tokens: microseconds by cuSPARSELt/by the "
        "triton kernels: 4: 300/100, 8: 200/100, 16: 50/100, 32: 60/100)"
    ]
    packed_by(make_layer(random_24(33, 132), PLAIN[FP16], FP16))
    packed_by(make_layer(random_24(34, 132), PLAIN[BF16], BF16))
    assert clock[1] == 3 * timed


def test_where_it_never_gains_one_form_is_kept(clock, library, caplog):
    caplog.set_level(logging.INFO, logger=prefill.logger.name)
    clock[0][32] = TRITON_US  # No faster at the last, however fast before.
    layer = make_layer(random_24(33, 132), PLAIN[BF16], BF16)
    selection = chosen(layer)
    assert selection.backend.name == TRITON
    assert selection.forced
    assert selection.rejected == ((BOTH, "at 32 tokens cuSPARSELt took 100 us, the triton kernels 100 us"),)
    assert "at no number of tokens" in caplog.text
    # Asked for by name it keeps one form as well.
    by_name = dispatch.get_backend(BOTH)
    packed = by_name.pack(layer.spec, layer.weight).packed
    assert packed.numel() == Layout(33, 132, WeightFormat.BF16).total_bytes
    x = tokens(40, 132)
    library.products = 0
    assert_close_to_exact(by_name.linear(layer.spec, x, packed, None, None), x, layer.exact)
    assert library.products == 0
    assert torch.equal(by_name.unpack(layer.spec, packed, None).cpu().double(), layer.exact)


def test_what_another_process_measured_does_not_matter(clock, library):
    """A kept graph calls the same operator: it looks at the buffer and at what was measured here."""
    layer = make_layer(random_24(33, 132), PLAIN[BF16], BF16)
    backend, packed = packed_by(layer)
    one_form = dispatch.get_backend(TRITON).pack(layer.spec, layer.weight).packed
    x = tokens(40, 132)
    library.products = 0
    assert_close_to_exact(backend.linear(layer.spec, x, one_form, None, None), x, layer.exact)
    prefill._crossovers.clear()
    assert_close_to_exact(backend.linear(layer.spec, x, packed, None, None), x, layer.exact)
    assert library.products == 0
    plain = dispatch.get_backend(TRITON)
    assert_close_to_exact(plain.linear(layer.spec, x, packed, None, None), x, layer.exact)


def test_what_cannot_be_timed_is_a_reason(clock, monkeypatch):
    layer = make_layer(random_24(33, 132), PLAIN[BF16], BF16)

    def full(call):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(prefill, "_time", full)
    assert chosen(layer).rejected == ((BOTH, "it could not be timed: CUDA out of memory."),)


@pytest.mark.parametrize(
    ("weight", "quant"),
    [
        (WeightFormat.INT8, ActivationQuant.NONE),
        (WeightFormat.INT8, ActivationQuant.INT8_PER_TOKEN),
        (WeightFormat.FP8_E4M3, ActivationQuant.FP8_PER_TOKEN),
        (WeightFormat.INT4, ActivationQuant.NONE),
    ],
)
def test_other_formats_keep_their_backend_with_a_reason(weight, quant, clock):
    selection = dispatch.select(LinearSpec(32, 128, weight, BF16, quant), DEVICE)
    assert selection.backend.name == TRITON
    assert [name for name, _ in selection.rejected] == [BOTH]
    assert f"not of {weight} weights with activations quantised {quant}" in selection.rejected[0][1]
    assert clock[1] == []


def test_what_cusparselt_refuses_keeps_its_backend_with_its_reason(clock, monkeypatch):
    spec = LinearSpec(32, 128, WeightFormat.BF16, BF16)
    monkeypatch.setattr(CusparseltBackend, "unsupported_reason", lambda self, spec, device: "no such library")
    selection = dispatch.select(spec, DEVICE)
    assert selection.backend.name == TRITON
    assert selection.rejected == ((BOTH, "no such library"),)
    monkeypatch.setenv(dispatch.ENV_BACKEND, BOTH)
    with pytest.raises(UnsupportedError, match="no such library"):
        dispatch.select(spec, DEVICE)


def test_heads_keep_one_form(clock):
    selection = dispatch.select(LinearSpec(32, 128, WeightFormat.BF16, BF16), DEVICE, prompts=False)
    assert selection.backend.name == TRITON
    assert "a head" in dict(selection.rejected)[BOTH]
    assert clock[1] == []


def test_the_cuda_backend_gets_it_too(clock, library, monkeypatch):
    small = []

    def default_config(shape, m, machine):
        small.append(m)
        return Config(Route.DOT, 32, 16, 1, 4, 2)

    if INTERPRETED:
        monkeypatch.setattr(cuda_library, "load_failure", lambda: None)
        monkeypatch.setattr(cuda_configs, "default_config", default_config)
    elif cuda_library.load_failure() is not None:
        pytest.skip("the CUDA C++ kernels are not built")
    monkeypatch.setenv(dispatch.ENV_BACKEND, "cuda")
    layer = make_layer(random_24(33, 132), PLAIN[BF16], BF16)
    selection = chosen(layer)
    assert selection.backend.name == "cuda+cusparselt"
    packed = selection.backend.pack(layer.spec, layer.weight).packed
    small.clear()
    library.products = 0
    for m in (3, 40):
        x = tokens(m, 132)
        assert_close_to_exact(selection.backend.linear(layer.spec, x, packed, None, None), x, layer.exact)
    assert library.products == 1
    assert small == ([3] if INTERPRETED else [])


def test_float32_weights_take_the_activations_dtype(clock, library):
    layer = make_layer(random_24(33, 132).to(BF16).float(), WeightFormat.BF16, BF16)
    spec = LinearSpec(33, 132, WeightFormat.FP32, BF16)
    weight = type(layer.weight)(layer.weight.values.float(), layer.weight.bitmask)
    backend = dispatch.select(spec, DEVICE).backend
    assert backend.name == BOTH
    packed = backend.pack(spec, weight).packed
    for m in (3, 40):
        x = tokens(m, 132)
        assert_close_to_exact(backend.linear(spec, x, packed, None, None), x, layer.exact)


def test_experts(clock, library):
    """All at once from the first form, one by one by either."""
    layers = [make_layer(random_24(24, 132, seed), PLAIN[BF16], BF16) for seed in range(3)]
    spec = layers[0].spec
    backend = chosen(layers[0]).backend
    assert backend.has_experts_operator
    stacked = stack([backend.pack(spec, layer.weight) for layer in layers]).packed
    x = tokens(20, 132)
    ids = torch.randint(0, 3, (20, 2)).to(DEVICE, torch.int32)
    library.products = 0
    out = backend.experts_linear(spec, x, stacked, None, ids)
    assert library.products == 0
    exact = torch.stack([layer.exact for layer in layers])
    for token in range(20):
        for choice in range(2):
            wanted = exact[int(ids[token, choice])]
            assert_close_to_exact(out[token, choice][None], x[token][None], wanted)
    for number, layer in enumerate(layers):
        assert_close_to_exact(backend.linear(spec, x, stacked[number], None, None), x, layer.exact)
    assert library.products == 3


def test_compiled_as_one_operator(clock, library):
    """Fullgraph, with the number of tokens unknown to the graph; the choice is made when it runs."""
    layer = make_layer(random_24(33, 132), PLAIN[BF16], BF16)
    backend, packed = packed_by(layer)
    seen = []

    def graphs(module, example):
        seen.extend(node.target for node in module.graph.nodes if "vllm_sparse" in str(node.target))
        return module.forward

    def model(x):
        return backend.linear(layer.spec, x * 2, packed, None, None)

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=graphs, fullgraph=True, dynamic=True)
    for m, products in ((3, 0), (40, 1)):
        x = tokens(m, 132)
        library.products = 0
        out = compiled(x)
        assert library.products == products
        assert torch.equal(out, model(x))
    assert [str(target) for target in seen] == ["vllm_sparse.linear_24_prefill"]
    torch.library.opcheck(
        torch.ops.vllm_sparse.linear_24_prefill,
        (tokens(3, 132), packed, None, 33, 132, 0, False),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("m", [3, 40])
def test_replayed_from_a_graph(m, clock):
    layer = make_layer(random_24(128, 256), PLAIN[BF16], BF16)
    backend, packed = packed_by(layer)
    x = tokens(m, 256)
    backend.linear(layer.spec, x, packed, None, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = backend.linear(layer.spec, x, packed, None, None)
    x.copy_(tokens(m, 256))
    graph.replay()
    assert_close_to_exact(out, x, layer.exact)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("n", "k"), [(512, 512), (33, 132)])
def test_the_clock_itself(dtype, n, k):
    """Either may be faster; that they were timed is what counts."""
    selection = dispatch.select(LinearSpec(n, k, PLAIN[dtype], dtype), DEVICE)
    if selection.backend.name == TRITON:
        assert f"at {COUNTS[-1]} tokens cuSPARSELt took" in dict(selection.rejected)[BOTH]
    else:
        assert selection.backend.name == BOTH
    assert len(prefill._crossovers) == 1


@pytest.mark.parametrize(
    ("many", "expected"),
    [([1, 1, 1], 128), ([9, 1, 1], 256), ([1, 9, 1], 512), ([1, 1, 9], None), ([5, 5, 5], None)],
)
def test_crossover(many, expected):
    """From the smallest number on from which it always is faster; as fast is not faster."""
    assert crossover([Times(m, 5.0, us) for m, us in zip((128, 256, 512), many, strict=True)]) == expected


def test_decode_stays_with_the_decode_kernels(monkeypatch):
    monkeypatch.undo()
    assert min(prefill.TOKENS) > 64
    assert sorted(set(prefill.TOKENS)) == list(prefill.TOKENS)
