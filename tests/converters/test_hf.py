"""Models built from compressed checkpoints compute what their dense twins compute."""

import json

import pytest
import torch
from checkpoint_maker import CONFIG, llama_tensors, write_checkpoint
from safetensors.torch import load_file, save_file

from converters.convert import convert
from converters.hf import load_for_evaluation
from vllm_sparse.errors import FormatError

TOKENS = torch.arange(48).reshape(2, 24) * 7 % 128


def logits(path, dtype=torch.float32):
    with torch.no_grad():
        return load_for_evaluation(path, dtype)(input_ids=TOKENS, use_cache=False).logits


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("hf") / "src", llama_tensors())


def test_packed_equals_dense(source, tmp_path):
    import transformers

    convert(source, tmp_path / "packed")
    stock = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = stock(input_ids=TOKENS, use_cache=False).logits
    assert torch.equal(logits(source), expected)
    assert torch.equal(logits(tmp_path / "packed"), expected)


@pytest.mark.parametrize(("weights", "bound"), [("int8", 0.02), ("fp8", 0.06), ("int4", 0.2)])
def test_quantised_is_near_dense(source, tmp_path, weights, bound):
    convert(source, tmp_path / "q", weights=weights)
    dense, quantised = logits(source), logits(tmp_path / "q")
    error = (quantised - dense).norm() / dense.norm()
    assert 0 < error < bound


def test_structured_model_is_built_from_its_own_shapes(source, tmp_path):
    """Layer 0 loses half its FFN and a KV group, layer 1 its attention; zeroing gives the same result."""
    pruned, zeroed = llama_tensors(), llama_tensors()
    layer = "model.layers.0"
    for name in ("gate_proj", "up_proj"):
        pruned[f"{layer}.mlp.{name}.weight"] = pruned[f"{layer}.mlp.{name}.weight"][:48].contiguous()
    pruned[f"{layer}.mlp.down_proj.weight"] = pruned[f"{layer}.mlp.down_proj.weight"][:, :48].contiguous()
    zeroed[f"{layer}.mlp.down_proj.weight"][:, 48:] = 0
    for name, rows in (("q", 32), ("k", 16), ("v", 16)):
        key = f"{layer}.self_attn.{name}_proj.weight"
        pruned[key] = pruned[key][:rows].contiguous()
    key = f"{layer}.self_attn.o_proj.weight"
    pruned[key] = pruned[key][:, :32].contiguous()
    zeroed[key][:, 32:] = 0
    for name in list(pruned):
        if name.startswith(("model.layers.1.self_attn", "model.layers.1.input_layernorm")):
            del pruned[name]
    zeroed["model.layers.1.self_attn.o_proj.weight"].zero_()
    config = CONFIG | {
        "architectures": ["SparseLlamaForCausalLM"],
        "allow_global_per_layer_attribute_access": True,
        "per_layer_config": {
            "0": {"intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1},
            "1": {"skip": ["attention"]},
        },
    }
    got = logits(write_checkpoint(tmp_path / "pruned", pruned, config))
    expected = logits(write_checkpoint(tmp_path / "zeroed", zeroed))
    assert torch.allclose(got, expected, atol=1e-6)


def test_weights_that_do_not_fit_are_named(source, tmp_path):
    folder = write_checkpoint(tmp_path / "broken", llama_tensors())
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if k != "model.norm.weight"}, folder / "model.safetensors")
    with pytest.raises(FormatError, match=r"lacks weights .*model\.norm\.weight"):
        load_for_evaluation(folder)
    save_file(tensors | {"stray": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(FormatError, match=r"unknown weights .*stray"):
        load_for_evaluation(folder)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in CONFIG.items() if k != "model_type"}))
    with pytest.raises(FormatError, match="model_type"):
        load_for_evaluation(folder)
