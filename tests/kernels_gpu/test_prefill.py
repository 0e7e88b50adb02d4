"""What the load report says of layers with two forms of their weights; packing alone, which needs no GPU."""

from types import SimpleNamespace

import pytest
import torch

from vllm_sparse.kernels import cusparselt, dispatch, prefill
from vllm_sparse.kernels.base import CanonicalWeight, LinearSpec, WeightFormat
from vllm_sparse.kernels.cusparselt import CusparseltBackend
from vllm_sparse.kernels.triton.backend import TritonBackend
from vllm_sparse.kernels.triton.layout import Layout
from vllm_sparse.sparse24 import compress, topk_mask

from .cusparselt_emulated import Emulated

pytest.importorskip("triton")
N, K = 48, 260
SPEC = LinearSpec(N, K, WeightFormat.BF16, torch.bfloat16)
ONE_FORM = Layout(N, K, WeightFormat.BF16).total_bytes
BOTH_FORMS = prefill.Forms(Layout(N, K, WeightFormat.BF16), torch.bfloat16).total_bytes


@pytest.fixture(autouse=True)
def process(monkeypatch):
    """A process on a pretended GPU where cuSPARSELt always takes the microseconds in the list returned."""
    many = [1.0]

    def time(call):
        return 2.0 if getattr(call.func, "__name__", "") == "linear" else many[0]

    for backend in (TritonBackend, CusparseltBackend):
        monkeypatch.setattr(backend, "unsupported_reason", lambda self, spec, device: None)
    monkeypatch.setattr(cusparselt, "_ops", Emulated())
    monkeypatch.setattr(cusparselt, "_algorithms", {})
    monkeypatch.setattr(prefill, "_crossovers", {})
    monkeypatch.setattr(prefill, "TOKENS", (128, 256))
    monkeypatch.setattr(prefill, "_time", time)
    monkeypatch.setenv(dispatch.ENV_BACKEND, "triton")
    monkeypatch.setenv(dispatch.ENV_PREFILL, "cusparselt")
    return many


def random_24(n, k, dtype):
    dense = torch.randn(n, k, generator=torch.Generator().manual_seed(1))
    return (dense * topk_mask(dense.abs())).to(dtype)


def weight():
    return CanonicalWeight(*compress(random_24(N, K, torch.bfloat16)))


def loaded(monkeypatch, layer):
    """The report and its lines after one layer."""
    pytest.importorskip("vllm")
    from vllm_sparse.quantization import linear, report

    said = []
    monkeypatch.setattr(report.logger, "info", lambda text, *values: said.append(text % values))
    made = report.LoadReport(pending=9)
    linear.pack_into(layer, SPEC, weight(), made)
    assert made.dense_equivalent_bytes == 2 * N * K
    return made, said


def test_resident_bytes_count_both_forms(monkeypatch):
    layer = SimpleNamespace()
    made, said = loaded(monkeypatch, layer)
    # N and K of the second form come in multiples of 64.
    assert BOTH_FORMS >= ONE_FORM + 2 * 64 * 320 * 9 // 16
    assert made.resident_bytes == layer.weight_packed.nbytes == BOTH_FORMS
    assert said[0].startswith(f"2:4 bf16 [{N}, {K}] takes cuSPARSELt from 128 tokens on")
    assert said[1:] == [f"2:4 bf16 [{N}, {K}] runs on the triton+cusparselt kernels"]
    assert set(made.formats) == {("bf16", "triton+cusparselt")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k"), [(4, 4), (33, 132), (48, 272), (64, 128), (65, 64), (144, 192)])
def test_any_size_gets_its_second_form(n, k, dtype):
    """Whatever the library adds to a form, and though it cannot search algorithms for float16."""
    dense = random_24(n, k, dtype)
    spec = LinearSpec(n, k, WeightFormat.from_dtype(dtype), dtype)
    selection = dispatch.select(spec, torch.device("cpu"))
    assert selection.backend.name == "triton+cusparselt", selection.rejected
    packed = selection.backend.pack(spec, CanonicalWeight(*compress(dense))).packed
    forms = prefill.Forms(Layout(n, k, spec.weight), dtype)
    assert packed.numel() == forms.total_bytes
    second = dispatch.get_backend("cusparselt").unpack(spec, forms.second_of(packed), None)
    assert torch.equal(second, dense)


def test_without_a_gain_the_report_says_so(monkeypatch, process):
    process[0] = 3.0
    made, said = loaded(monkeypatch, SimpleNamespace())
    assert made.resident_bytes == ONE_FORM
    assert said[0].startswith(f"2:4 bf16 [{N}, {K}] takes cuSPARSELt at no number of tokens")
    assert said[1:] == [
        f"2:4 bf16 [{N}, {K}] runs on the triton kernels (not triton+cusparselt: at 256 tokens cuSPARSELt "
        "took 3 us, the triton kernels 2 us)"
    ]
    assert set(made.formats) == {("bf16", "triton")}


def test_a_head_keeps_one_form(monkeypatch):
    embedding = pytest.importorskip("vllm.model_executor.layers.vocab_parallel_embedding")
    head = embedding.ParallelLMHead.__new__(embedding.ParallelLMHead)
    torch.nn.Module.__init__(head)
    made, said = loaded(monkeypatch, head)
    assert made.resident_bytes == ONE_FORM
    assert "not triton+cusparselt: a head multiplies few tokens" in said[0]


def test_the_form_that_takes_a_dense_copy_is_packed_first(monkeypatch):
    """The copy is gone when anything else is allocated."""
    order = []
    for backend in (CusparseltBackend, TritonBackend):
        real = backend.pack

        def pack(self, spec, canonical, real=real):
            order.append(self.name)
            return real(self, spec, canonical)

        monkeypatch.setattr(backend, "pack", pack)
    backend = dispatch.select(SPEC, torch.device("cpu")).backend
    order.clear()
    backend.pack(SPEC, weight())
    assert order == ["cusparselt", "triton"]


def test_advice_is_that_of_the_kernels_for_few_tokens(monkeypatch):
    monkeypatch.setattr(TritonBackend, "advice", lambda self, spec: "build them")
    assert dispatch.get_backend("triton+cusparselt").advice(SPEC) == "build them"
