"""Structurally pruned checkpoints of every schema end as ``per_layer_config`` with the same logits."""

import json

import pytest
import torch
from checkpoint_maker import CONFIG, HEAD_DIM, HIDDEN, llama_tensors, write_checkpoint
from safetensors.torch import load_file

from converters.cli import run
from converters.convert import convert
from converters.hf import load_for_evaluation
from vllm_sparse.errors import FormatError, UnsupportedError, UserError

TOKENS = torch.arange(48).reshape(2, 24) * 5 % 128
LAYERS = 4
BASE = CONFIG | {"num_hidden_layers": LAYERS}


def four_layers() -> dict[str, torch.Tensor]:
    """Two times the two-layer model, with other numbers in layers 2 and 3."""
    tensors = llama_tensors(torch.float32, pruned=False)
    for name, value in llama_tensors(torch.float32, seed=1, pruned=False).items():
        if name.startswith("model.layers."):
            _, _, number, rest = name.split(".", 3)
            tensors[f"model.layers.{int(number) + 2}.{rest}"] = value
    return tensors


def prune_layer(
    tensors: dict, layer: int, heads: int | None = None, kv: int | None = None, width: int | None = None
) -> None:
    """Slice a layer to its first heads and channels; 0 removes the block with its norm."""
    prefix = f"model.layers.{layer}"
    if heads == 0:
        for name in [
            n for n in tensors if n.startswith((f"{prefix}.self_attn", f"{prefix}.input_layernorm"))
        ]:
            del tensors[name]
    elif heads is not None:
        for part, rows in (("q", heads), ("k", kv), ("v", kv)):
            key = f"{prefix}.self_attn.{part}_proj.weight"
            tensors[key] = tensors[key][: rows * HEAD_DIM].contiguous()
        key = f"{prefix}.self_attn.o_proj.weight"
        tensors[key] = tensors[key][:, : heads * HEAD_DIM].contiguous()
    if width == 0:
        for name in [
            n for n in tensors if n.startswith((f"{prefix}.mlp", f"{prefix}.post_attention_layernorm"))
        ]:
            del tensors[name]
    elif width is not None:
        for part in ("gate", "up"):
            key = f"{prefix}.mlp.{part}_proj.weight"
            tensors[key] = tensors[key][:width].contiguous()
        key = f"{prefix}.mlp.down_proj.weight"
        tensors[key] = tensors[key][:, :width].contiguous()


def zeroed() -> dict[str, torch.Tensor]:
    """The dense model that computes what :func:`pruned` computes."""
    tensors = four_layers()
    tensors["model.layers.0.mlp.down_proj.weight"][:, 48:] = 0
    tensors["model.layers.1.self_attn.o_proj.weight"].zero_()
    tensors["model.layers.2.self_attn.o_proj.weight"][:, 2 * HEAD_DIM :] = 0
    tensors["model.layers.3.mlp.down_proj.weight"].zero_()
    return tensors


def pruned() -> dict[str, torch.Tensor]:
    """Layer 0 half the channels, 1 no attention, 2 half the heads, 3 no feed-forward."""
    tensors = four_layers()
    prune_layer(tensors, 0, width=48)
    prune_layer(tensors, 1, heads=0)
    prune_layer(tensors, 2, heads=2, kv=1)
    prune_layer(tensors, 3, width=0)
    return tensors


ENTRIES = {
    "0": {"intermediate_size": 48},
    "1": {"skip": ["attention"]},
    "2": {"num_attention_heads": 2, "num_key_value_heads": 1},
    "3": {"skip": ["mlp"]},
}
PUZZLE = [
    {"attention": {"num_key_value_heads": 2}, "ffn": {"intermediate_size": 48}},
    {"attention": {"no_op": True}, "ffn": {"intermediate_size": 96}},
    {"attention": {}, "ffn": {"intermediate_size": 96}},
    {"attention": {"num_key_value_heads": 2}, "ffn": {"no_op": True}},
]
SUBBLOCKS = [
    {"subblock_configs": [{"kind": "attention", "num_query_heads": 4, "num_kv_heads": 2}, {"kind": "ffn"}]},
    {"subblock_configs": [{"kind": "ffn", "intermediate_size": 96}]},
    {"subblock_configs": [{"kind": "attention", "num_query_heads": 2, "num_kv_heads": 1}, {"kind": "ffn"}]},
    {"subblock_configs": [{"kind": "attention"}]},
]


def logits(path):
    with torch.no_grad():
        return load_for_evaluation(path)(input_ids=TOKENS, use_cache=False).logits


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return logits(write_checkpoint(tmp_path_factory.mktemp("zeroed") / "x", zeroed(), BASE))


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"per_layer_config": ENTRIES, "allow_global_per_layer_attribute_access": True},
        {"block_configs": SUBBLOCKS, "architectures": ["AnyModel"], "base_architecture": "LlamaForCausalLM"},
        {"layer_head_num": [4, 0, 2, 4], "layer_inter_size": [48, 96, 96, 0]},
    ],
    ids=["headers", "per_layer_config", "subblocks", "lists"],
)
def test_every_schema_gives_the_same_model(tmp_path, expected, extra):
    source = write_checkpoint(tmp_path / "src", pruned(), BASE | extra, shards=2)
    convert(source, tmp_path / "out", to="structured")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["per_layer_config"] == ENTRIES
    assert config["architectures"] == ["SparseLlamaForCausalLM"]
    assert config["allow_global_per_layer_attribute_access"] is True
    assert config["head_dim"] == HEAD_DIM
    assert (config["num_attention_heads"], config["intermediate_size"]) == (4, 96)
    assert not set(config) & {"block_configs", "layer_head_num", "layer_inter_size", "base_architecture"}
    assert torch.allclose(logits(tmp_path / "out"), expected, atol=1e-5)


def test_puzzletron_blocks(tmp_path):
    tensors = pruned()
    blocks = [dict(block) for block in PUZZLE]
    # This schema has no query heads per layer.
    blocks[2] = {"attention": {"num_key_value_heads": 1}, "ffn": {"intermediate_size": 96}}
    source = write_checkpoint(tmp_path / "src", tensors, BASE | {"block_configs": blocks})
    with pytest.raises(FormatError, match="layer 2 heads 4, its tensors show 2"):
        convert(source, tmp_path / "out", to="structured")
    tensors = four_layers()
    prune_layer(tensors, 0, width=48)
    prune_layer(tensors, 1, heads=0)
    prune_layer(tensors, 2, heads=4, kv=1)
    prune_layer(tensors, 3, width=0)
    convert(
        write_checkpoint(tmp_path / "src", tensors, BASE | {"block_configs": blocks}),
        tmp_path / "out",
        to="structured",
    )
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["per_layer_config"]["2"] == {"num_key_value_heads": 1}


def test_decilm(tmp_path):
    """Layer 2 is gone whole; widths come from ffn_mult, the global ones are not in the config."""
    tensors = four_layers()
    widths = {0: 256, 1: 512, 3: 256}
    for layer, width in widths.items():
        for part in ("gate", "up"):
            tensors[f"model.layers.{layer}.mlp.{part}_proj.weight"] = torch.randn(width, HIDDEN) * 0.05
        tensors[f"model.layers.{layer}.mlp.down_proj.weight"] = torch.randn(HIDDEN, width) * 0.05
    prune_layer(tensors, 2, heads=0, width=0)
    prune_layer(tensors, 3, heads=4, kv=1)
    blocks = [
        {"attention": {"n_heads_in_group": 2, "no_op": False}, "ffn": {"ffn_mult": 6.0, "no_op": False}},
        {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 7.5}},
        {"attention": {"n_heads_in_group": None, "no_op": True}, "ffn": {"no_op": True, "ffn_mult": None}},
        {"attention": {"n_heads_in_group": 4}, "ffn": {"ffn_mult": 1.0}},
    ]
    config = {
        key: value for key, value in BASE.items() if key not in ("num_key_value_heads", "intermediate_size")
    }
    config |= {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "auto_map": {"AutoModelForCausalLM": "evil.Model"},
        "block_configs": blocks,
        "layer_types": ["a", "b", "c", "d"],
    }
    source = write_checkpoint(tmp_path / "src", tensors, config)
    wrong = [*blocks[:1], {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 20}}, *blocks[2:]]
    with pytest.raises(FormatError, match="layer 1 width 1024, its tensors show 512"):
        convert(
            write_checkpoint(tmp_path / "wrong", tensors, config | {"block_configs": wrong}),
            tmp_path / "no",
            to="structured",
        )
    convert(source, tmp_path / "out", to="structured")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["model_type"] == "llama"
    assert written["num_hidden_layers"] == 3
    assert written["layer_types"] == ["a", "b", "d"]
    assert "auto_map" not in written
    assert written["per_layer_config"] == {
        "0": {"intermediate_size": 256},
        "2": {"num_key_value_heads": 1, "intermediate_size": 256},
    }
    names = load_file(tmp_path / "out/model.safetensors")
    assert {name.split(".")[2] for name in names if name.startswith("model.layers")} == {"0", "1", "2"}
    assert torch.equal(
        names["model.layers.2.mlp.up_proj.weight"], tensors["model.layers.3.mlp.up_proj.weight"]
    )


def test_flap_biases(tmp_path):
    tensors = four_layers()
    prune_layer(tensors, 1, width=48)
    for layer in range(LAYERS):
        tensors[f"model.layers.{layer}.self_attn.o_proj.bias"] = torch.ones(HIDDEN)
    tensors["model.layers.1.mlp.down_proj.bias"] = torch.ones(HIDDEN)
    convert(write_checkpoint(tmp_path / "src", tensors, BASE), tmp_path / "out", to="structured")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["o_proj_bias"] is True
    assert config["down_proj_bias"] is False
    assert config["per_layer_config"] == {"1": {"intermediate_size": 48, "down_proj_bias": True}}


def test_uniform_pruning_stays_an_ordinary_model(tmp_path):
    tensors = four_layers()
    for layer in range(LAYERS):
        prune_layer(tensors, layer, width=64)
    convert(write_checkpoint(tmp_path / "src", tensors, BASE), tmp_path / "out", to="structured")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["intermediate_size"] == 64
    assert "per_layer_config" not in config
    assert logits(tmp_path / "out").isfinite().all()


def test_depth_pruned_without_renumbering(tmp_path):
    tensors = {n: t for n, t in four_layers().items() if not n.startswith("model.layers.1.")}
    source = write_checkpoint(tmp_path / "src", tensors, BASE | {"num_hidden_layers": 3})
    convert(source, tmp_path / "out", to="structured")
    ours = logits(tmp_path / "out")
    renumbered = {}
    for name, tensor in tensors.items():
        for old, new in ((2, 1), (3, 2)):
            name = name.replace(f"model.layers.{old}.", f"model.layers.{new}.")
        renumbered[name] = tensor
    direct = logits(write_checkpoint(tmp_path / "direct", renumbered, BASE | {"num_hidden_layers": 3}))
    assert torch.equal(ours, direct)


def test_last_layers_values_in_the_config_do_not_mislead(tmp_path):
    """Torch-Pruning writes the last layer's width for all; the tensors decide."""
    source = write_checkpoint(tmp_path / "src", pruned(), BASE | {"intermediate_size": 48})
    convert(source, tmp_path / "out", to="structured")
    entries = json.loads((tmp_path / "out/config.json").read_text())["per_layer_config"]
    assert [entries.get(str(i), {}).get("intermediate_size", 48) for i in range(3)] == [48, 96, 96]


def test_pruned_heads_without_head_dim_are_not_guessed(tmp_path):
    """Uniform, two of four heads left: a config with the pruned number would give twice the head_dim."""
    tensors = four_layers()
    for layer in range(LAYERS):
        prune_layer(tensors, layer, heads=2, kv=1)
    for heads in (2, 4):
        config = BASE | {"num_attention_heads": heads, "num_key_value_heads": 1, "head_dim": None}
        refused(tmp_path, tensors, config, "every layer has 32 query rows", FormatError)
    source = write_checkpoint(tmp_path / "src", tensors, BASE | {"num_attention_heads": 2})
    convert(source, tmp_path / "out", to="structured")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (
        2,
        1,
        HEAD_DIM,
    )


def test_sliced_residual_is_refused_with_the_reason(tmp_path):
    tensors = four_layers()
    tensors["model.layers.1.attn_shortcut_Q"] = torch.zeros(HIDDEN, 48)
    says = r"layer 1: attn_shortcut_Q projects .*SliceGPT"
    refused(tmp_path, tensors, BASE, says, UnsupportedError)
    # As the tool leaves it: a pickled state dict and a slicing config, no config.json.
    source = tmp_path / "sliced"
    source.mkdir()
    torch.save(tensors, source / "llama_0.25.pt")
    (source / "llama_0.25.json").write_text(json.dumps({"hidden_size": HIDDEN, "sliced": True}))
    with pytest.raises(UnsupportedError, match=says):
        convert(source, tmp_path / "out", to="structured", allow_pickle=True)


def refused(tmp_path, tensors, config, says, error=UserError):
    source = write_checkpoint(tmp_path / "broken", tensors, config)
    with pytest.raises(error, match=says):
        convert(source, tmp_path / "out", to="structured")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


def test_a_missing_layer_is_not_taken_for_a_dropped_one(tmp_path):
    tensors = {n: t for n, t in four_layers().items() if not n.startswith("model.layers.1.")}
    refused(tmp_path, tensors, BASE, "layer 1 has no tensors")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("model.layers.2.self_attn.v_proj.weight"), r"no self_attn\.v_proj\.weight"),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(40, HIDDEN)}),
            "do not fit together",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.weight": torch.zeros(40, HIDDEN)}),
            "do not fit together",
        ),
        (
            lambda t: t.update({"model.layers.9.mlp.up_proj.weight": torch.zeros(40, HIDDEN)}),
            "no mlp.gate_proj",
        ),
    ],
)
def test_contradicting_shapes(tmp_path, change, says):
    tensors = pruned()
    change(tensors)
    refused(tmp_path, tensors, BASE, says, FormatError)


@pytest.mark.parametrize(
    ("extra", "error", "says"),
    [
        (
            {
                "per_layer_config": {"0": {"intermediate_size": 40}},
                "allow_global_per_layer_attribute_access": True,
            },
            FormatError,
            "per_layer_config gives layer 0 width 40",
        ),
        ({"layer_inter_size": [48, 96]}, FormatError, "describes 2 layers"),
        ({"layer_inter_size": [48, 96, 96, -1]}, FormatError, "whole numbers"),
        ({"layer_head_num": [4, 0, 4, 4]}, FormatError, "gives layer 2 heads 4, its tensors show 2"),
        ({"block_configs": ["x"]}, FormatError, "list of objects"),
        (
            {"block_configs": [{"attention": {"replace_with_linear": True}}]},
            UnsupportedError,
            "replace_with_linear",
        ),
        ({"block_configs": [{"subblock_configs": [{"kind": "mamba"}]}]}, UnsupportedError, "mamba"),
        ({"block_configs": [{"parallel_blocks": [{}]}]}, UnsupportedError, "parallel_blocks"),
        ({"block_configs": [{"attention": {"n_heads_in_group": 3}}]}, FormatError, "does not divide"),
        ({"model_type": "bloom"}, UnsupportedError, "bloom"),
        ({"num_hidden_layers": "4"}, FormatError, "num_hidden_layers"),
        ({"head_dim": None, "num_attention_heads": 5}, FormatError, "head_dim"),
    ],
)
def test_configs_that_are_refused(tmp_path, extra, error, says):
    refused(tmp_path, pruned(), BASE | extra, says, error)


def test_a_per_layer_config_that_is_no_object(tmp_path):
    source = write_checkpoint(tmp_path / "src", llama_tensors(), CONFIG | {"per_layer_config": [{}, {}]})
    with pytest.raises(FormatError, match="per_layer_config must be an object"):
        convert(source, tmp_path / "out", to="structured")


@pytest.mark.parametrize("weights", ["keep", "int4"])
def test_packed_weights_are_no_source(tmp_path, weights):
    """They go through dense."""
    convert(write_checkpoint(tmp_path / "src", llama_tensors()), tmp_path / "packed", weights=weights)
    with pytest.raises(UnsupportedError, match="--to dense first"):
        convert(tmp_path / "packed", tmp_path / "out", to="structured")
    convert(tmp_path / "packed", tmp_path / "dense", to="dense")
    convert(tmp_path / "dense", tmp_path / "out", to="structured")


def test_layers_without_any_block(tmp_path):
    tensors = {"model.layers.0.other.weight": torch.ones(8, 8)}
    source = write_checkpoint(tmp_path / "src", tensors, CONFIG | {"num_hidden_layers": 1})
    with pytest.raises(FormatError, match="no layer"):
        convert(source, tmp_path / "out", to="structured")


@pytest.mark.parametrize("uniform", [True, False])
def test_a_model_of_equal_layers_is_said_to_be_an_ordinary_one(tmp_path, uniform, capsys):
    source = write_checkpoint(tmp_path / "src", four_layers() if uniform else pruned(), BASE)
    assert run(["convert", str(source), str(tmp_path / "out"), "--to", "structured"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ("per_layer_config" not in config) is uniform
    assert ("no layer of the 4 differs from another in shape" in said) is uniform
    assert ("an ordinary LlamaForCausalLM" in said) is uniform
