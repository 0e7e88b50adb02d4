"""Products by chosen experts, in one launch."""

import pytest
import torch

from vllm_sparse.kernels.base import ActivationQuant, WeightFormat
from vllm_sparse.kernels.reference import quantize_per_token
from vllm_sparse.kernels.triton import experts
from vllm_sparse.kernels.triton.backend import TritonBackend
from vllm_sparse.kernels.triton.layout import FORMAT_NUMBER

from .conftest import DEVICE, assert_close_to_exact, make_layer, random_24

BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("weight", "group", "quant"),
    [
        (WeightFormat.BF16, None, ActivationQuant.NONE),
        (WeightFormat.INT4, 128, ActivationQuant.NONE),
        (WeightFormat.INT8, None, ActivationQuant.INT8_PER_TOKEN),
    ],
)
def test_each_token_by_its_own_experts(weight, group, quant):
    layers = [make_layer(random_24(24, 256, seed), weight, BF16, group, quant) for seed in range(3)]
    backend = TritonBackend()
    packed = experts.stack([backend.pack(layer.spec, layer.weight) for layer in layers])
    ids = torch.tensor([[2, 0], [1, 2]], dtype=torch.int32, device=DEVICE)
    x = torch.randn(2, 256).to(DEVICE, BF16)
    number = 1 if quant is ActivationQuant.INT8_PER_TOKEN else 0
    out = torch.ops.vllm_sparse.experts_linear_24_triton(
        x, packed.packed, packed.scale, ids, 24, 256, FORMAT_NUMBER[weight], group or 0, number
    )
    assert out.shape == (2, 2, 24)
    seen = quantize_per_token(x.float(), quant) if number else x
    for token in range(2):
        for choice in range(2):
            exact = layers[int(ids[token, choice])].exact
            assert_close_to_exact(out[token, choice][None], seen[token][None], exact)


def test_no_tokens():
    ids = torch.zeros(0, 2, dtype=torch.int32, device=DEVICE)
    packed = torch.zeros(3, 4608, dtype=torch.uint8, device=DEVICE)
    x = torch.zeros(0, 256, device=DEVICE, dtype=BF16)
    assert experts.experts_linear(x, packed, None, ids, 16, 256, 0, 0, 0).shape == (0, 2, 16)
