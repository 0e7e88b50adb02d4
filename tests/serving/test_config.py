"""Parsing and matching of quantization configs, without vLLM."""

from typing import Any

import pytest

from vllm_sparse.errors import FormatError, UnsupportedError
from vllm_sparse.kernels.base import ActivationQuant, WeightFormat
from vllm_sparse.quantization import matching
from vllm_sparse.quantization.matching import LayerPatterns, selects, unfused_names
from vllm_sparse.quantization.scheme import (
    LowRank,
    ScaleLayout,
    SchemeTable,
    Sparse24Table,
    Storage,
    WeightQuant,
    is_vestigial,
)
from vllm_sparse.quantization.spec import (
    Projection,
    StaticQuant,
    normalised_method,
    parse_compressed_tensors,
    parse_sparse24,
    quantization_block,
)

SPARSITY = {
    "format": "sparse-24-bitmask",
    "sparsity_structure": "2:4",
    "targets": ["Linear"],
    "ignore": ["lm_head", "re:.*down_proj"],
    "global_sparsity": 0.5,
    "registry_requires_subclass": False,
}
FP8 = {
    "targets": ["Linear"],
    "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
    "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
}
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def table(**extra) -> SchemeTable:
    return SchemeTable(parse_compressed_tensors({"sparsity_config": SPARSITY, **extra}))


def test_scheme_of_fp8_layers_and_ignored_ones() -> None:
    schemes = table(format="float-quantized", config_groups={"group_0": FP8}, ignore=["lm_head"])
    names = unfused_names("model.layers.0.self_attn.qkv_proj", FUSED)
    assert names == [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    scheme = schemes.sparse_scheme(names, "QKVParallelLinear")
    assert scheme is not None
    assert scheme.storage is Storage.BITMASK
    assert scheme.weight_quant is not None
    assert scheme.weight_quant == WeightQuant(WeightFormat.FP8_E4M3, ScaleLayout.CHANNEL)
    assert scheme.activation_quant is ActivationQuant.FP8_PER_TOKEN
    assert schemes.sparse_scheme(["model.layers.0.mlp.down_proj"], "RowParallelLinear") is None
    assert schemes.quantisation(["model.layers.0.mlp.down_proj"], "RowParallelLinear") is not None


def test_the_block_is_found_where_vllm_looks() -> None:
    block = {"quant_method": "compressed_tensors"}
    assert quantization_block({"compression_config": block}) is block
    assert quantization_block({"text_config": {"quantization_config": block}}) is block
    assert quantization_block({"quantization_config": {}}) is None
    assert normalised_method(block) == "compressed-tensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "os.system"}, r"sparsity_config\.format.*'sparse-24-bitmask'.*found 'os\.system'"),
        ({"sparsity_structure": "4:8"}, r"sparsity_structure.*'2:4'"),
        ({"sparsity_structure": "unstructured"}, r"must be '2:4'"),
    ],
)
def test_closed_vocabulary(change: dict, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse_compressed_tensors({"sparsity_config": {**SPARSITY, **change}})


def test_unknown_fields_are_kept_for_reporting_and_vllms_own_keys_are_not() -> None:
    spec = parse_compressed_tensors({"sparsity_config": SPARSITY, "total_num_heads": 4, "new_key": 1})
    assert spec.unknown_fields() == ["new_key"]
    assert spec.sparsity_config is not None
    assert spec.sparsity_config.unknown_fields() == ["registry_requires_subclass"]


def test_an_empty_sparsity_config_is_none() -> None:
    """As compressed-tensors 0.13 writes it for models that are quantised alone."""
    assert parse_compressed_tensors({"sparsity_config": {}}).sparsity_config is None


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"weights": {"num_bits": 4}}, "symmetric 8-bit"),
        ({"weights": {**FP8["weights"], "strategy": "block"}}, "'tensor' and 'channel'"),
        ({"input_activations": {"num_bits": 8, "dynamic": False, "symmetric": False}}, "symmetric=False"),
        ({"input_activations": {"num_bits": 8, "strategy": "channel"}}, "static \\(strategy 'tensor'\\)"),
        ({"input_activations": {"num_bits": 4, "dynamic": True}}, "num_bits=4"),
    ],
)
def test_schemes_that_are_not_served_say_what_is(group: dict, message: str) -> None:
    schemes = table(config_groups={"group_0": {**FP8, **group}})
    with pytest.raises(UnsupportedError, match=message):
        schemes.sparse_scheme(["model.layers.0.mlp.up_proj"], "MergedColumnParallelLinear")


def test_vestigial_blocks() -> None:
    dense = {"format": "dense", "sparsity_structure": "unstructured", "targets": ["Linear"]}
    assert is_vestigial(parse_compressed_tensors({"sparsity_config": dense}))
    two_four = {**dense, "sparsity_structure": "2:4"}
    assert not is_vestigial(parse_compressed_tensors({"sparsity_config": two_four}))
    quantised = {"sparsity_config": two_four, "config_groups": {"group_0": FP8}}
    assert is_vestigial(parse_compressed_tensors(quantised))
    assert not is_vestigial(parse_compressed_tensors({"sparsity_config": SPARSITY}))


def test_half_a_fused_layer_on_a_list_is_an_error() -> None:
    patterns = LayerPatterns(["a.q_proj"], "ignore")
    with pytest.raises(FormatError, match=r"lists a\.q_proj but not .*k_proj"):
        selects(patterns, unfused_names("a.qkv_proj", FUSED))


def test_regexes_are_bounded() -> None:
    with pytest.raises(FormatError, match="at most 512"):
        LayerPatterns(["re:" + "a" * 600], "ignore")
    with pytest.raises(FormatError, match="invalid regular expression"):
        LayerPatterns(["re:("], "ignore")
    bomb = LayerPatterns(["re:(a|aa)+$"], "ignore")
    with pytest.raises(FormatError, match="takes over"):
        bomb.matches_name("a" * 64 + "!")


def test_all_regexes_of_a_list_have_one_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "MATCH_BUDGET_SECONDS", 0.05)
    slow = LayerPatterns([f"re:(a|aa)+{number}" for number in range(200)], "ignore")
    with pytest.raises(FormatError, match=r"ignore has 200 regular expressions .* together"):
        any(slow.matches_name("a" * 22 + f"!{number}") for number in range(100))


OWN = {
    "quant_method": "sparse24",
    "format_version": 1,
    "linear": {
        "pattern": "2:4",
        "weights": "int4",
        "group_size": 128,
        "activations": "none",
        "low_rank": {"projection": "pooled", "columns_per_rank": 16},
    },
    "ignore": ["lm_head"],
}


def test_config_groups_mean_layers_by_name_before_they_mean_classes() -> None:
    int8 = {"num_bits": 8, "type": "int", "symmetric": True}
    schemes = table(
        config_groups={
            "group_0": {"targets": ["Linear"], "weights": {**int8, "strategy": "channel"}},
            "group_1": {**FP8, "targets": [r"re:.*self_attn\..*"]},
            "group_2": {"targets": ["model.layers.0.mlp.up_proj"], "weights": {**int8, "strategy": "tensor"}},
        }
    )
    found = {}
    for name in ("self_attn.o_proj", "mlp.up_proj", "mlp.gate_proj"):
        scheme = schemes.sparse_scheme([f"model.layers.0.{name}"], "RowParallelLinear")
        assert scheme is not None
        found[name] = scheme.weight_quant
    assert found == {
        "self_attn.o_proj": WeightQuant(WeightFormat.FP8_E4M3, ScaleLayout.CHANNEL),
        "mlp.up_proj": WeightQuant(WeightFormat.INT8, ScaleLayout.TENSOR),
        "mlp.gate_proj": WeightQuant(WeightFormat.INT8, ScaleLayout.CHANNEL),
    }


def version_2(**linear: Any) -> dict[str, Any]:
    return {"format_version": 2, "linear": {**OWN["linear"], **linear}}


def test_version_2_brings_outliers_and_static_scales() -> None:
    block = {**OWN, **version_2(weights="int8", activations="int8_static", outliers={"layout": "csr"})}
    scheme = Sparse24Table(parse_sparse24(block)).sparse_scheme(["model.layers.0.mlp.up_proj"], "Linear")
    assert scheme is not None
    assert scheme.outliers
    assert scheme.static_quant is StaticQuant.INT8
    assert scheme.activation_quant is ActivationQuant.NONE


def test_static_activations_of_compressed_tensors() -> None:
    group = {**FP8, "input_activations": {"num_bits": 8, "type": "float", "strategy": "tensor"}}
    scheme = table(config_groups={"group_0": group}).sparse_scheme(["model.up_proj"], "Linear")
    assert scheme is not None
    assert (scheme.activation_quant, scheme.static_quant) == (ActivationQuant.NONE, StaticQuant.FP8)


def test_our_own_format() -> None:
    schemes = Sparse24Table(parse_sparse24(OWN))
    assert schemes.sparse_scheme(["lm_head"], "Linear") is None
    scheme = schemes.sparse_scheme(["model.layers.0.mlp.up_proj"], "Linear")
    assert scheme is not None
    assert scheme.weight_quant == WeightQuant(WeightFormat.INT4, ScaleLayout.GROUP, 128)
    assert scheme.low_rank == LowRank(Projection.POOLED, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 3}, r"format_version.*1 or 2.*found 3"),
        ({"linear": {**OWN["linear"], "outliers": {"layout": "csr"}}}, r"need format_version 2; found 1"),
        ({"format_version": 2, "linear": {**OWN["linear"], "outliers": {"layout": "coo"}}}, r"layout.*'csr'"),
        (
            {"format_version": 2, "linear": {**OWN["linear"], "activations": "int8_static"}},
            r"weights is 'int4'",
        ),
        ({"linear": {**OWN["linear"], "activations": "int8_block"}}, r"activations.*'int8_per_token'"),
        ({"extra": True}, r"extra.*not permitted"),
        ({"linear": {**OWN["linear"], "weights": "int3"}}, r"linear\.weights.*'int4'"),
        ({"linear": {**OWN["linear"], "pattern": "4:8"}}, r"linear\.pattern.*2:4"),
    ],
)
def test_our_own_format_is_closed(change: dict, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse_sparse24({**OWN, **change})
