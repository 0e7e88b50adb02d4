"""The CUDA C++ kernels against float64: on a GPU where there is one, else on an emulated one.

The emulator runs the kernels' own source. It checks every address, lets asynchronous copies and products end
as late as allowed or at once, shuffles the threads, fills shared memory with NaN, and does ``mma.sp`` and
``wgmma.mma_async.sp`` as the PTX manual describes them.
"""

from dataclasses import replace

import pytest
import torch

from vllm_sparse.errors import UnsupportedError
from vllm_sparse.kernels.base import ActivationQuant, CanonicalWeight, LinearSpec, WeightFormat
from vllm_sparse.kernels.cuda import configs, library, mma_sp
from vllm_sparse.kernels.cuda.backend import CudaBackend
from vllm_sparse.kernels.reference import quantize_per_token
from vllm_sparse.kernels.triton import ops, tables
from vllm_sparse.kernels.triton.configs import Config, Machine, Route, Shape
from vllm_sparse.kernels.triton.layout import FORMAT_NUMBER, Layout
from vllm_sparse.sparse24 import compress

from .conftest import DEVICE, INTERPRETED, PLAIN, assert_close_to_exact, make_layer, random_24

BACKEND = CudaBackend()
BF16, FP16 = torch.bfloat16, torch.float16
ONE = Config(Route.MMA_SP, 64, 8, 1, 4, 3)
SPLIT = Config(Route.MMA_SP, 64, 16, 2, 4, 2)
WIDE = Config(Route.MMA_SP, 32, 32, 1, 2, 4)
LARGE = Config(Route.MMA_SP, 64, 64, 1, 2, 2)
LARGE_INT4 = Config(Route.MMA_SP, 32, 64, 1, 2, 2)
GROUP = Config(Route.WGMMA_SP, 64, 16, 1, 4, 3)
GROUP_SPLIT = Config(Route.WGMMA_SP, 64, 8, 2, 4, 4)
GROUP_WIDE = Config(Route.WGMMA_SP, 128, 32, 1, 4, 5)
GROUP_LARGE = Config(Route.WGMMA_SP, 128, 64, 1, 4, 6)
TWO_GROUPS = Config(Route.WGMMA_SP, 128, 16, 1, 8, 4)
GROUPS = [GROUP, GROUP_SPLIT, GROUP_WIDE, GROUP_LARGE, TWO_GROUPS]
CLUSTERS = [
    Config(Route.MMA_SP, 64, 16, 2, 4, 2, cluster=True),
    Config(Route.WGMMA_SP, 64, 8, 4, 4, 4, cluster=True),
    Config(Route.WGMMA_SP, 128, 64, 2, 4, 3, cluster=True),
    # More parts than blocks of columns: some add zeros.
    Config(Route.MMA_SP, 64, 8, 8, 4, 3, cluster=True),
]
# Many tokens: splitting K, all sizes of instances.
TMA = Config(Route.WGMMA_SP_TMA, 128, 64, 1, 8, 6)
TMA_TALL = Config(Route.WGMMA_SP_TMA, 256, 64, 1, 8, 6)
TMA_SPLIT = Config(Route.WGMMA_SP_TMA, 64, 128, 2, 4, 4)
TMA_LARGE = Config(Route.WGMMA_SP_TMA, 128, 256, 1, 8, 3)
TMA_MIDDLE = Config(Route.WGMMA_SP_TMA, 128, 128, 1, 8, 5)
TMAS = [TMA, TMA_TALL, TMA_SPLIT, TMA_LARGE, TMA_MIDDLE]
HOPPER = INTERPRETED or torch.cuda.get_device_capability() == (9, 0)
if not HOPPER:
    GROUPS, CLUSTERS, TMAS = [], [], []
QUANTIZED = [(WeightFormat.INT8, None), (WeightFormat.FP8_E4M3, None), (WeightFormat.INT4, 128)]


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """The emulated library, or the real one on a GPU."""
    mma_sp.unsupported_reason.cache_clear()
    if not INTERPRETED:
        if library.load_failure() is not None:
            pytest.skip(f"{library.load_failure()}")
        yield None
        return
    from .emulated import EmulatedLibrary

    emulated = EmulatedLibrary()
    monkeypatch.setattr(library, "_load", lambda: (emulated, None))
    yield emulated
    mma_sp.unsupported_reason.cache_clear()


def run(layer, x, bias=None, config=None):
    packed = BACKEND.pack(layer.spec, layer.weight)
    if config is None:
        return BACKEND.linear(layer.spec, x, packed.packed, packed.scale, bias)
    spec = layer.spec
    weight = FORMAT_NUMBER[BACKEND._layout(spec).weight]
    quant = {ActivationQuant.INT8_PER_TOKEN: 1, ActivationQuant.FP8_PER_TOKEN: 2}.get(
        spec.activation_quant, 0
    )
    assert packed.packed.numel() == BACKEND._layout(spec).total_bytes
    return ops.linear(
        x, packed.packed, packed.scale, bias, spec.n, spec.k, weight, spec.group_size or 0, quant, config
    )


def tokens(m, k, dtype=BF16):
    return torch.randn(m, k).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(
    ("m", "config"),
    [
        *[(1, ONE), (8, ONE), (13, SPLIT), (32, WIDE), (33, LARGE), (64, LARGE), (21, ONE)],
        *zip((16, 7, 33, 64, 5), GROUPS, strict=False),
        *zip((41, 20), GROUPS, strict=False),
        *zip((13, 8, 70, 3), CLUSTERS, strict=False),
        *zip((5, 70, 130, 257, 129), TMAS, strict=False),
    ],
)
def test_float_weights(dtype, m, config):
    """Odd N, K that is no multiple of a block, bias; more tokens than a pass takes."""
    layer = make_layer(random_24(41, 780), PLAIN[dtype], dtype)
    x, bias = tokens(m, 780, dtype), torch.randn(41).to(DEVICE, dtype)
    out = run(layer, x, bias, config)
    assert out.dtype == dtype
    assert_close_to_exact(out, x, layer.exact, bias)


@pytest.mark.skipif(not INTERPRETED, reason="modes of the emulator")
@pytest.mark.parametrize(("eager_copies", "eager_products"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("config", [ONE, SPLIT, WIDE, *GROUPS, *CLUSTERS[:3], *TMAS])
def test_any_timing_of_copies_and_threads(machine, eager_copies, eager_products, config):
    """The same bits whatever the order: no missing wait, no memory reused too early."""
    layer = make_layer(random_24(70, 1540), WeightFormat.BF16, BF16)
    x = tokens(6, 1540)
    results = []
    for seed in (0, 3, 4):
        machine.eager_copies, machine.eager_products, machine.seed = eager_copies, eager_products, seed
        results.append(run(layer, x, None, config))
    assert_close_to_exact(results[0], x, layer.exact)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.skipif(not HOPPER, reason="needs compute capability 9.0")
@pytest.mark.parametrize("eager_copies", [False, True])
@pytest.mark.parametrize("config", [TMA, TMA_SPLIT])
def test_any_number_of_programs_for_the_same_tiles(machine, eager_copies, config):
    """Tiles of tokens, rows and parts of K, the last parts empty; taken in turns by 1, 5 or 64 programs."""
    layer = make_layer(random_24(140, 396), WeightFormat.BF16, BF16)
    x, bias = tokens(150, 396), torch.randn(140).to(DEVICE, BF16)
    config = replace(config, split_k=4 if config is TMA_SPLIT else 1)
    results = []
    for programs, seed in ((0, 0), (1, 3), (1, 4), (5, 0), (64, 1)):
        if machine is not None:
            machine.eager_copies, machine.seed = eager_copies, seed
        results.append(run(layer, x, bias, replace(config, programs=programs)))
    assert_close_to_exact(results[0], x, layer.exact, bias)
    assert all(torch.equal(results[0], result) for result in results[1:])


@pytest.mark.skipif(not INTERPRETED, reason="modes of the emulator")
def test_the_emulator_finds_what_it_is_there_for(monkeypatch):
    """Metadata that the hardware does not define, memory outside the tensors: errors in words."""
    from . import emulated

    x = tokens(2, 256)
    zeros = torch.zeros(Layout(16, 256, WeightFormat.BF16).total_bytes, dtype=torch.uint8)
    with pytest.raises(UnsupportedError, match="metadata 0 is not in order"):
        ops.linear(x, zeros, None, None, 16, 256, 0, 0, 0, ONE)
    layer = make_layer(random_24(16, 256), WeightFormat.BF16, BF16)
    right = emulated._ranges
    monkeypatch.setattr(
        emulated, "_ranges", lambda p, splits: [(start, size - 2) for start, size in right(p, splits)]
    )
    with pytest.raises(UnsupportedError, match="outside the call's tensors"):
        run(layer, x, None, ONE)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("weight", "group"), QUANTIZED)
@pytest.mark.parametrize(
    ("m", "config"),
    [
        *[(2, ONE), (5, SPLIT), (40, WIDE), (40, LARGE), (70, LARGE)],
        *zip((9, 8, 40, 70, 16), GROUPS, strict=False),
        *zip((5, 8, 40), CLUSTERS, strict=False),
        *zip((70, 3, 9), TMAS[:3], strict=False),
    ],
)
def test_quantised_weights(dtype, weight, group, m, config):
    if weight is WeightFormat.INT4 and config is LARGE:
        config = LARGE_INT4
    layer = make_layer(random_24(20, 384), weight, dtype, group)
    x = tokens(m, 384, dtype)
    bias = torch.randn(20).to(DEVICE, dtype)
    # For many tokens int4's scales are applied to the weights, in 16 bits.
    rounding = torch.finfo(dtype).eps if group and config in TMAS else 0.0
    assert_close_to_exact(run(layer, x, bias, config), x, layer.exact, bias, weight_rounding=rounding)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16, BF16])
def test_int4_scales_of_any_stored_type(scale_dtype):
    """Groups of 256; scales that fit 16 bits are stored so."""
    layer = make_layer(random_24(24, 512), WeightFormat.INT4, BF16, 256)
    value = {torch.float32: 0.1, torch.float16: 1.0009765625, BF16: 0.0625}[scale_dtype]
    scale = torch.full((24, 2), value, device=DEVICE)
    scale[:, 1] *= 2
    stored = CanonicalWeight(layer.weight.values, layer.weight.bitmask, scale)
    packed = BACKEND.pack(layer.spec, stored)
    assert packed.scale.dtype == scale_dtype
    x = tokens(3, 512)
    out = ops.linear(x, packed.packed, packed.scale, None, 24, 512, 4, 256, 0, ONE)
    dense = BACKEND.unpack(layer.spec, packed.packed, None).double().reshape(24, 2, 256)
    exact = (dense * scale.double().unsqueeze(-1)).reshape(24, 512)
    assert_close_to_exact(out, x, exact.cpu())


@pytest.mark.parametrize("weight", [WeightFormat.INT8, WeightFormat.FP8_E4M3])
@pytest.mark.parametrize("config", [ONE, SPLIT, *GROUPS[:2], *CLUSTERS[:2], *TMAS])
def test_quantised_activations(weight, config):
    """Three tokens of very different sizes; K that is no multiple of a copy's 16 bytes."""
    fp8 = weight is WeightFormat.FP8_E4M3
    quant = ActivationQuant.FP8_PER_TOKEN if fp8 else ActivationQuant.INT8_PER_TOKEN
    layer = make_layer(random_24(17, 260), weight, BF16, quant=quant)
    x = tokens(3, 260) * torch.tensor([[1.0], [30.0], [0.0]], device=DEVICE, dtype=BF16)
    bias = torch.randn(17).to(DEVICE, BF16)
    out = run(layer, x, bias, config)
    # Hopper adds the products of fp8 numbers with some 14 bits.
    rounding = 2.0**-12 if fp8 and config in TMAS and not INTERPRETED else 0.0
    expected = quantize_per_token(x.float(), quant)
    assert_close_to_exact(out, expected, layer.exact, bias, weight_rounding=rounding)


@pytest.mark.parametrize("config", [ONE, SPLIT, *GROUPS[:2], *TMAS[:2]])
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
    x = tokens(4, 264) * 2.0**-20
    assert_close_to_exact(run(layer, x, None, config), x, layer.exact)


@pytest.mark.parametrize(
    ("few", "many"), [(ONE, LARGE), *[(GROUP_SPLIT, GROUP_LARGE), (TMA, TMA_TALL)][: len(GROUPS)]]
)
def test_each_pair_of_positions_in_each_place(few, many):
    """Each of the six patterns throughout, and activations that name their column exactly."""
    w = torch.zeros(12, 512)
    for row, (i, j) in enumerate([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]):
        w[row, i::4], w[row, j::4] = 1.0, 2.0
        w[row + 6, i:128:4], w[row + 6, (128 + j) :: 4] = 1.0, -1.0
    layer = make_layer(w, WeightFormat.BF16, BF16)
    x = torch.arange(512).remainder(61).expand(2, -1).to(DEVICE, BF16)
    assert torch.equal(run(layer, x, None, few).cpu(), (x.cpu().double() @ layer.exact.T).to(BF16))
    # One column at a time: the identity as activations gives the weight back, bit for bit.
    identity = torch.eye(512, device=DEVICE, dtype=BF16)
    assert torch.equal(run(layer, identity[:64], None, many).cpu(), w.T[:64].to(BF16))
    assert torch.equal(run(layer, identity[250:290], None, many).cpu(), w.T[250:290].to(BF16))


@pytest.mark.parametrize("config", [ONE, *GROUPS[:1]])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_every_eight_bit_number_decodes(dtype, config):
    """All finite e4m3 numbers and all of int8 as weights, in both slots, in one product with ones."""
    x = torch.ones(1, 4, device=DEVICE, dtype=dtype)
    bits = torch.tensor([b for b in range(256) if b & 0x7F not in (0, 0x7F)], dtype=torch.uint8)
    fp8 = bits.view(torch.float8_e4m3fn).float()
    whole = torch.tensor([v for v in range(-128, 128) if v], dtype=torch.float32)
    for weight, numbers, stored in (
        (WeightFormat.FP8_E4M3, fp8, torch.float8_e4m3fn),
        (WeightFormat.INT8, whole, torch.int8),
    ):
        count = len(numbers)
        w = torch.zeros(2 * count, 4)
        w[:count, 1], w[count:, 3] = numbers, numbers
        w[count:, 0] = 2.0
        values, bitmask = compress(w.to(stored))
        ones = torch.ones(2 * count, 1, device=DEVICE)
        spec = LinearSpec(2 * count, 4, weight, dtype)
        packed = BACKEND.pack(spec, CanonicalWeight(values.to(DEVICE), bitmask.to(DEVICE), ones))
        out = ops.linear(
            x, packed.packed, packed.scale, None, 2 * count, 4, FORMAT_NUMBER[weight], 0, 0, config
        )
        assert torch.equal(out[0].cpu(), w.sum(1).to(dtype))


@pytest.mark.skipif(not HOPPER, reason="needs compute capability 9.0")
@pytest.mark.parametrize(("weight", "dtype"), [(WeightFormat.INT8, FP16), (WeightFormat.FP8_E4M3, BF16)])
def test_each_pair_of_positions_as_eight_bits(weight, dtype):
    """The six patterns under 8-bit activations that name their column, in rows of several row blocks."""
    w = torch.zeros(36, 512)
    for row in range(36):
        i, j = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)][row % 6]
        w[row, i::4], w[row, j::4] = 1.0, 2.0
    quant = ActivationQuant.INT8_PER_TOKEN if weight is WeightFormat.INT8 else ActivationQuant.FP8_PER_TOKEN
    layer = make_layer(w, weight, dtype, quant=quant)
    # One column at a time, whose scale gives it back as it was.
    identity = torch.eye(512, device=DEVICE, dtype=dtype)[200:265]
    out = run(layer, identity, None, TMA_TALL)
    assert_close_to_exact(out, quantize_per_token(identity.float(), quant), layer.exact)
    assert int((out != 0).sum()) == int((layer.exact.T[200:265] != 0).sum())


@pytest.mark.skipif(not HOPPER, reason="needs compute capability 9.0")
def test_rows_that_the_copies_cannot_take_are_copied_first(machine):
    """Addresses and strides of 8 bytes, and ones of 16, which go in as they are."""
    layer = make_layer(random_24(32, 64), WeightFormat.BF16, BF16)
    aligned, odd = tokens(6, 192), tokens(6, 180)
    for x in (aligned[:, 64:128], aligned[:, 68:132], odd[:, 64:128]):
        assert_close_to_exact(run(layer, x, None, TMA), x, layer.exact)


def test_inputs_of_any_stride_and_rank():
    layer = make_layer(random_24(16, 64), WeightFormat.BF16, BF16)
    x = tokens(24, 130).reshape(6, 4, 130)[:, ::2, 1:129:2]
    out = run(layer, x)
    assert out.shape == (6, 2, 16)
    assert_close_to_exact(out.reshape(-1, 16), x.reshape(-1, 64), layer.exact)
    padded_rows = tokens(3, 128)[:, :64]
    assert_close_to_exact(run(layer, padded_rows, None, ONE), padded_rows, layer.exact)
    assert run(layer, x[:0]).shape == (0, 2, 16)


def test_more_splits_than_blocks_add_zeros():
    layer = make_layer(random_24(16, 256), WeightFormat.BF16, BF16)
    x = tokens(2, 256)
    many = Config(Route.WGMMA_SP_TMA, 128, 64, 4, 8, 3)
    for config in [Config(Route.MMA_SP, 64, 8, 4, 4, 2), *[many][: len(TMAS)]]:
        assert_close_to_exact(run(layer, x, None, config), x, layer.exact)


@pytest.mark.parametrize("m", [1, 9, 64, 65])
def test_the_backend_by_name(m, machine):
    """Sparse tensor cores up to 64 tokens, Triton beyond."""
    layer = make_layer(random_24(24, 260), WeightFormat.BF16, BF16)
    x = tokens(m, 260)
    assert_close_to_exact(run(layer, x), x, layer.exact)
    if machine is not None:
        assert len(machine.launches) == (m <= 64)


def test_the_operator_is_what_torch_compile_expects():
    layer = make_layer(random_24(16, 64), WeightFormat.INT8, BF16)
    packed = BACKEND.pack(layer.spec, layer.weight)
    arguments = (tokens(2, 64), packed.packed, packed.scale, None, 16, 64, 2, 0, 0)
    torch.library.opcheck(
        torch.ops.vllm_sparse.linear_24_cuda.default, arguments, test_utils=("test_faketensor",)
    )

    def forward(x):
        return BACKEND.linear(layer.spec, x * 2, packed.packed, packed.scale, None)

    assert torch.equal(
        torch.compile(forward, backend="eager", fullgraph=True)(arguments[0]), forward(arguments[0])
    )


def test_a_table_brings_the_kernel_into_the_triton_backend(tmp_path, monkeypatch, machine, caplog):
    """Where it may not be had, the rule's configuration serves and says why."""
    layer = make_layer(random_24(24, 512), WeightFormat.BF16, BF16)
    device = ops.machine_of(0 if DEVICE.type == "cuda" else -1)
    path = tmp_path / "table.json"
    shape = Shape(WeightFormat.BF16, 24, 512)
    tables.write_table(path, device, {}, {(shape, 4): (ONE, 1.0)})
    monkeypatch.setenv(tables.ENV_CONFIGS, str(path))
    for cached in (tables._tables, tables.choose):
        cached.cache_clear()
    try:
        x = tokens(3, 512)
        packed = BACKEND.pack(layer.spec, layer.weight)
        arguments = (packed.packed, None, None, 24, 512, 0, 0, 0)
        assert_close_to_exact(ops.linear(x, *arguments), x, layer.exact)
        if machine is None:
            return
        assert len(machine.launches) == 1
        monkeypatch.setattr(library, "_load", lambda: (None, "it is not built"))
        mma_sp.unsupported_reason.cache_clear()
        assert_close_to_exact(ops.linear(x, *arguments), x, layer.exact)
        assert len(machine.launches) == 1
        assert "it is not built" in caplog.text
    finally:
        monkeypatch.undo()
        for cached in (tables._tables, tables.choose):
            cached.cache_clear()


@pytest.mark.skipif(not INTERPRETED, reason="counts launches of the emulated library")
def test_a_table_of_another_gpu_does_not_bring_a_kernel_that_this_one_lacks(
    tmp_path, monkeypatch, machine, caplog
):
    """By name too: machine code for other GPUs is empty, and results would be whatever memory held."""
    layer = make_layer(random_24(24, 512), WeightFormat.BF16, BF16)
    a100 = Machine("NVIDIA A100-SXM4-80GB", (8, 0), 108, 163 << 10)
    path = tmp_path / "table.json"
    tables.write_table(path, a100, {}, {(Shape(WeightFormat.BF16, 24, 512), 4): (GROUP_SPLIT, 1.0)})
    monkeypatch.setenv(tables.ENV_CONFIGS, str(path))
    monkeypatch.setattr(ops, "machine_of", lambda index: a100)
    tables.forget()
    try:
        x = tokens(3, 512)
        assert_close_to_exact(run(layer, x), x, layer.exact)
    finally:
        monkeypatch.undo()
        tables.forget()
    assert [launch.kernel for launch in machine.launches] == [0]
    assert "wgmma_sp is for compute capability 9.0" in caplog.text


def tiles(config, m, n=4096):
    """Tiles of the results, parts of K counted."""
    return -(-n // config.block_n) * -(-m // config.tokens) * config.split_k


def test_what_it_does_not_take_is_said():
    h200 = Machine("NVIDIA H200", (9, 0), 132, 227 << 10)
    bf16 = Layout(16, 256, WeightFormat.BF16)
    assert "one scale per output channel" in mma_sp.unsupported_reason(
        Layout(16, 256, WeightFormat.INT8), 128, ONE, h200
    )
    assert "multiple of 128" in mma_sp.unsupported_reason(Layout(16, 256, WeightFormat.INT4), 32, ONE, h200)
    assert "no instance" in mma_sp.unsupported_reason(bf16, 0, Config(Route.MMA_SP, 128, 8, 1, 4, 3), h200)
    small = Machine("small", (8, 6), 28, 99 << 10)
    assert "shared memory" in mma_sp.unsupported_reason(
        bf16, 0, Config(Route.MMA_SP, 128, 64, 1, 4, 3), small
    )
    assert mma_sp.unsupported_reason(bf16, 0, ONE, h200) is None
    assert all(mma_sp.unsupported_reason(bf16, 0, config, h200) is None for config in GROUPS)
    blackwell = Machine("B200", (10, 0), 148, 227 << 10)
    assert "compute capability 9.0" in mma_sp.unsupported_reason(bf16, 0, GROUP, blackwell)
    assert "4 or 8 warps" in mma_sp.unsupported_reason(bf16, 0, Config(Route.WGMMA_SP, 32, 8, 1, 2, 3), h200)
    assert all(mma_sp.unsupported_reason(bf16, 0, config, h200) is None for config in CLUSTERS)
    wide = Config(Route.MMA_SP, 64, 8, 16, 4, 3, cluster=True)
    assert "2, 4 or 8 parts, not 16" in mma_sp.unsupported_reason(bf16, 0, wide, h200)
    assert "9.0 or later" in mma_sp.unsupported_reason(
        bf16, 0, Config(Route.MMA_SP, 64, 8, 2, 4, 3, cluster=True), small
    )
    assert "3 to 6 stages" in mma_sp.unsupported_reason(bf16, 0, Config(Route.WGMMA_SP, 64, 8, 1, 4, 2), h200)
    assert all(mma_sp.unsupported_reason(bf16, 0, config, h200) is None for config in TMAS)
    assert "compute capability 9.0" in mma_sp.unsupported_reason(bf16, 0, TMA, blackwell)
    for wrong, text in (
        ({"cluster": True, "split_k": 2}, "in memory only"),
        ({"tokens": 128, "block_n": 256}, "no instance of wgmma_sp_tma"),
        ({"tokens": 64, "block_n": 64, "warps": 4}, "no instance of 64 tokens and 4 warps"),
        ({"stages": 7}, "3 to 6 stages"),
        ({"programs": -1}, "0 or more programs"),
    ):
        assert text in mma_sp.unsupported_reason(bf16, 0, replace(TMA, **wrong), h200)
    assert "a number of programs" in mma_sp.unsupported_reason(bf16, 0, replace(GROUP, programs=4), h200)
    int4 = Layout(16, 256, WeightFormat.INT4)
    assert "no instance of mma_sp for int4" in mma_sp.unsupported_reason(int4, 128, LARGE, h200)
    assert "no instance" in mma_sp.unsupported_reason(bf16, 0, LARGE_INT4, h200)
    assert mma_sp.unsupported_reason(int4, 128, LARGE_INT4, h200) is None
    for weight in (WeightFormat.BF16, WeightFormat.INT4):
        for m in (1, 9, 17, 33, 64):
            shape = Shape(weight, 4096, 4096)
            tried = [configs.default_config(shape, m, h200), *configs.candidates(shape, m, h200)]
            assert tried[0].tokens >= m
            assert all(configs.instance_reason(config, weight) is None for config in tried)
    assert configs.default_config(Shape(WeightFormat.BF16, 4096, 4096), 64, small).tokens == 32
    for weight in (WeightFormat.BF16, WeightFormat.FP8_E4M3, WeightFormat.INT4):
        for m in (65, 256, 257, 5000):
            shape = Shape(weight, 4096, 4096)
            tried = [configs.default_config(shape, m, h200), *configs.candidates(shape, m, h200)]
            assert tried[0].route is Route.WGMMA_SP_TMA
            assert tried[0].split_k == 1 or tiles(tried[0], m) <= h200.multiprocessors
            assert {config.route for config in tried[1:]} == {Route.WGMMA_SP_TMA}
            assert all(configs.instance_reason(config, weight) is None for config in tried)
            assert all(configs.shared_bytes(config, weight) <= h200.shared_bytes for config in tried)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("m", [1, 16, 64, 300])
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
