"""Expert cuts, expert widths, latent attention and uneven query groups, against plain torch in float64."""

import json
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_maker import write_checkpoint
from safetensors.torch import load_file

from converters.convert import convert
from vllm_sparse.errors import FormatError, UnsupportedError

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
import structured_checkpoints as models
from structured_reference import logprobs

IDS = torch.randint(3, models.VOCAB, (24,), generator=torch.Generator().manual_seed(4)).tolist()
HIDDEN, DIM = models.HIDDEN, models.HEAD_DIM


def converted(tmp_path, tensors, config, **options):
    source = write_checkpoint(tmp_path / "src", tensors, config, shards=2)
    report = convert(source, tmp_path / "out", to="structured", **options)
    written = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        written |= load_file(file)
    return json.loads((tmp_path / "out/config.json").read_text()), written, report


def without_entries(config):
    """The config as most pruning tools leave it: of the unpruned model."""
    plain = {key: value for key, value in config.items() if "per_layer" not in key}
    return plain | {"architectures": ["Whatever"]}


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek", "deepseek_v2", "deepseek_v3"])
def test_shapes_are_found_in_the_tensors(family, tmp_path):
    layers = {
        key: {name: value for name, value in entry.items() if name != "num_experts_per_tok"}
        for key, entry in models.layers_for(family).items()
        if key not in ("3",)
    }
    renumbered = {str(i): layers[key] for i, key in enumerate(sorted(layers))} if "0" in layers else layers
    count = 6
    config = models.make_config(family, count, renumbered)
    tensors = models.make_tensors(config)
    found, written, _ = converted(tmp_path, tensors, without_entries(config))
    assert found["per_layer_config"] == renumbered
    assert found["architectures"] == [models.ARCHITECTURES[family]]
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    torch.testing.assert_close(logprobs(written, found, IDS), logprobs(tensors, config, IDS), rtol=0, atol=0)


def puzzle_blocks(family, config, revision):
    """The same layers in Puzzletron's words; the first revision has no query heads."""
    count = "num_local_experts" if family == "mixtral" else "num_experts"
    width = "intermediate_size" if family == "mixtral" else "moe_intermediate_size"
    blocks = []
    for layer in models.layers_of(config):
        skip = layer.skip
        experts = {
            "num_local_experts": layer[count],
            "num_experts_per_tok": layer["num_experts_per_tok"],
            "expert_intermediate_dim": layer[width],
        }
        if revision == "subblocks":
            heads = {
                "num_query_heads": layer["num_attention_heads"],
                "num_kv_heads": layer["num_key_value_heads"],
            }
            parts = [] if "attention" in skip else [{"kind": "attention", **heads}]
            parts += [] if "mlp" in skip else [{"kind": "moe", **experts}]
            blocks.append({"subblock_configs": parts})
            continue
        attention = {"num_key_value_heads": layer["num_key_value_heads"], "no_op": "attention" in skip}
        ffn = {"no_op": True} if "mlp" in skip else {"moe": experts, "intermediate_size": None}
        blocks.append({"attention": attention, "ffn": ffn, "parallel_blocks": None})
    return blocks


@pytest.mark.parametrize("revision", ["blocks", "subblocks"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_puzzletron_blocks_of_experts(family, revision, tmp_path):
    """Also how many experts a token takes, which no tensor shows."""
    layers = models.layers_for(family)
    if revision == "blocks":
        layers = {
            key: {n: v for n, v in own.items() if n != "num_attention_heads"} for key, own in layers.items()
        }
        layers = {
            key: own | ({"num_key_value_heads": 4} if key == "5" else {}) for key, own in layers.items()
        }
    layers["1"] = layers["1"] | {"num_experts_per_tok": 3}
    config = models.make_config(family, 6, layers)
    tensors = models.make_tensors(config)
    plain = without_entries(config)
    blocks = puzzle_blocks(family, config, revision)
    found, written, _ = converted(tmp_path, tensors, plain | {"block_configs": blocks})
    assert found["per_layer_config"]["1"]["num_experts_per_tok"] == 3
    assert "block_configs" not in found
    torch.testing.assert_close(logprobs(written, found, IDS), logprobs(tensors, config, IDS), rtol=0, atol=0)
    text = json.dumps(blocks)
    for wrong, says in (
        (
            text.replace('"num_local_experts": 6', '"num_local_experts": 5'),
            "layer 1 experts 5, its tensors show 6",
        ),
        (
            text.replace('"expert_intermediate_dim": 32', '"expert_intermediate_dim": 48'),
            "layer 1 expert width 48",
        ),
        (
            text.replace('"num_local_experts": 6', '"num_local_experts": 0'),
            "needs one positive num_local_experts",
        ),
    ):
        source = write_checkpoint(tmp_path / "wrong", tensors, plain | {"block_configs": json.loads(wrong)})
        with pytest.raises(FormatError, match=says):
            convert(source, tmp_path / "no", to="structured")


def test_cut_experts_are_renumbered_with_the_router(tmp_path):
    """Layer 0: numbers with gaps and an uncut router. Layer 1: renumbered and cut already."""
    uncut = models.make_config("qwen3_moe", 3)
    tensors = models.make_tensors(uncut)
    kept = {0: [0, 2, 3, 7], 1: [1, 4, 5, 6, 7]}
    cut, wanted = {}, {}
    for name, tensor in tensors.items():
        layer = int(name.split(".")[2]) if ".layers." in name else None
        if layer not in kept or ".mlp." not in name:
            cut[name] = wanted[name] = tensor
        elif name.endswith("mlp.gate.weight"):
            wanted[name] = tensor[kept[layer]]
            cut[name] = tensor if layer == 0 else wanted[name]
        else:
            expert = int(name.split(".experts.")[1].split(".")[0])
            if expert in kept[layer]:
                new = name.replace(f"experts.{expert}.", f"experts.{kept[layer].index(expert)}.")
                wanted[new] = tensor
                cut[name if layer == 0 else new] = tensor
    found, written, _ = converted(tmp_path, cut, without_entries(uncut))
    assert found["per_layer_config"] == {"0": {"num_experts": 4}, "1": {"num_experts": 5}}
    assert set(written) == set(wanted)
    assert all(torch.equal(written[name], tensor) for name, tensor in wanted.items())


def test_correction_biases_are_cut_with_the_router(tmp_path):
    """A cut DeepSeek-V3: experts gone, the router and its biases not yet; a drafting layer at the end."""
    uncut = models.make_config("deepseek_v3", 4)
    tensors = models.make_tensors(uncut)
    drafting = {name for name in tensors if name.startswith("model.layers.3.")}
    kept = [0, 2, 3, 4, 5, 7]
    cut, wanted = {}, {}
    for name, tensor in tensors.items():
        if ".layers.1.mlp.gate." in name:
            cut[name], wanted[name] = tensor, tensor[kept]
        elif ".layers.1.mlp.experts." in name:
            expert = int(name.split(".experts.")[1].split(".")[0])
            if expert in kept:
                cut[name] = tensor
                wanted[name.replace(f"experts.{expert}.", f"experts.{kept.index(expert)}.")] = tensor
        else:
            cut[name] = tensor
            if name not in drafting:
                wanted[name] = tensor
    source = without_entries(uncut) | {"num_hidden_layers": 3, "num_nextn_predict_layers": 1}
    found, written, report = converted(tmp_path, cut, source)
    assert written["model.layers.1.mlp.gate.e_score_correction_bias"].shape == (6,)
    assert found["per_layer_config"] == {"1": {"n_routed_experts": 6}}
    assert found["num_nextn_predict_layers"] == 0
    assert report.notes[0].startswith("the last 1 layers predict further tokens")
    assert set(written) == set(wanted)
    assert all(torch.equal(written[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("align", [0, 48])
def test_experts_of_unequal_width_are_padded_and_the_waste_is_said(tmp_path, align):
    config = models.make_config("mixtral", 2, num_local_experts=4, intermediate_size=64)
    tensors = models.make_tensors(config)
    widths = (64, 40, 8, 24)
    for expert, width in enumerate(widths):
        block = f"model.layers.1.block_sparse_moe.experts.{expert}"
        for part in ("w1", "w3"):
            tensors[f"{block}.{part}.weight"] = tensors[f"{block}.{part}.weight"][:width].contiguous()
        tensors[f"{block}.w2.weight"] = tensors[f"{block}.w2.weight"][:, :width].contiguous()
    found, written, report = converted(tmp_path, tensors, without_entries(config), align=align)
    waste = 100 * (1 - sum(widths) / (4 * 64))
    assert report.notes[0] == (
        f"layer 1: experts 8 to 64 wide, padded with zeros to 64, {waste:.1f} % of their channels"
    )
    wide = 96 if align else 64
    assert written["model.layers.1.block_sparse_moe.experts.2.w2.weight"].shape == (HIDDEN, wide)
    assert written["model.layers.0.block_sparse_moe.experts.0.w1.weight"].shape == (wide, HIDDEN)
    torch.testing.assert_close(
        logprobs(written, found, IDS), logprobs(tensors, config, IDS), rtol=0, atol=1e-12
    )


def test_dropped_layers_move_the_dense_ones(tmp_path):
    """Layers 0 and 2 of a DeepSeek are gone: the dense layer is no longer there, the keys say so."""
    config = models.make_config("deepseek", 4)
    tensors = models.make_tensors(config)
    cut = {n: t for n, t in tensors.items() if not n.startswith(("model.layers.0.", "model.layers.2."))}
    found, written, _ = converted(tmp_path, cut, without_entries(config) | {"num_hidden_layers": 2})
    assert found["first_k_dense_replace"] == 0
    assert found["num_hidden_layers"] == 2
    assert "model.layers.1.mlp.experts.7.up_proj.weight" in written
    config = models.make_config("qwen3_moe", 4, mlp_only_layers=[2])
    tensors = models.make_tensors(config)
    cut = {n: t for n, t in tensors.items() if not n.startswith("model.layers.1.")}
    found, _, _ = converted(tmp_path / "q", cut, without_entries(config) | {"num_hidden_layers": 3})
    assert (found["mlp_only_layers"], found["decoder_sparse_step"]) == ([1], 1)


def test_query_heads_that_share_kv_heads_unequally(tmp_path):
    """Of eight query heads over four KV heads, pruning left 2, 1, 0 and 2 in layer 1."""
    config = models.make_config("qwen2", 2, num_attention_heads=8)
    masked = models.make_tensors(config)
    kept, counts = [0, 1, 3, 6, 7], [2, 1, 0, 2]
    pruned, name = dict(masked), "model.layers.1.self_attn"
    for part in ("weight", "bias"):
        heads = masked[f"{name}.q_proj.{part}"].unflatten(0, (-1, DIM))[kept]
        pruned[f"{name}.q_proj.{part}"] = heads.flatten(0, 1).contiguous()
    columns = masked[f"{name}.o_proj.weight"].unflatten(1, (-1, DIM))
    pruned[f"{name}.o_proj.weight"] = columns[:, kept].flatten(1).contiguous()
    removed = torch.tensor([head for head in range(8) if head not in kept])
    masked[f"{name}.o_proj.weight"] = columns.index_fill(1, removed, 0).flatten(1)

    says = {"1": {"query_heads_per_kv_head": counts}}
    source = config | {"per_layer_config": says, "allow_global_per_layer_attribute_access": True}
    found, written, report = converted(tmp_path, pruned, source)
    assert found["per_layer_config"] == {"1": {"num_attention_heads": 6, "num_key_value_heads": 3}}
    assert report.notes[0].startswith("layer 1: 1 of 6 query heads are zeros")
    torch.testing.assert_close(
        logprobs(written, found, IDS), logprobs(masked, config, IDS), rtol=0, atol=1e-12
    )
    for wrong, what in (([2, 1, 1, 2], "tensors show 5 query and 4 KV"), ([2, -1], "a list is needed")):
        source["per_layer_config"] = {"1": {"query_heads_per_kv_head": wrong}}
        folder = write_checkpoint(tmp_path / "wrong", pruned, source)
        with pytest.raises(FormatError, match=what):
            convert(folder, tmp_path / "no", to="structured")


def broken(family, change, **extra):
    config = without_entries(models.make_config(family, 3, **extra))
    tensors = models.make_tensors(config)
    change(tensors)
    return tensors, config


@pytest.mark.parametrize(
    ("family", "change", "error", "says"),
    [
        (
            "qwen3_moe",
            lambda t: t.pop("model.layers.1.mlp.experts.3.up_proj.weight"),
            FormatError,
            r"layer 1: mlp.experts.3 has no up_proj.weight",
        ),
        (
            "mixtral",
            lambda t: t.update({"model.layers.1.block_sparse_moe.gate.weight": torch.zeros(5, HIDDEN)}),
            FormatError,
            "router scores 5 experts, the layer has 8",
        ),
        (
            "mixtral",
            lambda t: t.pop("model.layers.1.block_sparse_moe.gate.weight"),
            FormatError,
            "router block_sparse_moe.gate.weight is missing",
        ),
        (
            "deepseek",
            lambda t: t.update({"model.layers.1.mlp.experts.gate_up_proj": torch.zeros(8, 128, HIDDEN)}),
            UnsupportedError,
            "holds all experts in one tensor",
        ),
        (
            "deepseek",
            lambda t: t.update({"model.layers.1.mlp.shared_experts.up_proj.weight": torch.zeros(9, HIDDEN)}),
            FormatError,
            "mlp.shared_experts: shapes",
        ),
        (
            "deepseek_v3",
            lambda t: t.update({"model.layers.1.mlp.gate.e_score_correction_bias": torch.zeros(6)}),
            FormatError,
            "correction_bias has 6 numbers, the router scores 8 experts; cut the biases with",
        ),
        (
            "deepseek_v3",
            lambda t: t.pop("model.layers.1.mlp.gate.e_score_correction_bias"),
            FormatError,
            "correction_bias is missing; deepseek_v3 routers choose by it",
        ),
        (
            "deepseek_v2",
            lambda t: t.pop("model.layers.2.self_attn.kv_b_proj.weight"),
            FormatError,
            "layer 2 has self_attn.q_a_proj.weight but no self_attn.kv_b_proj.weight",
        ),
        (
            "deepseek_v2",
            lambda t: t.update({"model.layers.2.self_attn.o_proj.weight": torch.zeros(HIDDEN, 40)}),
            FormatError,
            "v_head_dim 32 does not divide",
        ),
    ],
)
def test_broken_experts_are_refused(tmp_path, family, change, error, says):
    folder = write_checkpoint(tmp_path / "src", *broken(family, change))
    with pytest.raises(error, match=says):
        convert(folder, tmp_path / "out", to="structured")
    assert not (tmp_path / "out").exists()


def test_a_dense_layer_after_experts_is_refused_for_deepseek(tmp_path):
    config = without_entries(models.make_config("deepseek", 2))
    tensors = models.make_tensors(config)
    moved = {
        name.replace("layers.0.", "layers.x.")
        .replace("layers.1.", "layers.0.")
        .replace("layers.x.", "layers.1."): t
        for name, t in tensors.items()
    }
    folder = write_checkpoint(tmp_path / "src", moved, config)
    with pytest.raises(UnsupportedError, match="have their dense layers first"):
        convert(folder, tmp_path / "out", to="structured")
