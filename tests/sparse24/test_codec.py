"""The packed bytes: golden values, every dtype, both code paths, and what is refused."""

import numpy as np
import pytest
import torch

from vllm_sparse.errors import FormatError
from vllm_sparse.sparse24 import compress, decompress, is_24, pack_mask, short_group_mask, unpack_mask
from vllm_sparse.sparse24.fastpack import can_pack
from vllm_sparse.sparse24.scan import count_24

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.float8_e4m3fn]


def random_24(rows: int, cols: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """A 2:4 weight made with numpy alone; about a quarter of the groups are short."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(rows, cols // 4, 4)) * 20
    keep = np.argsort(rng.random(values.shape), axis=-1) < 2
    keep &= rng.random(values.shape) > 0.15
    weight = torch.from_numpy(np.where(keep, values, 0.0).reshape(rows, cols)).to(dtype)
    if dtype == torch.float8_e4m3fn:
        raw = weight.view(torch.uint8)
        raw[raw == 0x80] = 0
    return weight


def raw(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy()


def test_golden_byte_is_little_endian():
    mask = torch.tensor([[1, 0, 0, 1, 0, 1, 1, 0]], dtype=torch.bool)
    assert pack_mask(mask).tolist() == [[105]]
    weight = torch.tensor([[1.0, 0, 0, 2, 0, 3, 4, 0]])
    for dtype in DTYPES:
        values, bitmask = compress(weight.to(dtype))
        assert bitmask.tolist() == [[105]]
        assert values.to(torch.float32).tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (3, 16), (5, 12), (64, 1024), (2048, 2048)])
def test_against_numpy(dtype, shape):
    weight = random_24(*shape, dtype)
    values, bitmask = compress(weight)
    mask = short_group_mask(weight).numpy()
    assert (mask.reshape(-1, 4).sum(-1) == 2).all()
    assert np.array_equal(bitmask.numpy(), np.packbits(mask, axis=-1, bitorder="little"))
    width = weight.element_size()
    dense = raw(weight).reshape(*shape, width)
    assert np.array_equal(raw(values).reshape(-1, width), dense[mask])
    assert np.array_equal(raw(decompress(values, bitmask)), raw(weight))
    assert torch.equal(unpack_mask(bitmask, shape[1]), torch.from_numpy(mask))
    zeros, crowded = count_24(weight)
    assert crowded == 0
    assert zeros == int((weight.float() == 0).sum())


@pytest.mark.parametrize("dtype", DTYPES)
def test_crowded_groups_are_found_and_named(dtype):
    weight = random_24(40, 64, dtype)
    weight[17, 20:23] = torch.tensor([1.0, 2.0, 3.0]).to(dtype)
    weight[30, 60:64] = torch.ones(4).to(dtype)
    assert count_24(weight)[1] == 2
    assert not is_24(weight)
    with pytest.raises(FormatError, match=r"2 of 640 groups.*row 17, columns 20\.\.23"):
        compress(weight)


def test_negative_zero_is_zero():
    weight = torch.tensor([[-0.0, 1.0, -0.0, 2.0, -0.0, -0.0, -0.0, -0.0]])
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        assert count_24(weight.to(dtype)) == (6, 0)
        values, bitmask = compress(weight.to(dtype))
        assert torch.equal(decompress(values, bitmask).float().abs(), weight.abs())


def test_int8_minimum_is_kept():
    weight = torch.tensor([[-128, 0, 0, 1, 0, -128, 0, 0]], dtype=torch.int8)
    values, bitmask = compress(weight)
    assert torch.equal(decompress(values, bitmask), weight)


def test_a_view_with_strides_is_packed_as_its_values():
    weight = random_24(64, 128, torch.bfloat16)
    wide = torch.zeros(64, 256, dtype=torch.bfloat16)
    wide[:, ::2] = weight
    assert torch.equal(compress(wide[:, ::2])[0], compress(weight)[0])


def test_which_weights_take_the_fast_path():
    assert can_pack(torch.zeros(2, 16, dtype=torch.bfloat16))
    assert not can_pack(torch.zeros(2, 12, dtype=torch.bfloat16))
    assert not can_pack(torch.zeros(2, 16, dtype=torch.float32))


@pytest.mark.parametrize("shape", [(8,), (2, 6), (2, 3, 8)])
def test_shapes_that_are_refused(shape):
    with pytest.raises(FormatError):
        compress(torch.zeros(shape))


def test_wrong_bitmasks_are_refused():
    values, bitmask = compress(random_24(4, 16, torch.bfloat16))
    broken = bitmask.clone()
    broken[2, 1] = 0b01110011
    with pytest.raises(FormatError, match=r"1 of 16 groups.*row 2, columns 12\.\.15, 3 bits"):
        decompress(values, broken)
    with pytest.raises(FormatError, match="bytes a row"):
        decompress(values, bitmask[:, :1])
    with pytest.raises(FormatError, match="same number of rows"):
        decompress(values, bitmask[:2])
    values, bitmask = compress(random_24(4, 12, torch.float32))
    bitmask[0, 1] |= 0b10010000
    with pytest.raises(FormatError, match="pad bits"):
        decompress(values, bitmask)
