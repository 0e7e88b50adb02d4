"""The packed layout of the GPU kernels, the tables of configurations, and when the backend refuses."""

import json
from dataclasses import replace

import pytest
import torch

from vllm_sparse.errors import FormatError, NumericsError
from vllm_sparse.kernels.base import CanonicalWeight, LinearSpec, WeightFormat
from vllm_sparse.kernels.cuda import configs as cuda_configs
from vllm_sparse.kernels.triton import layout as packed_layout
from vllm_sparse.kernels.triton import tables
from vllm_sparse.kernels.triton.backend import TritonBackend
from vllm_sparse.kernels.triton.configs import (
    MOST_DOT_TOKENS,
    Config,
    Machine,
    Route,
    Shape,
    candidates,
    default_config,
    shared_bytes,
    token_bin,
)
from vllm_sparse.kernels.triton.layout import Layout
from vllm_sparse.sparse24 import compress, topk_mask

FORMATS = [WeightFormat.BF16, WeightFormat.FP16, WeightFormat.INT8, WeightFormat.FP8_E4M3, WeightFormat.INT4]
BITS = {WeightFormat.BF16: 9, WeightFormat.FP16: 9, WeightFormat.INT8: 5, WeightFormat.FP8_E4M3: 5}
H200 = Machine("NVIDIA H200", (9, 0), 132, 227 << 10)
A100 = Machine("NVIDIA A100-SXM4-80GB", (8, 0), 108, 163 << 10)
SMALL = Machine("small", (8, 6), 28, 99 << 10)


def stored_24(n, k, weight):
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(n))
    w = w * topk_mask(w.abs())
    if weight in (WeightFormat.INT8, WeightFormat.INT4):
        top = 7 if weight is WeightFormat.INT4 else 127
        return (w * top / 3).round().clamp(-top - 1, top).to(torch.int8)
    return w.to(packed_layout.VALUE_DTYPE[weight])


@pytest.mark.parametrize("weight", FORMATS)
@pytest.mark.parametrize(("n", "k"), [(1, 4), (16, 256), (33, 264), (48, 1024)])
def test_round_trip(weight, n, k):
    dense = stored_24(n, k, weight)
    values, bitmask = compress(dense)
    layout = Layout(n, k, weight)
    packed = packed_layout.pack(layout, values, bitmask)
    assert packed.dtype == torch.uint8
    assert packed.numel() == layout.total_bytes
    unpacked = packed_layout.unpack(layout, packed)
    assert unpacked.dtype == dense.dtype
    assert torch.equal(unpacked.float(), dense.float())


@pytest.mark.parametrize("weight", FORMATS)
def test_bits_per_weight(weight):
    assert Layout(4096, 4096, weight).total_bytes * 8 == 4096 * 4096 * BITS.get(weight, 3)


def test_bytes_are_where_the_layout_says():
    """Row 17, columns 4*40..: the second row block, second tile, group 8."""
    dense = torch.zeros(32, 512, dtype=torch.bfloat16)
    dense[17, 256 + 160 + 1], dense[17, 256 + 160 + 3] = 1.0, -2.0
    layout = Layout(32, 512, WeightFormat.BF16)
    packed = packed_layout.pack(layout, *compress(dense))
    # Row block 1, k block 1, tile 1, row 1, group 8.
    word = (((1 * 2 + 1) * 2 + 1) * 16 + 1) * 32 + 8
    assert packed[4 * word : 4 * word + 4].view(torch.bfloat16).tolist() == [1.0, -2.0]
    byte = layout.value_bytes + ((1 * 2 + 1) * 16 + 1) * 32 + 8
    assert int(packed[byte]) >> 4 == 1 + 4 * 3
    others = torch.cat([packed[: 4 * word], packed[4 * word + 4 : layout.value_bytes]])
    assert not bool(others.any())


def test_a_broken_bitmask_is_refused_with_its_place():
    values, bitmask = compress(stored_24(8, 64, WeightFormat.BF16))
    bitmask[5, 3] = 0b0011_0111
    spec = LinearSpec(8, 64, WeightFormat.BF16, torch.bfloat16)
    with pytest.raises(FormatError, match=r"row 5, columns 24\.\.27"):
        TritonBackend().pack(spec, CanonicalWeight(values, bitmask))


def test_nan_in_fp8_weights_is_refused():
    dense = stored_24(8, 64, WeightFormat.FP8_E4M3)
    values, bitmask = compress(dense)
    values.view(torch.uint8)[2, 0] = 0xFF
    spec = LinearSpec(8, 64, WeightFormat.FP8_E4M3, torch.bfloat16)
    with pytest.raises(NumericsError, match="NaN values \\(first in row 2\\)"):
        TritonBackend().pack(spec, CanonicalWeight(values, bitmask, torch.ones(8, 1)))


def test_scales_are_stored_small_only_where_that_is_exact():
    backend = TritonBackend()
    values, bitmask = compress(stored_24(8, 256, WeightFormat.INT4))
    spec = LinearSpec(8, 256, WeightFormat.INT4, torch.bfloat16, group_size=128)
    short = torch.full((8, 2), 0.0625)
    assert backend.pack(spec, CanonicalWeight(values, bitmask, short)).scale.dtype == torch.bfloat16
    long = torch.full((8, 2), 0.1)
    packed = backend.pack(spec, CanonicalWeight(values, bitmask, long)).scale
    assert packed.dtype == torch.float32
    assert packed.shape == (2, 8)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (LinearSpec(8, 6, WeightFormat.BF16, torch.bfloat16), "multiple of 4"),
        (LinearSpec(8, 8, WeightFormat.FP32, torch.float32), "float32"),
        (LinearSpec(8, 8, WeightFormat.INT4, torch.bfloat16, group_size=2), "scale groups"),
        (LinearSpec(8, 8, WeightFormat.BF16, torch.bfloat16), "weight is on the CPU"),
    ],
)
def test_reasons(spec, reason, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert reason in TritonBackend().unsupported_reason(spec, torch.device("cpu"))


@pytest.mark.parametrize("machine", [H200, SMALL])
@pytest.mark.parametrize("weight", FORMATS)
@pytest.mark.parametrize(("n", "k"), [(64, 256), (896, 4864), (4096, 4096), (28672, 8192)])
def test_default_configurations_fit_and_cover(machine, weight, n, k):
    shape = Shape(weight, n, k)
    for m in (1, 2, 3, 7, 8, 9, 16, 33, 64, 100, 128, 256, 257, 5000):
        config = default_config(shape, m, machine)
        assert shared_bytes(config, weight, machine) <= machine.shared_bytes
        assert config.split_k <= shape.k_blocks
        if config.route is Route.SELECT:
            assert config.tokens >= m
        assert (config.route is Route.EXPAND) == (m > MOST_DOT_TOKENS)


def test_candidates_contain_both_kernels_where_both_can_win():
    shape = Shape(WeightFormat.BF16, 4096, 4096)
    routes = {m: {config.route for config in candidates(shape, m, H200)} for m in (1, 4, 64, 256)}
    assert routes[1] == {Route.SELECT}
    assert routes[4] == {Route.SELECT, Route.DOT}
    assert routes[64] == {Route.DOT}
    assert routes[256] == {Route.DOT, Route.EXPAND}
    assert all(config.tokens >= 8 for config in candidates(shape, 8, H200) if config.route is Route.SELECT)


def test_a_table_wins_over_the_rule(tmp_path, monkeypatch):
    shape = Shape(WeightFormat.INT8, 640, 512)
    best = Config(Route.DOT, 32, 16, 4, 8, 2)
    path = tmp_path / "mine.json"
    tables.write_table(path, H200, {"triton": "3.9.0"}, {(shape, 16): (best, 3.25)})
    assert json.loads(path.read_text())["entries"][0]["us"] == 3.25
    assert tables.read_times(path) == {(shape, 16): (best, 3.25)}
    monkeypatch.setenv(tables.ENV_CONFIGS, str(path))
    tables.forget()
    try:
        assert tables.choose(shape, 9, H200) == best
        assert tables.choose(shape, 17, A100) == default_config(shape, 17, A100)
        assert tables.choose(shape, 17, H200) == cuda_configs.default_config(shape, 17, H200)
        assert tables.choose(shape, 257, H200) == cuda_configs.default_config(shape, 257, H200)
        assert tables.choose(shape, 257, A100) == default_config(shape, 257, A100)
    finally:
        monkeypatch.undo()
        tables.forget()


def test_a_bin_without_an_entry_takes_a_neighbours_cuda_kernel(tmp_path, monkeypatch):
    """The next larger bin's, or the largest one's for more tokens; Triton's entries stay in their own bin."""
    shape = Shape(WeightFormat.BF16, 640, 512)
    few, many = Config(Route.MMA_SP, 64, 8, 1, 4, 3), Config(Route.MMA_SP, 128, 64, 1, 4, 2)
    dot = Config(Route.DOT, 32, 16, 4, 8, 2)
    path = tmp_path / "mine.json"
    tables.write_table(
        path, A100, {}, {(shape, 4): (few, 1.0), (shape, 16): (dot, 2.0), (shape, 64): (many, 3.0)}
    )
    monkeypatch.setenv(tables.ENV_CONFIGS, str(path))
    tables.forget()
    try:
        chosen = {m: tables.choose(shape, m, A100) for m in (1, 3, 5, 9, 20, 64, 65, 256, 257)}
    finally:
        monkeypatch.undo()
        tables.forget()
    assert chosen == {
        **dict.fromkeys((1, 3), few),
        **dict.fromkeys((5, 20, 64, 65, 256), many),
        9: dot,
        257: default_config(shape, 257, A100),
    }


@pytest.mark.parametrize("weight", FORMATS)
@pytest.mark.parametrize(("n", "k"), [(64, 256), (896, 4864), (4096, 4096), (28672, 8192)])
def test_the_rule_for_cuda_kernels_has_instances_that_fit(weight, n, k):
    shape = Shape(weight, n, k)
    for machine, counts in ((H200, (1, 2, 8, 9, 16, 33, 64, 65, 129, 512, 5000)), (A100, (1, 9, 33, 64))):
        for m in counts:
            config = cuda_configs.default_config(shape, m, machine)
            assert cuda_configs.instance_reason(config, weight) is None
            assert cuda_configs.capability_reason(config, machine) is None
            assert cuda_configs.shared_bytes(config, weight) <= machine.shared_bytes
            assert config.split_k <= shape.k_blocks
            assert config.tokens >= min(m, 128)
    assert cuda_configs.serves_without_a_table(H200)
    assert not cuda_configs.serves_without_a_table(A100)


def test_the_rule_for_many_tokens_is_what_sweeps_found():
    """Large tiles where there are enough of them, else smaller ones, and parts of K."""

    def chosen(n, k, m):
        config = cuda_configs.default_config(Shape(WeightFormat.BF16, n, k), m, H200)
        assert config.route is Route.WGMMA_SP_TMA
        return config.block_n, config.tokens, config.split_k

    assert chosen(28672, 4096, 64) == (256, 64, 1)
    assert chosen(28672, 4096, 128) == (128, 128, 1)
    assert chosen(28672, 4096, 4096) == (128, 256, 1)
    assert chosen(4096, 14336, 128) == (128, 128, 4)
    assert chosen(6144, 4096, 512) == (128, 256, 1)
    assert chosen(4096, 4096, 128) == (64, 128, 2)
    assert chosen(4096, 4096, 512) == (128, 128, 1)


def test_parts_of_k_stay_with_the_few_tokens_that_they_were_measured_for(tmp_path, monkeypatch):
    """Of the largest bin's entry batches beyond it take all but these: their sums grow with the tokens."""
    shape = Shape(WeightFormat.BF16, 4096, 14336)
    best = Config(Route.WGMMA_SP_TMA, 128, 128, 4, 8, 6)
    path = tmp_path / "mine.json"
    tables.write_table(path, H200, {}, {(shape, 128): (best, 1.0)})
    monkeypatch.setenv(tables.ENV_CONFIGS, str(path))
    monkeypatch.setattr(tables, "table_path", lambda name: tmp_path / "none.json")
    tables.forget()
    try:
        chosen = {m: tables.choose(shape, m, H200) for m in (128, 129, 8192, 100_000)}
    finally:
        monkeypatch.undo()
        tables.forget()
    assert chosen == {128: best, **dict.fromkeys((129, 8192, 100_000), replace(best, split_k=1))}


def test_broken_tables_are_refused_with_the_entry(tmp_path):
    path = tmp_path / "t.json"
    path.write_text("{}")
    with pytest.raises(FormatError, match="schema"):
        tables.read_table(path)
    for entries, words in (("null", "not a list"), ("{}", "not a list"), ('["x"]', "entry 0: 'x' is not an")):
        path.write_text(f'{{"schema": "{tables.SCHEMA}", "entries": {entries}}}')
        with pytest.raises(FormatError, match=words):
            tables.read_table(path)
    tables.write_table(
        path, H200, {}, {(Shape(WeightFormat.BF16, 64, 64), 8): (Config(Route.SELECT, 16, 4), 1.0)}
    )
    with pytest.raises(FormatError, match=r"entry 0.*all tokens"):
        tables.read_table(path)
    tables.write_table(
        path, H200, {}, {(Shape(WeightFormat.BF16, 64, 64), 8): (Config(Route.DOT, 48, 16), 1.0)}
    )
    with pytest.raises(FormatError, match="powers of two"):
        tables.read_table(path)
    tables.write_table(
        path,
        H200,
        {},
        {(Shape(WeightFormat.BF16, 64, 64), 8): (Config(Route.DOT, 64, 16, cluster=True), 1.0)},
    )
    with pytest.raises(FormatError, match="only the CUDA C"):
        tables.read_table(path)


def test_a_table_keeps_what_only_some_entries_have(tmp_path):
    """Clusters, programs, quantised activations."""
    path = tmp_path / "t.json"
    shape, quantized = Shape(WeightFormat.INT8, 640, 512), Shape(WeightFormat.INT8, 640, 512, quantized=True)
    written = {
        (shape, 8): Config(Route.MMA_SP, 64, 8, 4, 4, 3, cluster=True),
        (shape, 64): Config(Route.DOT),
        (quantized, 64): Config(Route.WGMMA_SP_TMA, 128, 64, 1, 8, 4, programs=132),
    }
    tables.write_table(path, H200, {}, {key: (config, 1.0) for key, config in written.items()})
    assert tables.read_table(path) == written
    assert [path.read_text().count(word) for word in ("cluster", '"programs"', "quantized")] == [1, 1, 1]


def test_layers_with_quantised_activations_have_entries_of_their_own_or_take_the_others(
    tmp_path, monkeypatch
):
    """Beyond a table only the kernel for many tokens goes on, or the rule, which takes that kernel too."""
    shape, quantized = Shape(WeightFormat.INT8, 640, 512), Shape(WeightFormat.INT8, 640, 512, quantized=True)
    few = Config(Route.WGMMA_SP, 128, 64, 1, 8, 4)
    many = Config(Route.WGMMA_SP_TMA, 128, 256, 1, 8, 3)
    path = tmp_path / "t.json"
    tables.write_table(path, H200, {}, {(shape, 64): (few, 1.0), (quantized, 512): (many, 1.0)})
    counts = (64, 65, 129, 512, 9000)
    monkeypatch.setenv(tables.ENV_CONFIGS, str(path))
    tables.forget()
    try:
        chosen = {m: (tables.choose(shape, m, H200), tables.choose(quantized, m, H200)) for m in counts}
    finally:
        monkeypatch.undo()
        tables.forget()
    rule = {m: cuda_configs.default_config(shape, m, H200) for m in counts}
    # For 65 tokens that configuration would take tiles of 256.
    assert chosen.pop(64) == (few, few)
    assert chosen.pop(65) == (rule[65], rule[65])
    assert chosen == {m: (rule[m], many) for m in (129, 512, 9000)}


def test_committed_tables_are_readable():
    for path in tables.table_path("x").parent.glob("*.json"):
        assert tables.read_table(path)


def test_bins():
    assert [token_bin(m) for m in (1, 2, 3, 8, 9, 128, 256)] == [1, 2, 4, 8, 16, 128, 256]
    assert [token_bin(m) for m in (257, 1025, 4096, 100_000)] == [512, 4096, 4096, 4096]
