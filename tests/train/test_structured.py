import json
from pathlib import Path

import pytest
import torch

from converters.train.compress import compress_model
from converters.train.loading import load_model
from converters.train.models import ModelShape, build_model
from converters.train.saving import save_like
from converters.train.structured import (
    LayerShape,
    base_shape,
    keep_heads,
    read_layer_shapes,
    structured_config,
)
from converters.train.structured_ffn import channel_scores, kept_count
from vllm_sparse.errors import FormatError, UnsupportedError

from .conftest import heldout_perplexity


def compress(model_dir: Path, text_file: Path, out: Path, **options):
    return compress_model(
        "structured-ffn", model_dir, out, str(text_file), quiet=True, eval_tokens=500,
        data_options={"sequence_length": 32}, **options,
    )  # fmt: skip


def test_the_sliced_model_equals_the_dense_one_with_those_channels_zeroed(
    model_dir: Path, text_file: Path, tmp_path: Path
):
    result = compress(model_dir, text_file, tmp_path / "out", keep_ratio=0.5)
    assert result.figures["ffn_channels"] == [64, 64]
    assert result.parameters[0] - result.parameters[1] == 2 * 3 * 64 * 64
    dense = load_model(model_dir).model
    with torch.no_grad():
        for layer in dense.model.layers:
            mlp = layer.mlp
            scores = channel_scores(mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
            mlp.down_proj.weight[:, scores.argsort()[:64]] = 0.0
        ids = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))
        sliced = load_model(tmp_path / "out").model
        assert torch.allclose(sliced(ids).logits, dense(ids).logits, atol=1e-5)


def test_config_is_the_contracts_form(model_dir: Path, text_file: Path, tmp_path: Path):
    compress(model_dir, text_file, tmp_path / "out", keep_ratio=[1.0, 0.5])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    family = {"llama": "SparseLlamaForCausalLM", "qwen3": "SparseQwen3ForCausalLM"}[config["model_type"]]
    assert config["architectures"] == [family]
    assert config["per_layer_config"] == {"1": {"intermediate_size": 64}}
    assert config["allow_global_per_layer_attribute_access"] is True
    assert config["intermediate_size"] == 128
    assert config["head_dim"] == 32


def test_biases_that_an_earlier_pruning_added_stay(model_dir: Path, text_file: Path, tmp_path: Path):
    compress_model(
        "flap", model_dir, tmp_path / "flap", str(text_file), quiet=True, eval_tokens=500, samples=8,
        sparsity=0.3, channel_multiple=8, data_options={"sequence_length": 32},
    )  # fmt: skip
    result = compress(tmp_path / "flap", text_file, tmp_path / "out", multiple_of=8)
    bias = load_model(tmp_path / "out").model.model.layers[0].mlp.down_proj.bias
    assert torch.equal(bias, load_model(tmp_path / "flap").model.model.layers[0].mlp.down_proj.bias)
    assert heldout_perplexity(tmp_path / "out", text_file, 32, 500) == pytest.approx(
        result.compressed.perplexity, rel=1e-6
    )


@pytest.mark.parametrize(("ratio", "kept"), [(0.5, 256), (0.45, 256), (0.99, 512), (0.01, 64), (1.0, 512)])
def test_counts_are_rounded_to_what_kernels_take(ratio: float, kept: int):
    assert kept_count(512, ratio, 64) == kept


def test_bad_ratios_are_refused(model_dir: Path, text_file: Path, tmp_path: Path):
    for ratio, message in ((1.5, "must lie in"), ([0.5], "has 1 values; the model has 2 layers")):
        with pytest.raises(FormatError, match=message):
            compress(model_dir, text_file, tmp_path / "out", keep_ratio=ratio)
    with pytest.raises(FormatError, match="multiple_of 256 exceeds the layer's 128"):
        compress(model_dir, text_file, tmp_path / "out", multiple_of=256)
    assert not (tmp_path / "out").exists()


CONFIG = {
    "model_type": "llama", "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 256,
}  # fmt: skip


def test_shapes_survive_the_config():
    shapes = [LayerShape(4, 2, 256), LayerShape(2, 1, 64), LayerShape(0, 0, 128)]
    config = structured_config(CONFIG, shapes)
    assert config["per_layer_config"]["2"] == {"intermediate_size": 128, "skip": ["attention"]}
    read = read_layer_shapes(config)
    assert read == shapes
    assert base_shape(config) == LayerShape(4, 2, 256)
    with pytest.raises(UnsupportedError, match="cannot be pruned structurally"):
        structured_config({**CONFIG, "model_type": "mamba"}, shapes)


def test_sliced_heads_equal_zeroed_heads_and_load_again(model_dir: Path, tmp_path: Path):
    loaded = load_model(model_dir)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2}
    shape = ModelShape(family=loaded.config["model_type"], **sizes, max_positions=256)
    model = build_model(shape, 300, 0, seed=3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.ndim == 2 else 1.0)
        ids = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(0))
        attention = model.model.layers[0].self_attn
        saved = attention.o_proj.weight.clone()
        attention.o_proj.weight[:, :32] = 0.0
        expected = model(ids).logits
        attention.o_proj.weight.copy_(saved)
        keep_heads(attention, torch.tensor([1]), torch.tensor([1]), 32)
        assert torch.allclose(model(ids).logits, expected, atol=1e-5)
    config = {**loaded.config, "num_key_value_heads": 2, "num_attention_heads": 2}
    config = structured_config(config, [LayerShape(1, 1, 128), LayerShape(2, 2, 128)])
    save_like(model, tmp_path, model_dir, config, torch.float32)
    with torch.no_grad():
        assert torch.allclose(load_model(tmp_path).model(ids).logits, expected, atol=1e-5)
    with pytest.raises(FormatError, match="do not use KV heads"):
        keep_heads(model.model.layers[1].self_attn, torch.tensor([0]), torch.tensor([1]), 32)
