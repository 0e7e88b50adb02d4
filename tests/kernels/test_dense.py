"""The dense bf16 and int8 kernels for what a checkpoint leaves dense, and the head that uses it."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from vllm_sparse.errors import UnsupportedError, UserError
from vllm_sparse.kernels import dense, library

from .conftest import LEVELS, assert_close_to_exact

# AVX-512 without BF16 has AVX2's; AMX has that of AVX-512 BF16.
DENSE_LEVELS = [name for name in ("avx2", "avx512", "avx512bf16") if name in LEVELS]
pytestmark = pytest.mark.skipif(not DENSE_LEVELS, reason="the dense kernels need AVX2, and to be built")


@pytest.fixture(autouse=True, params=DENSE_LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test runs at each level that has dense kernels."""
    before = library.current_isa()
    library.set_isa(request.param)
    yield request.param
    library.set_isa(before.name.lower())


def matrix(n: int, k: int) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(n)).bfloat16()


SHAPES = pytest.mark.parametrize(("n", "k"), [(8, 64), (1, 1), (33, 132), (100, 260), (24, 2112), (16, 4097)])


def check_every_token_count(panels: dense.Panels, w: torch.Tensor) -> None:
    for m in [*range(34), 129, 300]:
        x = torch.randn(m, panels.k).bfloat16()
        bias = torch.randn(panels.n).bfloat16() if m % 2 else None
        out = dense.linear(x, panels, bias)
        assert out.shape == (m, panels.n)
        assert_close_to_exact(out, x, w, bias)
        wide = dense.linear(x, panels, bias, wide=True)
        assert wide.dtype == torch.float32
        assert torch.equal(wide.bfloat16(), out)
        exact = x.double() @ w.double().T + (0 if bias is None else bias.double())
        torch.testing.assert_close(wide.double(), exact, rtol=1e-5, atol=1e-4)


@SHAPES
def test_every_token_count(n, k):
    w = matrix(n, k)
    check_every_token_count(dense.pack(w), w)


@SHAPES
def test_int8_is_the_rounded_weight(n, k):
    w = matrix(n, k)
    w[0] = 0
    codes, scales = dense.quantise(w)
    rounded = codes.double() * scales.double().unsqueeze(1)
    # Half a step of each row's own scale, and nothing at all for a row of zeros.
    assert bool(((rounded - w.double()).abs() <= 0.5001 * scales.double().unsqueeze(1)).all())
    check_every_token_count(dense.pack_int8(w), rounded)


def test_threads_shapes_and_strides(threads):
    w = matrix(200, 576)
    packed = dense.pack(w)
    x = torch.randn(3, 14, 1152).bfloat16()[:, ::2, ::2]
    results = []
    for count in (1, 2, 3, 4):
        threads(count)
        results.append(dense.linear(x, packed, None))
    assert results[0].shape == (3, 7, 200)
    assert all(torch.equal(results[0], other) for other in results)
    assert_close_to_exact(results[0], x, w)


def test_non_finite_activations_reach_every_row():
    w = matrix(16, 64)
    x = torch.randn(3, 64).bfloat16()
    x[0, 5], x[2, 9] = float("inf"), float("nan")
    out = dense.linear(x, dense.pack(w), None)
    assert bool((out[0].isinf() | out[0].isnan()).all())
    assert bool(out[1].isfinite().all())
    assert bool(out[2].isnan().all())


def test_opcheck_and_compile():
    w = matrix(32, 128)
    packed = dense.pack(w)
    x = torch.randn(3, 128).bfloat16()
    int8 = dense.pack_int8(w)
    for panels in (packed, int8):
        for wide in (False, True):
            arguments = (x, panels.packed, panels.scale, torch.randn(32), 32, 128, wide)
            torch.library.opcheck(torch.ops.vllm_sparse.linear_dense, arguments)
    compiled = torch.compile(lambda x: dense.linear(x, packed, None) + 1, fullgraph=True)
    torch.testing.assert_close(compiled(x), dense.linear(x, packed, None) + 1)


def test_what_it_cannot_take_is_refused():
    with pytest.raises(UnsupportedError, match="float16"):
        dense.pack(torch.zeros(8, 64, dtype=torch.float16))
    packed = dense.pack(matrix(32, 128))
    x = torch.randn(3, 128)
    with pytest.raises(RuntimeError, match="bf16 CPU tensor"):
        dense.linear(x, packed, None)
    with pytest.raises(RuntimeError, match="packed weight"):
        dense.linear(x.bfloat16(), replace(packed, packed=packed.packed[1:]), None)
    library.set_isa("scalar")
    assert "it needs avx2; this is scalar" in dense.unsupported_reason(matrix(8, 64))
    with pytest.raises(RuntimeError, match="need AVX2"):
        dense.linear(x.bfloat16(), packed, None)


@pytest.mark.parametrize("taken", [True, False])
def test_a_dense_head_computes_what_vllm_would(monkeypatch, taken):
    pytest.importorskip("vllm")
    from vllm_sparse.quantization import dense_head

    monkeypatch.setenv("VLLM_SPARSE_DENSE_HEAD", str(int(taken)))
    head, embedding = torch.nn.Module(), torch.nn.Module()
    head.weight = embedding.weight = torch.nn.Parameter(matrix(256, 128), requires_grad=False)
    method = dense_head.head_method()
    assert isinstance(method, dense_head.DenseHeadMethod) is taken
    for layer in (embedding, head):
        method.process_weights_after_loading(layer)
    assert hasattr(head, "head_panels") is taken
    if taken:
        assert head.head_panels is embedding.head_panels  # one copy for a tied pair
        assert list(head.state_dict()) == ["weight"]
    for m in (0, 1, dense_head.MAX_TOKENS, dense_head.MAX_TOKENS + 1):
        x = torch.randn(m, 128).bfloat16()
        bias = torch.randn(256).bfloat16()
        logits = method.apply(head, x, bias)
        ours = taken and (m <= dense_head.MAX_TOKENS or not library.current_isa().has_bf16)
        assert logits.dtype == (torch.float32 if ours else torch.bfloat16)
        torch.testing.assert_close(logits.bfloat16(), F.linear(x, head.weight, bias))
    tokens = torch.tensor([3, 255])
    assert torch.equal(method.embedding(embedding, tokens), head.weight[tokens])


def test_a_head_in_int8(monkeypatch):
    pytest.importorskip("vllm")
    from vllm_sparse.quantization import dense_head

    monkeypatch.setenv("VLLM_SPARSE_DENSE_HEAD", "int8")
    head, embedding = torch.nn.Module(), torch.nn.Module()
    head.weight = embedding.weight = torch.nn.Parameter(matrix(256, 128), requires_grad=False)
    method = dense_head.head_method()
    torch.set_default_dtype(torch.bfloat16)  # as vLLM does while it loads a bf16 model
    try:
        for layer in (embedding, head):
            method.process_weights_after_loading(layer)
    finally:
        torch.set_default_dtype(torch.float32)
    assert head.head_panels is embedding.head_panels
    codes, scales = dense.quantise(head.weight)
    rounded = codes.double() * scales.double().unsqueeze(1)
    for m in (0, 1, dense_head.MAX_TOKENS + 1, 70):
        x = torch.randn(m, 128).bfloat16()
        logits = method.apply(head, x)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits.double(), x.double() @ rounded.T, rtol=1e-5, atol=1e-4)
    tokens = torch.tensor([3, 255])
    assert torch.equal(method.embedding(embedding, tokens), head.weight[tokens])


def test_a_head_in_int8_is_never_another_one(monkeypatch):
    pytest.importorskip("vllm")
    from vllm_sparse.quantization import dense_head

    monkeypatch.setenv("VLLM_SPARSE_DENSE_HEAD", "int8")
    head = torch.nn.Module()
    head.weight = torch.nn.Parameter(matrix(256, 128).half(), requires_grad=False)
    with pytest.raises(UnsupportedError, match="int8 cannot be served: it takes bfloat16"):
        dense_head.head_method().process_weights_after_loading(head)
    monkeypatch.setenv("VLLM_SPARSE_DENSE_HEAD", "int7")
    with pytest.raises(UserError, match="'int7' is unknown; allowed are 0, 1, int8"):
        dense_head.head_method()
