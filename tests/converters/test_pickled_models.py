"""Model objects that pruning tools pickled whole: read as data, nothing in them runs."""

import json
import os
from pathlib import Path

import pytest
import torch
import torch_pruning
from transformers import LlamaConfig, LlamaForCausalLM

from converters.convert import convert
from converters.hf import load_for_evaluation
from vllm_sparse.errors import FormatError

TOKENS = torch.arange(40).reshape(2, 20) * 3 % 96
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "vocab_size": 96,
    "max_position_embeddings": 128,
}


def small_llama(**changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


def keep(linear: torch.nn.Linear, rows: int | None = None, columns: int | None = None) -> None:
    """Cut a linear in place, as pruning tools do."""
    linear.weight = torch.nn.Parameter(linear.weight.detach()[:rows, :columns].clone())
    linear.out_features, linear.in_features = linear.weight.shape


def cut_layer(layer: torch.nn.Module, heads: int, width: int) -> None:
    """Whole heads and feed-forward channels of one layer, LLM-Pruner's two kinds of groups."""
    for part in ("q_proj", "k_proj", "v_proj"):
        keep(getattr(layer.self_attn, part), rows=16 * heads)
    keep(layer.self_attn.o_proj, columns=16 * heads)
    layer.self_attn.num_heads = heads
    for part in ("gate_proj", "up_proj"):
        keep(getattr(layer.mlp, part), rows=width)
    keep(layer.mlp.down_proj, columns=width)


def like_llm_pruner() -> LlamaForCausalLM:
    model = small_llama()
    cut_layer(model.model.layers[1], heads=2, width=40)
    cut_layer(model.model.layers[2], heads=3, width=64)
    return model


class Tokenizer:
    """Some object beside the model."""


def served_like(model: torch.nn.Module, source: Path, out: Path, **options: object) -> dict:
    """Convert ``source``; what comes out answers as ``model`` does. Returns its config.json."""
    convert(source, out, to="structured", allow_pickle=True, **options)
    torch.testing.assert_close(logits(load_for_evaluation(out)), logits(model), rtol=0, atol=1e-5)
    return json.loads((out / "config.json").read_text())


def test_llm_pruners_file(tmp_path, caplog):
    """``{"model": ..., "tokenizer": ...}`` and no config.json beside it."""
    source = tmp_path / "prune_log"
    source.mkdir()
    model = like_llm_pruner()
    torch.save({"model": model, "tokenizer": Tokenizer()}, source / "pytorch_model.bin")
    config = served_like(model, source, tmp_path / "out")
    assert config["architectures"] == ["SparseLlamaForCausalLM"]
    assert (config["head_dim"], config["num_attention_heads"]) == (16, 4)
    assert config["per_layer_config"] == {
        "1": {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 40},
        "2": {"num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 64},
    }
    assert "tokenizer object is not" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "prune_log"]


def test_a_config_json_beside_the_file_wins(tmp_path):
    source = tmp_path / "src"
    source.mkdir()
    model = like_llm_pruner()
    torch.save(model.half(), source / "model.pt")
    values = json.loads(model.config.to_json_string()) | {"bos_token_id": 7}
    (source / "config.json").write_text(json.dumps(values))
    config = served_like(model.float(), source, tmp_path / "out")
    assert config["bos_token_id"] == 7


def prune_with_the_tool(model: LlamaForCausalLM) -> None:
    """Torch-Pruning itself: half of the feed-forward channels, and a quarter of one layer's on top."""

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=ids, use_cache=False).logits

    wrapped = Logits()
    ups = {layer.mlp.up_proj: 0.5 for layer in model.model.layers}
    ups[model.model.layers[1].mlp.up_proj] = 0.25
    others = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m not in ups]
    pruner = torch_pruning.pruner.BasePruner(
        wrapped,
        TOKENS,
        importance=torch_pruning.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.0,
        pruning_ratio_dict=ups,
        ignored_layers=[m for m in others if m.out_features != 96 or m is model.lm_head],
    )
    pruner.step()


@pytest.mark.parametrize("form", ["model object", "its state_dict"])
def test_torch_prunings_files(form, tmp_path):
    """Both that its documentation names: the pickled model, and every module's attributes by name."""
    model = small_llama(num_key_value_heads=2)
    prune_with_the_tool(model)
    widths = [layer.mlp.up_proj.out_features for layer in model.model.layers]
    assert widths == [48, 72, 48]
    source = tmp_path / "src"
    source.mkdir()
    whole = form == "model object"
    torch.save(model if whole else torch_pruning.state_dict(model), source / "pruned.pth")
    config = served_like(model, source, tmp_path / "out")
    found = [config["per_layer_config"].get(str(i), {}).get("intermediate_size", 96) for i in range(3)]
    assert found == widths


class Evil:
    """Runs code when unpickled without care."""

    def __reduce__(self):
        return (os.system, (f"touch {os.environ['EVIL_FILE']}",))


def test_nothing_of_a_model_object_runs(tmp_path, monkeypatch):
    """Not what stands beside it, in its attributes, its configuration or among its parameters."""
    monkeypatch.setenv("EVIL_FILE", str(tmp_path / "pwned"))
    source = tmp_path / "src"
    source.mkdir()
    model = small_llama()
    cut_layer(model.model.layers[1], heads=2, width=40)
    expected = small_llama()
    cut_layer(expected.model.layers[1], heads=2, width=40)
    model.hook = Evil()
    model.config.extra = Evil()
    model.model.layers[0].mlp.act_fn = torch.nn.Sequential()
    torch.save({"model": model, "tokenizer": Evil()}, source / "pytorch_model.bin")
    served_like(expected, source, tmp_path / "out")
    model.model.layers[0].mlp.up_proj._parameters["weight"] = Evil()
    torch.save({"model": model}, source / "pytorch_model.bin")
    with pytest.raises(FormatError, match=r"layers\.0\.mlp\.up_proj\.weight is no plain tensor"):
        convert(source, tmp_path / "again", to="structured", allow_pickle=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "src"]


def test_models_that_cannot_be_told(tmp_path):
    """A module inside itself, and a configuration of no family that is served."""
    source = tmp_path / "src"
    source.mkdir()
    model = small_llama()
    model.model._modules["again"] = model.model
    torch.save(model, source / "model.pt")
    with pytest.raises(FormatError, match=r"module model\.again lies inside itself"):
        convert(source, tmp_path / "out", to="structured", allow_pickle=True)
    model = small_llama()
    model.config = Tokenizer()
    torch.save(model, source / "model.pt")
    with pytest.raises(FormatError, match=r"Tokenizer', which is none of llama.*config\.json next to"):
        convert(source, tmp_path / "out", to="structured", allow_pickle=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]
