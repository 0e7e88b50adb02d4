"""Products by chosen experts, in one launch."""

import pytest
import torch

from vllm_sparse.kernels.base import ActivationQuant, WeightFormat
from vllm_sparse.kernels.reference import quantize_per_token
from vllm_sparse.kernels.triton import experts
from vllm_sparse.kernels.triton.backend import TritonBackend
from vllm_sparse.kernels.triton.configs import EXPERT_DOT_CONFIG
from vllm_sparse.kernels.triton.layout import FORMAT_NUMBER

from .conftest import DEVICE, INTERPRETED, assert_close_to_exact, make_layer, random_24

BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("weight", "group", "quant"),
    [
        (WeightFormat.BF16, None, ActivationQuant.NONE),
        (WeightFormat.INT4, 128, ActivationQuant.NONE),
        (WeightFormat.INT8, None, ActivationQuant.INT8_PER_TOKEN),
    ],
)
@pytest.mark.parametrize("config", [None, EXPERT_DOT_CONFIG])
def test_each_token_by_its_own_experts(weight, group, quant, config):
    layers = [make_layer(random_24(24, 256, seed), weight, BF16, group, quant) for seed in range(3)]
    backend = TritonBackend()
    packed = experts.stack([backend.pack(layer.spec, layer.weight) for layer in layers])
    ids = torch.tensor([[2, 0], [1, 2]], dtype=torch.int32, device=DEVICE)
    x = torch.randn(2, 256).to(DEVICE, BF16)
    number = 1 if quant is ActivationQuant.INT8_PER_TOKEN else 0
    arguments = (x, packed.packed, packed.scale, ids, 24, 256, FORMAT_NUMBER[weight], group or 0, number)
    if config is None:
        out = torch.ops.vllm_sparse.experts_linear_24_triton(*arguments)
    else:
        out = experts.experts_linear(*arguments, config)
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


def test_more_pairs_than_a_block_holds():
    """One expert with many pairs, one with none; the number of pairs chooses the grouped kernel."""
    layers = [make_layer(random_24(70, 260, seed), WeightFormat.INT8, BF16) for seed in range(3)]
    packed = experts.stack([TritonBackend().pack(layer.spec, layer.weight) for layer in layers])
    ids = torch.tensor([[2, 0]] * 7 + [[2, 2]] * 9, dtype=torch.int32, device=DEVICE)
    assert ids.numel() > experts.PAIRS_PER_EXPERT * 3
    x = torch.randn(16, 260).to(DEVICE, BF16)
    out = torch.ops.vllm_sparse.experts_linear_24_triton(
        x, packed.packed, packed.scale, ids, 70, 260, FORMAT_NUMBER[WeightFormat.INT8], 0, 0
    )
    for token in range(16):
        for choice in range(2):
            exact = layers[int(ids[token, choice])].exact
            assert_close_to_exact(out[token, choice][None], x[token][None], exact)


@pytest.mark.parametrize("pairs", [1, 5, 33, 200])
@pytest.mark.parametrize("number", [1, 3, 40])
def test_grouping_holds_every_pair_once_with_its_expert(pairs, number):
    ids = torch.randint(0, number, (pairs,), device=DEVICE) ** 2 // max(number - 1, 1)
    slots, blocks = experts.group_pairs(ids, number, 16)
    assert slots.numel() == 16 * blocks.numel()
    kept = slots[slots >= 0].long()
    assert torch.equal(kept.sort().values.cpu(), torch.arange(pairs))
    of_slot = blocks.repeat_interleave(16)[slots >= 0]
    assert torch.equal(of_slot.long(), ids[kept].long())
    # Blocks in use come first and are packed as tightly as one expert a block allows.
    used = int((blocks >= 0).sum())
    assert used == int(((torch.bincount(ids.cpu(), minlength=number) + 15) // 16).sum())
    assert bool((blocks[:used] >= 0).all())


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("tokens", [2, 64])
def test_captured_in_a_graph(tokens):
    """Replay with other experts gives what eager calls give, bit for bit."""
    layers = [make_layer(random_24(64, 512, seed), WeightFormat.BF16, BF16) for seed in range(4)]
    packed = experts.stack([TritonBackend().pack(layer.spec, layer.weight) for layer in layers])
    ids = torch.randint(0, 4, (tokens, 2), dtype=torch.int32, device=DEVICE)
    x = torch.randn(tokens, 512).to(DEVICE, BF16)

    def call():
        return experts.experts_linear(x, packed.packed, None, ids, 64, 512, 0, 0, 0)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for _ in range(3):
        ids.copy_(torch.randint_like(ids, 0, 4))
        graph.replay()
        assert torch.equal(out, call())
