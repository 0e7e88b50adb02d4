"""A layer of experts: one call over all pairs gives what products expert by expert give."""

import pytest
import torch

from vllm_sparse.kernels.base import ActivationQuant, WeightFormat
from vllm_sparse.kernels.triton import experts
from vllm_sparse.kernels.triton.backend import TritonBackend

from .conftest import DEVICE, make_layer, random_24

# The kernels are tested without vLLM too, on machines that have only torch and Triton.
MoEActivation = pytest.importorskip("vllm.model_executor.layers.fused_moe.activation").MoEActivation

from vllm_sparse.quantization import expert_layer  # noqa: E402
from vllm_sparse.quantization.expert_layer import ExpertLayer, PackedExperts, StaticScale  # noqa: E402
from vllm_sparse.quantization.spec import StaticQuant  # noqa: E402

HIDDEN, WIDTH, EXPERTS = 64, 32, 3


def projection(n: int, k: int, weight: WeightFormat, quant: ActivationQuant, static: bool) -> PackedExperts:
    backend = TritonBackend()
    layers = [
        make_layer(random_24(n, k, seed), weight, torch.bfloat16, None, quant) for seed in range(EXPERTS)
    ]
    packed = [backend.pack(layer.spec, layer.weight) for layer in layers]
    scales = [item.scale for item in packed if item.scale is not None]
    scale = StaticScale(torch.tensor(0.03).to(DEVICE), torch.tensor(2.0**-6).to(DEVICE), StaticQuant.INT8)
    experts = PackedExperts(torch.nn.Module(), "w13", layers[0].spec, backend, scale if static else None)
    return experts.keep(
        torch.stack([item.packed for item in packed]), torch.stack(scales) if scales else None
    )


@pytest.mark.parametrize(
    ("weight", "quant", "static"),
    [
        (WeightFormat.BF16, ActivationQuant.NONE, False),
        (WeightFormat.INT8, ActivationQuant.NONE, True),
        (WeightFormat.FP8_E4M3, ActivationQuant.FP8_PER_TOKEN, False),
    ],
)
def test_both_ways_agree(monkeypatch, weight, quant, static):
    layer = ExpertLayer(
        projection(2 * WIDTH, HIDDEN, weight, quant, static),
        projection(HIDDEN, WIDTH, weight, quant, static),
        MoEActivation.SILU,
    )
    x = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(9)).to(DEVICE, torch.bfloat16)
    # -1 is an expert of another rank.
    ids = torch.tensor([[0, 2], [1, -1], [-1, -1], [2, 1]], device=DEVICE)
    weights = torch.rand(4, 2, generator=torch.Generator().manual_seed(8)).to(DEVICE)
    assert layer._goes_pairwise(x, ids.numel())
    pairwise = layer.forward(x, weights, ids)
    monkeypatch.setattr(experts, "PAIRS_PER_EXPERT", 0)
    grouped = layer.forward(x, weights, ids)
    monkeypatch.setattr(expert_layer, "PAIRS_PER_EXPERT", 0)
    assert not layer._goes_pairwise(x, ids.numel())
    by_expert = layer.forward(x, weights, ids)
    assert by_expert[0].abs().max() > 0.1
    assert torch.equal(pairwise[2], torch.zeros_like(pairwise[2]))
    for result in (pairwise, grouped):
        assert (result - by_expert).abs().max() <= 0.02 * by_expert.abs().max()
