"""Shapes against ranks, pipeline stages and attention kernels; tensors against shapes."""

import json
from pathlib import Path
from typing import Any

import pytest
import structured_checkpoints as checkpoints
import torch

from vllm_sparse.errors import FormatError, UnsupportedError
from vllm_sparse.models.layer_config import ModelShape, read_model_shape
from vllm_sparse.models.parallel import check_head_dims, check_pipeline, check_tensor_parallel
from vllm_sparse.models.tensors import check_folder, check_tensors, declared_tensors, read_headers


def shape_of(per_layer: dict[str, Any], family: str = "llama") -> ModelShape:
    return read_model_shape(checkpoints.make_config(family, 4, per_layer))


def make_shapes(family: str, per_layer: dict[str, Any] | None) -> dict[str, tuple[int, ...]]:
    tensors = checkpoints.make_tensors(checkpoints.make_config(family, 3, per_layer))
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def test_even_layers_split() -> None:
    check_tensor_parallel(shape_of(checkpoints.EVEN_LAYERS), 2)
    check_tensor_parallel(shape_of({}), 4)


@pytest.mark.parametrize(
    ("per_layer", "ranks", "words"),
    [
        ({"1": {"intermediate_size": 99}}, 2, ("layer 1", "width is 99", "98 or 100")),
        ({"2": {"intermediate_size": 3}}, 4, ("layer 2", "width is 3", "works: 4")),
        (
            {"1": {"num_attention_heads": 3, "num_key_value_heads": 3}},
            2,
            ("layer 1", "query heads is 3", "2 or 4"),
        ),
        (
            {"1": {"num_attention_heads": 12, "num_key_value_heads": 3}},
            4,
            ("layer 1", "KV heads is 3", "2 or 4"),
        ),
    ],
)
def test_uneven_layers_are_refused_with_the_nearest_size(
    per_layer: dict[str, Any], ranks: int, words: tuple[str, ...]
) -> None:
    with pytest.raises(UnsupportedError) as caught:
        check_tensor_parallel(shape_of(per_layer), ranks)
    for word in words:
        assert word in str(caught.value)


def test_replicated_kv_heads_are_fine() -> None:
    check_tensor_parallel(shape_of({"1": {"num_key_value_heads": 1}, "2": {"num_key_value_heads": 2}}), 4)


def test_experts_split_by_width_or_whole() -> None:
    shape = shape_of({"1": {"moe_intermediate_size": 33}}, "qwen3_moe")
    with pytest.raises(UnsupportedError, match="layer 1: the expert width is 33"):
        check_tensor_parallel(shape, 2)
    check_tensor_parallel(shape, 2, expert_parallel=True)
    few = shape_of({"3": {"num_experts": 3}}, "qwen3_moe")
    with pytest.raises(UnsupportedError, match=r"layer 3: the number of experts is 3.*works: 4"):
        check_tensor_parallel(few, 4)


def test_a_stage_without_attention_is_refused() -> None:
    shape = shape_of({"2": {"skip": ["attention"]}, "3": {"skip": ["attention"]}})
    check_pipeline(shape, [(0, 1), (1, 4)])
    with pytest.raises(UnsupportedError, match="stage 1 holds layers 2 to 3"):
        check_pipeline(shape, [(0, 2), (2, 4)])


def test_head_dim_must_have_a_kernel() -> None:
    shape = shape_of({"2": {"head_dim": 48}})
    check_head_dims(shape, {32, 48}, "a backend")
    with pytest.raises(
        UnsupportedError, match=r"layer 2: head_dim 48 has no kernel in a backend\. Allowed: 32, 64"
    ):
        check_head_dims(shape, {64, 32}, "a backend")


@pytest.mark.parametrize("family", checkpoints.FAMILIES)
def test_a_sound_checkpoint_passes_and_every_weight_is_covered(family: str, tmp_path: Path) -> None:
    config = checkpoints.make_config(family, 3, {"1": {"skip": ["mlp"]}, "2": {"skip": ["attention"]}})
    tensors = checkpoints.make_tensors(config)
    shape = read_model_shape(config)
    check_folder(shape, checkpoints.save_checkpoint(tmp_path, config, tensors))
    declared = dict(declared_tensors(shape))
    assert set(declared) <= set(tensors)
    in_layers = {
        name
        for name, tensor in tensors.items()
        if tensor.dim() == 2 and (".layers." in name or ".h." in name)
    }
    assert in_layers <= set(declared)


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    config = checkpoints.make_config("llama", 3, {"1": {"intermediate_size": 96}})
    tensors = checkpoints.make_tensors(config)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = torch.zeros(128, 88)
    folder = checkpoints.save_checkpoint(tmp_path, config, tensors)
    with pytest.raises(FormatError, match=r"model\.layers\.1\.mlp\.down_proj\.weight: .*128 x 88.*128 x 96"):
        check_folder(read_model_shape(config), folder)


@pytest.mark.parametrize("family", checkpoints.FAMILIES)
def test_tensors_of_absent_parts_are_named(family: str) -> None:
    whole = make_shapes(family, None)
    config = checkpoints.make_config(family, 3, {"1": {"skip": ["attention"]}})
    with pytest.raises(FormatError, match=r"\.1\.(self_attn|attn)\..*config.json skips this part"):
        check_tensors(read_model_shape(config), whole)
    config = checkpoints.make_config(family, 3, {"2": {"skip": ["mlp"]}})
    with pytest.raises(FormatError, match=r"\.2\.(mlp|block_sparse_moe|fc1)\..*config.json skips this part"):
        check_tensors(read_model_shape(config), whole)
    with pytest.raises(FormatError, match=r"\.2\..*declares 2 layers"):
        check_tensors(read_model_shape(checkpoints.make_config(family, 2)), whole)


def test_an_undeclared_bias_is_named() -> None:
    with_biases = make_shapes("llama", {"1": {"o_proj_bias": True, "down_proj_bias": True}})
    with pytest.raises(FormatError, match=r"layers\.1\.self_attn\.o_proj\.bias: .*Set o_proj_bias"):
        check_tensors(read_model_shape(checkpoints.make_config("llama", 3)), with_biases)


def test_old_rotary_buffers_are_no_tensors_of_a_part() -> None:
    config = checkpoints.make_config("llama", 3, {"1": {"skip": ["attention"]}})
    shapes = {name: tuple(tensor.shape) for name, tensor in checkpoints.make_tensors(config).items()}
    check_tensors(read_model_shape(config), shapes | {"model.layers.1.self_attn.rotary_emb.inv_freq": (16,)})


@pytest.mark.parametrize("content", [b"", b"\x05\0\0\0\0\0\0\0{", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]"])
def test_a_broken_file_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(FormatError, match=r"model\.safetensors: not a readable"):
        read_headers(tmp_path)


def test_headers_of_several_files_are_joined(tmp_path: Path) -> None:
    for number in range(2):
        checkpoints.save_checkpoint(tmp_path, {}, {f"t{number}": torch.zeros(number + 1, 3)})
        (tmp_path / "model.safetensors").rename(tmp_path / f"model-{number}.safetensors")
    assert read_headers(tmp_path) == {"t0": (1, 3), "t1": (2, 3)}
    assert json.loads((tmp_path / "config.json").read_text()) == {}
