"""Experts are packed or left dense together; memory stays far below the checkpoint's size."""

import json
import subprocess
import sys

import pytest
import torch
from checkpoint_maker import CONFIG, prune, write_checkpoint
from safetensors.torch import load_file

from converters.convert import convert
from converters.inspect import inspect
from converters.layers import Kind, fusion_group, kind_of
from converters.writers import sparse24
from vllm_sparse.quantization.matching import LayerPatterns
from vllm_sparse.sparse24 import compress

EXPERTS = 3


def moe_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = {"model.embed_tokens.weight": torch.randn(32, 16, generator=generator)}
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp"
        tensors[f"{prefix}.gate.weight"] = prune(torch.randn(EXPERTS, 16, generator=generator))
        for expert in range(EXPERTS):
            for name, shape in {"gate_proj": (8, 16), "up_proj": (8, 16), "down_proj": (16, 8)}.items():
                weight = prune(torch.randn(*shape, generator=generator))
                tensors[f"{prefix}.experts.{expert}.{name}.weight"] = weight
    return tensors


def test_experts_agree_and_the_router_stays_dense(tmp_path):
    tensors = moe_tensors()
    tensors["model.layers.1.mlp.experts.2.up_proj.weight"][0, :4] = 1
    source = write_checkpoint(tmp_path / "src", tensors, CONFIG | {"model_type": "qwen3_moe"})
    report = convert(source, tmp_path / "out")
    assert report.packed == 9
    assert len(report.dense) == 9
    assert all(name.startswith("model.layers.1.mlp.experts.") for name in report.dense)
    config = json.loads((tmp_path / "out/config.json").read_text())
    ignore = config["quantization_config"]["sparsity_config"]["ignore"]
    assert {"model.layers.0.mlp.gate", "model.layers.1.mlp.gate", "lm_head"} <= set(ignore)
    assert len(ignore) == 12


def test_packed_routers_are_told_and_stored_dense(tmp_path):
    """As llm-compressor's examples prune: every linear of a decoder layer, its router too."""
    tensors = {}
    for name, weight in moe_tensors().items():
        if "embed" in name:
            tensors[name] = weight
            continue
        module = name.removesuffix(".weight")
        values, bitmask = compress(weight)
        tensors[f"{module}.compressed"], tensors[f"{module}.bitmask"] = values, bitmask
        tensors[f"{module}.shape"] = torch.tensor(weight.shape).reshape(2, 1)
    sparsity = {"format": "sparse-24-bitmask", "sparsity_structure": "2:4", "targets": ["Linear"]}
    block = {"quant_method": "compressed-tensors", "sparsity_config": sparsity | {"ignore": ["lm_head"]}}
    config = CONFIG | {"model_type": "qwen3_moe", "quantization_config": block}
    source = write_checkpoint(tmp_path / "src", tensors, config)
    (warning,) = inspect(source).warnings
    assert warning.startswith("2 routers are stored packed (model.layers.0.mlp.gate, ...)")
    convert(source, tmp_path / "out")
    assert inspect(tmp_path / "out").warnings == ()
    gate = "model.layers.0.mlp.gate.weight"
    assert torch.equal(load_file(tmp_path / "out/model.safetensors")[gate], moe_tensors()[gate])


def test_long_ignore_lists_name_experts_by_pattern(tmp_path, monkeypatch):
    monkeypatch.setattr(sparse24, "MAX_IGNORED", 5)
    tensors = moe_tensors()
    tensors["model.layers.1.mlp.experts.0.up_proj.weight"][0, :4] = 1
    source = write_checkpoint(tmp_path / "src", tensors, CONFIG | {"model_type": "qwen3_moe"})
    report = convert(source, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    ignore = config["quantization_config"]["sparsity_config"]["ignore"]
    assert len(ignore) == 4
    patterns = LayerPatterns(ignore, "ignore")
    assert all(patterns.matches_name(name) for name in report.dense)
    assert not patterns.matches_name("model.layers.0.mlp.experts.0.up_proj")
    assert not patterns.matches_name("model.layers.11.mlp.experts.0.up_proj")


@pytest.mark.parametrize(
    ("name", "rank", "kind"),
    [
        ("model.layers.0.self_attn.q_proj.weight", 2, Kind.LINEAR),
        ("model.layers.0.mlp.experts.7.w2.weight", 2, Kind.LINEAR),
        ("model.layers.0.input_layernorm.weight", 1, Kind.OTHER),
        ("model.layers.0.self_attn.q_proj.bias", 1, Kind.OTHER),
        ("model.visual.patch_embed.proj.weight", 5, Kind.OTHER),
        ("model.embed_tokens.weight", 2, Kind.EMBEDDING),
        ("transformer.wte.weight", 2, Kind.EMBEDDING),
        ("model.decoder.embed_positions.weight", 2, Kind.EMBEDDING),
        ("text_embedder.layers.0.mlp.up_proj.weight", 2, Kind.LINEAR),
        ("lm_head.weight", 2, Kind.HEAD),
        ("model.layers.61.shared_head.head.weight", 2, Kind.HEAD),
        ("model.layers.61.eh_proj.weight", 2, Kind.OTHER),
        ("model.layers.0.mlp.gate.weight", 2, Kind.ROUTER),
        ("model.layers.0.block_sparse_moe.gate.weight", 2, Kind.ROUTER),
        ("transformer.h.0.mlp.c_fc.weight", 2, Kind.LINEAR),
    ],
)
def test_kinds(name, rank, kind):
    assert kind_of(name, rank) is kind


def test_what_is_fused():
    layer = "model.layers.0"
    assert len({fusion_group(f"{layer}.self_attn.{x}_proj") for x in "qkv"}) == 1
    assert fusion_group(f"{layer}.self_attn.o_proj") != fusion_group(f"{layer}.self_attn.q_proj")
    assert fusion_group(f"{layer}.mlp.gate_proj") == fusion_group(f"{layer}.mlp.up_proj")
    assert fusion_group(f"{layer}.mlp.gate_proj") != fusion_group("model.layers.1.mlp.gate_proj")
    assert fusion_group(f"{layer}.mlp.experts.0.up_proj") == fusion_group(f"{layer}.mlp.experts.5.down_proj")


MEASURE = """
import resource, sys
import numpy, torch
import converters.convert as module

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
module.convert(sys.argv[1], sys.argv[2], to=sys.argv[3], weights=sys.argv[4])
print(peak() - before)
"""


@pytest.mark.parametrize("weights", ["keep", "int8"])
def test_memory_is_bounded_by_tensors_not_by_the_model(tmp_path, weights):
    """At most two shards and one tensor above what the imports take."""
    weight = prune(torch.randn(1024, 2048)).to(torch.bfloat16)
    tensors = {f"model.layers.{i}.mlp.down_proj.weight": weight.clone() for i in range(24)}
    source = write_checkpoint(tmp_path / "src", tensors, shards=6)
    shard, tensor = 4 * weight.nbytes, weight.nbytes
    script = [sys.executable, "-c", MEASURE, str(source), str(tmp_path / "out"), "sparse24", weights]
    done = subprocess.run(script, capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 2 * shard + tensor
