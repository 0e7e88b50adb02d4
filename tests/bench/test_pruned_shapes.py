"""The pruned 1B shapes: shares removed, parameters counted, KV tokens predicted, what is written."""

import json
import math

import pytest
from safetensors import safe_open

from bench import pruned_shapes
from vllm_sparse.errors import UserError
from vllm_sparse.models.layer_config import read_model_shape
from vllm_sparse.models.tensors import check_folder, declared_tensors

SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 512,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 8,
}


@pytest.mark.parametrize("removed", pruned_shapes.MODELS.values(), ids=pruned_shapes.MODELS.keys())
def test_the_named_share_is_gone_and_every_parameter_is_counted(removed: float) -> None:
    dense, size = (pruned_shapes.size_of(pruned_shapes.layer_shapes(share)) for share in (0.0, removed))
    assert size.layers / dense.layers == pytest.approx(1 - removed, abs=0.005)
    shape = read_model_shape(pruned_shapes.model_config(removed))
    matrices = sum(math.prod(wanted) for _, wanted in declared_tensors(shape))
    norms = sum((layer.attention is not None) + (layer.ffn is not None) for layer in shape.layers)
    hidden, vocabulary = (pruned_shapes.CONFIG[key] for key in ("hidden_size", "vocab_size"))
    assert size.layers == matrices + norms * hidden
    assert size.total == size.layers + (vocabulary + 1) * hidden


def test_layers_differ_and_the_deepest_cut_takes_an_attention_block() -> None:
    half = pruned_shapes.layer_shapes(0.5)
    assert len({layer.intermediate_size for layer in half}) > 3
    assert len({layer.num_key_value_heads for layer in half}) > 3
    assert [layer.num_key_value_heads for layer in half].count(0) == 1
    with pytest.raises(UserError, match=r"0 to 0\.7"):
        pruned_shapes.layer_shapes(0.9)


def test_kv_tokens_are_whole_blocks_of_what_the_heads_take() -> None:
    rows = {row["model"]: row for row in pruned_shapes.facts(kv_cache_gib=1.0)}
    for row in rows.values():
        heads = sum(
            s.num_key_value_heads for s in pruned_shapes.layer_shapes(pruned_shapes.MODELS[row["model"]])
        )
        assert row["kv_token_bytes"] == heads * 64 * 2 * 2
        assert row["kv_tokens"] == 2**30 // (row["kv_token_bytes"] * 128) * 128
    assert rows["dense"]["kv_tokens"] == 32768
    assert rows["dense"]["parameter_ratio"] == 1


def test_what_is_written_can_be_served(tmp_path, monkeypatch) -> None:
    for key, value in SMALL.items():
        monkeypatch.setitem(pruned_shapes.CONFIG, key, value)
    folder = pruned_shapes.write(tmp_path / "half", 0.5)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["SparseLlamaForCausalLM"]
    check_folder(read_model_shape(config), folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        count = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    assert count == pruned_shapes.size_of(pruned_shapes.layer_shapes(0.5)).total
    assert len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]) == 128
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert pruned_shapes.write(folder, 0.5) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert [path.name for path in tmp_path.iterdir()] == ["half"]


def test_an_unknown_model_is_refused(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["pruned_shapes", str(tmp_path), "--only", "pruned-30"])
    assert pruned_shapes.run() == 2
    assert "choose of dense, pruned-20, pruned-50" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
