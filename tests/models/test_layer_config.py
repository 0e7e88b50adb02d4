"""Parsing and validation of layer shapes: what is read, and every refusal."""

import subprocess
import sys
from typing import Any

import pytest
import structured_checkpoints as checkpoints
from transformers import AutoConfig

from vllm_sparse.errors import FormatError, UnsupportedError, UserError
from vllm_sparse.models.deepseek_config import register_config
from vllm_sparse.models.layer_config import (
    AttentionShape,
    FfnShape,
    LatentShape,
    MoeShape,
    read_model_shape,
)


def llama(per_layer: dict[str, Any] | None = None, **extra: Any) -> dict[str, Any]:
    return checkpoints.make_config("llama", 3, per_layer, **extra)


def test_layers_take_their_own_values_and_the_rest_from_the_globals() -> None:
    shape = read_model_shape(
        llama(
            {
                "0": {"intermediate_size": 64, "down_proj_bias": True},
                "02": {
                    "num_attention_heads": 2,
                    "num_key_value_heads": 1,
                    "attention_bias": True,
                    "skip": ["mlp"],
                },
            },
            down_proj_bias=False,
        )
    )
    assert [layer.attention for layer in shape.layers] == [
        AttentionShape(4, 4, 32),
        AttentionShape(4, 4, 32),
        AttentionShape(2, 1, 32, qkv_bias=True, o_bias=True),
    ]
    assert [layer.ffn for layer in shape.layers] == [FfnShape(64, False, True), FfnShape(256), None]


def test_skip_leaves_the_other_part() -> None:
    first, second, third = read_model_shape(
        llama({"0": {"skip": ["attention"]}, "1": {"skip": ["mlp"]}})
    ).layers
    assert first.attention is None
    assert first.ffn == FfnShape(256)
    assert second.attention == AttentionShape(4, 4, 32)
    assert second.ffn is None
    assert third.attention is not None
    assert third.ffn is not None


def test_experts_and_dense_layers_of_one_model() -> None:
    config = checkpoints.make_config(
        "qwen3_moe", 3, {"0": {"num_experts": 5, "moe_intermediate_size": 32}}, mlp_only_layers=[1]
    )
    assert [layer.ffn for layer in read_model_shape(config).layers] == [
        MoeShape(5, 2, 32),
        FfnShape(256),
        MoeShape(8, 2, 64),
    ]


@pytest.mark.parametrize("family", checkpoints.FAMILIES)
def test_a_config_read_by_transformers_says_the_same(family: str, tmp_path: Any) -> None:
    width = {"opt": "ffn_dim", "gpt2": "n_inner"}.get(family, "intermediate_size")
    heads = "n_head" if family == "gpt2" else "num_attention_heads"
    per_layer = {"1": {heads: 1, width: 96, "skip": ["mlp"]}, "2": {"skip": ["attention"]}}
    if family not in ("opt", "gpt2", *checkpoints.LATENT):
        per_layer["1"]["num_key_value_heads"] = 1
    register_config()
    config = checkpoints.make_config(family, 12, per_layer)
    checkpoints.save_checkpoint(tmp_path, config, {})
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert read_model_shape(loaded.to_dict()) == read_model_shape(config)
    loaded.save_pretrained(tmp_path / "again")
    assert read_model_shape(AutoConfig.from_pretrained(tmp_path / "again").to_dict()) == read_model_shape(
        config
    )


def test_deepseek_layers_have_routed_and_shared_experts() -> None:
    config = checkpoints.make_config("deepseek", 4, checkpoints.even_layers_for("deepseek"))
    assert [layer.ffn for layer in read_model_shape(config).layers] == [
        FfnShape(192),
        MoeShape(6, 2, 32, 96),
        MoeShape(4, 2, 64, 128),
        MoeShape(8, 2, 64, 128),
    ]
    config["n_shared_experts"] = None
    assert read_model_shape(config).layers[1].ffn == MoeShape(6, 2, 32)
    config = checkpoints.make_config(
        "deepseek", 1, first_k_dense_replace=0, shared_expert_intermediate_size=None
    )
    assert read_model_shape(config).layers[0].ffn == MoeShape(8, 2, 64, 128)


def test_latent_attention_varies_in_heads_alone() -> None:
    config = checkpoints.make_config("deepseek_v2", 2, {"1": {"num_attention_heads": 2}})
    shape = read_model_shape(config)
    assert shape.layers[1].attention == LatentShape(2, 1, 576, False, False, 48, 512, 32, 32)
    # The latent is whole on every rank, whatever the heads.
    assert shape.kv_bytes_per_token(2) == shape.kv_bytes_per_token(2, 2) == 2 * 576 * 2
    for key in ("num_key_value_heads", "kv_lora_rank", "head_dim", "v_head_dim"):
        config["per_layer_config"] = {"1": {key: 2}}
        with pytest.raises(FormatError, match=f"sets {key}, which cannot vary.*no KV heads to prune"):
            read_model_shape(config)


@pytest.mark.parametrize(
    ("family", "layer", "extra", "says"),
    [
        ("deepseek_v2", {"n_routed_experts": 7}, {}, "7 experts in 2 groups"),
        ("deepseek_v2", {"n_routed_experts": 2}, {}, "do not give it 2 experts"),
        ("deepseek_v2", {}, {"topk_group": 3}, "of which a token may use 3"),
        ("deepseek_v2", {}, {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc'"),
        ("deepseek_v3", {}, {"topk_method": "greedy"}, "topk_method 'greedy' with scoring_func 'sigmoid'"),
        ("deepseek_v3", {"n_routed_experts": 2, "num_experts_per_tok": 1}, {}, "ranks a group by its best 2"),
        ("deepseek", {}, {"scoring_func": "sigmoid"}, "scoring_func 'sigmoid'"),
        ("deepseek", {"n_routed_experts": 1}, {}, "num_experts_per_tok is 2 but only 1 experts"),
        ("deepseek", {"n_routed_experts": 0}, {}, "n_routed_experts is 0.*skip"),
        ("deepseek", {"shared_expert_intermediate_size": 0}, {}, "shared_expert_intermediate_size is 0"),
        ("deepseek", {}, {"first_k_dense_replace": -1}, "first_k_dense_replace is -1"),
        ("deepseek", {}, {"moe_layer_freq": "x"}, "moe_layer_freq 'x'"),
        (
            "deepseek",
            {"shared_expert_intermediate_size": 32},
            {"shared_expert_intermediate_size": None},
            'Add "shared_expert_intermediate_size"',
        ),
    ],
)
def test_contradictions_of_deepseek_are_named(
    family: str, layer: dict[str, Any], extra: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        read_model_shape(checkpoints.make_config(family, 2, {"1": layer}, **extra))


def test_a_uniform_pruned_model_needs_no_per_layer_config() -> None:
    shape = read_model_shape(llama(num_key_value_heads=2, intermediate_size=96))
    assert {layer.attention for layer in shape.layers} == {AttentionShape(4, 2, 32)}
    assert {layer.ffn for layer in shape.layers} == {FfnShape(96)}


def test_gpt2_defaults_to_four_times_the_width() -> None:
    shape = read_model_shape(checkpoints.make_config("gpt2", 1, n_inner=None))
    assert shape.layers[0].ffn == FfnShape(4 * checkpoints.HIDDEN, True, True)


def test_kv_bytes_follow_the_heads() -> None:
    shape = read_model_shape(llama({"0": {"num_key_value_heads": 1}, "1": {"skip": ["attention"]}}))
    assert shape.kv_bytes_per_token(2) == (1 + 0 + 4) * 32 * 2 * 2
    # Two ranks: one head replicated, four split into two and two.
    assert shape.kv_bytes_per_token(2, tensor_parallel_size=2) == (1 + 0 + 2) * 32 * 2 * 2


def test_summary_names_ranges_and_what_is_missing() -> None:
    shape = read_model_shape(llama({"0": {"num_key_value_heads": 1}, "1": {"skip": ["attention"]}}))
    assert shape.summary() == (
        "3 llama layers: query heads 4, KV heads 1 to 4, feed-forward width 256, 1 without attention"
    )
    moe = read_model_shape(checkpoints.make_config("mixtral", 2, {"0": {"num_local_experts": 3}}))
    assert moe.summary().endswith("experts 3 to 8, expert width 64")


#: Bad per-layer values for a 3-layer Llama, and what the message must name.
BAD_LAYERS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"3": {"intermediate_size": 64}}, ("'3'", "0 to 2")),
    ({"-1": {"intermediate_size": 64}}, ("'-1'",)),
    ({"one": {"intermediate_size": 64}}, ("'one'",)),
    ({"1": {"intermediate_size": 64}, "01": {"intermediate_size": 32}}, ("layer 1 twice",)),
    ({"1": 64}, ("mapping",)),
    ({"1": {"hidden_size": 64}}, ("hidden_size", "cannot vary")),
    ({"1": {"skip": ["attn"]}}, ("layer 1", "'attn'", "'attention'")),
    ({"1": {"skip": "attention"}}, ("layer 1", "list")),
    ({"1": {"num_attention_heads": 0}}, ("layer 1", "num_attention_heads is 0", '"skip": ["attention"]')),
    ({"1": {"num_key_value_heads": 0}}, ("layer 1", "num_key_value_heads is 0", "skip")),
    ({"1": {"intermediate_size": 0}}, ("layer 1", "intermediate_size is 0", '"skip": ["mlp"]')),
    ({"1": {"intermediate_size": None}}, ("'1'", "intermediate_size to null", "skip")),
    ({"1": {"intermediate_size": -8}}, ("layer 1", "-8")),
    ({"1": {"intermediate_size": 96.5}}, ("layer 1", "96.5", "integer")),
    ({"1": {"intermediate_size": True}}, ("layer 1", "integer")),
    ({"1": {"mlp_bias": "yes"}}, ("layer 1", "mlp_bias", "true or false")),
    ({"1": {"num_attention_heads": 3, "num_key_value_heads": 2}}, ("layer 1", "3 query heads", "2 KV heads")),
    ({str(i): {"skip": ["attention", "mlp"]} for i in range(3)}, ("every layer",)),
]


@pytest.mark.parametrize(("per_layer", "words"), BAD_LAYERS)
def test_bad_layers_are_named(per_layer: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(FormatError) as caught:
        read_model_shape(llama(per_layer))
    for word in words:
        assert word in str(caught.value)


def test_pruned_heads_need_an_explicit_head_dim() -> None:
    config = llama({"1": {"num_attention_heads": 2, "num_key_value_heads": 2}})
    del config["head_dim"]
    with pytest.raises(FormatError, match="layer 1: head_dim is missing"):
        read_model_shape(config)


def test_missing_values_and_flag_are_named() -> None:
    with pytest.raises(FormatError, match="intermediate_size is missing"):
        read_model_shape(llama(intermediate_size=None))
    config = llama({"1": {"intermediate_size": 64}})
    del config["allow_global_per_layer_attribute_access"]
    with pytest.raises(FormatError, match=r'Add "allow_global_per_layer_attribute_access": true'):
        read_model_shape(config)


def test_our_own_keys_need_a_global_value_too() -> None:
    with pytest.raises(FormatError, match='Add "o_proj_bias": false'):
        read_model_shape(llama({"1": {"o_proj_bias": True}}))
    everywhere = read_model_shape(llama({str(i): {"o_proj_bias": True} for i in range(3)}))
    assert all(attention.o_bias for _, attention in everywhere.attention_layers())


def test_what_cannot_be_served_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"model_type 'gemma9'.*llama"):
        read_model_shape({"model_type": "gemma9"})
    with pytest.raises(UnsupportedError, match="dual_chunk"):
        read_model_shape(llama(dual_chunk_attention_config={"chunk_size": 8}))
    with pytest.raises(UnsupportedError, match="layer 1: down_proj_bias"):
        read_model_shape(
            checkpoints.make_config("qwen3_moe", 2, {"1": {"down_proj_bias": True}}, down_proj_bias=False)
        )
    with pytest.raises(FormatError, match="mlp_only_layers is 3"):
        read_model_shape(checkpoints.make_config("qwen3_moe", 2, mlp_only_layers=3))
    with pytest.raises(FormatError, match="num_experts_per_tok is 2 but only 1 expert"):
        read_model_shape(checkpoints.make_config("mixtral", 2, {"1": {"num_local_experts": 1}}))


def test_everything_raised_is_a_user_error() -> None:
    for bad in (None, [], {}, {"model_type": 3}, llama(per_layer_config=[1])):
        with pytest.raises(UserError):
            read_model_shape(bad)  # type: ignore[arg-type]


def test_module_needs_neither_torch_nor_vllm() -> None:
    code = (
        "import sys\n"
        "from vllm_sparse.models import layer_config, parallel, tensors\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'vllm', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
