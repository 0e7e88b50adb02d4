"""The packed bytes: golden values, every dtype, both code paths, and what is refused."""

import numpy as np
import pytest
import torch

from vllm_sparse.errors import FormatError
from vllm_sparse.sparse24 import (
    compress,
    decompress,
    fastpack,
    is_24,
    native,
    pack_mask,
    scan,
    short_group_mask,
    unpack_mask,
)
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


def _encoded(values: np.ndarray, floating: bool, how: str) -> tuple[bool, bytes, bytes]:
    kept = np.empty((values.shape[0], values.shape[1] // 2), values.dtype)
    bitmask = np.empty((values.shape[0], values.shape[1] // 8), np.uint8)
    if how == "numpy":
        crowded = fastpack._pack_rows_numpy(values, floating, kept, bitmask)
    else:
        positions = fastpack._kept_positions()
        crowded = native.encode(values, floating, positions, kept, bitmask, vectors=how == "vectors")
    return crowded, kept.tobytes(), bitmask.tobytes()


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("floating", [True, False])
@pytest.mark.parametrize("cols", [8, 24, 64, 1000])
def test_compiled_encoder_equals_numpy(width, floating, cols):
    if not native.available(width):
        pytest.skip("the CPU kernels' library is not built here")
    rng = np.random.default_rng(cols)
    keep = np.argsort(rng.random((37, cols // 4, 4)), axis=-1) < 2
    keep &= rng.random(keep.shape) > 0.2
    dtype = {1: np.uint8, 2: np.uint16}[width]
    # Every bit pattern, negative zeros among them.
    values = rng.integers(0, 1 << (8 * width), keep.shape).astype(dtype) * keep
    values[0, 0] = np.array([1 << (8 * width - 1), 0, 0, 1])
    values = np.ascontiguousarray(values.reshape(37, cols))
    expected = _encoded(values, floating, "numpy")
    assert not expected[0]
    assert _encoded(values, floating, "scalar") == expected
    assert _encoded(values, floating, "vectors") == expected
    bits = scan.nonzero_bits(values, floating)
    nonzero, crowded = int(np.bitwise_count(bits).sum(dtype=np.int64)), int(scan.CROWDED[bits].sum())
    for vectors in (False, True):
        assert native.count(values, floating, vectors) == (nonzero, crowded)
    values[-1, -4:] = 3
    assert native.count(values, floating)[1] == 1
    assert all(_encoded(values, floating, how)[0] for how in ("numpy", "scalar", "vectors"))


@pytest.mark.parametrize("dtype", list(scan.EXPONENT), ids=str)
@pytest.mark.parametrize("compiled", [True, False])
def test_nan_and_inf_are_found_wherever_they_are(dtype, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(native, "available", lambda width, widths=(1, 2): False)
    # Longer than one step, on the threads of several; every finite bit pattern of the short types.
    numbers = torch.arange(5 << 20, dtype=torch.int64) * 2_654_435_761
    numbers = numbers.view(torch.uint8)[: 5 << 20].view(dtype).clone()
    raw = numbers.view(torch.uint8).view(numbers.numel(), dtype.itemsize)
    wide = numbers.to(torch.float64)
    raw[~torch.isfinite(wide)] = 0
    assert not scan.any_nonfinite(numbers)
    values = [float("nan"), -float("nan")]
    values += [] if dtype is torch.float8_e4m3fn else [float("inf"), -float("inf")]
    for place in (0, 777, numbers.numel() - 1):
        for value in values:
            broken = numbers.clone()
            broken[place] = torch.tensor(value, dtype=torch.float64).to(dtype)
            assert scan.any_nonfinite(broken)
    assert scan.any_nonfinite(torch.tensor(float("nan"), dtype=torch.float32).to(dtype))
    assert not scan.any_nonfinite(torch.zeros(0, dtype=dtype))


def test_packing_in_chunks_equals_packing_at_once():
    weight = random_24(700, 1024, torch.bfloat16)
    values, bitmask = compress(weight)
    kept, bits = np.zeros((700, 512), np.uint16), np.zeros((700, 128), np.uint8)

    def sink(row: int, some: np.ndarray, their_bits: np.ndarray) -> None:
        kept[row : row + len(some)], bits[row : row + len(some)] = some, their_bits

    fastpack.pack_chunks(weight, sink)
    assert np.array_equal(kept.view(np.uint8), raw(values))
    assert np.array_equal(bits, bitmask.numpy())
    weight[699, 1020:] = 1
    with pytest.raises(FormatError, match=r"row 699, columns 1020\.\.1023"):
        fastpack.pack_chunks(weight, sink)
