"""Matrix units (AMX), for any number of tokens; ``test_emulation.py`` runs this where there are none."""

import pytest
import torch

from vllm_sparse.kernels import library
from vllm_sparse.kernels.base import ActivationQuant, WeightFormat
from vllm_sparse.kernels.cpu import CpuBackend

from .conftest import LEVELS, assert_close_to_exact, float_layer, quantized_layer

pytestmark = pytest.mark.skipif("amx_tiles" not in LEVELS, reason="needs AMX, and the kernels to be built")
BACKEND = CpuBackend()
BF16, FP16 = 0, 1


@pytest.fixture
def tiles():
    before = library.current_isa().name.lower()
    library.set_isa("amx_tiles")
    yield
    library.set_isa(before)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("m", [513, 1030])
def test_more_tokens_than_share_an_expansion(tiles, threads, m, count):
    threads(count)
    layer = float_layer(200, 1100, torch.bfloat16)
    packed = BACKEND.pack(layer.spec, layer.weight).packed
    x = torch.randn(m, 1100, generator=torch.Generator().manual_seed(m)).to(torch.bfloat16)
    assert_close_to_exact(BACKEND.linear(layer.spec, x, packed, None, None), x, layer.dense)


@pytest.mark.parametrize(
    ("kind", "group", "quant"),
    [
        (WeightFormat.INT8, None, ActivationQuant.NONE),
        (WeightFormat.FP8_E4M3, None, ActivationQuant.NONE),
        (WeightFormat.INT4, 32, ActivationQuant.NONE),
        (WeightFormat.INT8, None, ActivationQuant.INT8_PER_TOKEN),
        (WeightFormat.INT4, 128, ActivationQuant.INT8_PER_TOKEN),
        (WeightFormat.INT4, 192, ActivationQuant.INT8_PER_TOKEN),
        (WeightFormat.INT4, 96, ActivationQuant.INT8_PER_TOKEN),  # not whole steps: the loops themselves
    ],
)
def test_other_formats_agree_with_the_loops(tiles, kind, group, quant):
    """The same sums in another order; integers are the same to the bit."""
    spec, weight, _ = quantized_layer(kind, 72, 1152, torch.bfloat16, group, quant)
    packed = BACKEND.pack(spec, weight)
    x = torch.randn(600, 1152, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    ours = BACKEND.linear(spec, x, packed.packed, packed.scale, None)
    library.set_isa("avx512bf16")
    loops = BACKEND.linear(spec, x, packed.packed, packed.scale, None)
    if quant is not ActivationQuant.NONE and (group is None or group % 64):
        assert torch.equal(ours, loops)
    largest = float(loops.float().abs().max())
    assert float((ours.float() - loops.float()).abs().max()) < 2.0**-7 * largest
    assert float((ours != loops).float().mean()) < 0.02


def test_it_is_never_chosen_by_itself():
    assert library.Isa.AMX_TILES in library.supported_levels()
    assert library.current_isa() is not library.Isa.AMX_TILES


def test_from_how_many_tokens_on(tiles):
    assert library.many_tokens_from(BF16) == 1
    assert library.many_tokens_from(FP16) is None


@pytest.mark.parametrize("kind", [0, 2, 3, 4, 5, 6])
def test_both_ways_are_compared_and_timed(tiles, kind):
    """What a process goes through at its first product; it ends in an exception where the two disagree."""
    found = library.many_tokens_from(kind, measure=True)
    assert found is None or found >= 2
