"""Whose layers a config means: names that vLLM translates, fused modules, experts, where the block stands."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.models.utils import WeightsMapper

from tests.serving import checkpoints as ck
from tests.serving.engine import engine, packed_layers
from vllm_sparse.errors import FormatError, UnsupportedError
from vllm_sparse.quantization import methods
from vllm_sparse.quantization.config import Sparse24Config
from vllm_sparse.quantization.matching import unfused_names

# As Qwen2.5-VL's and LLaVA's classes in vLLM have it: the language model moves inside out.
MULTIMODAL = WeightsMapper(
    orig_to_new_prefix={
        "model.language_model.": "language_model.model.",
        "model.visual.": "visual.",
        "lm_head.": "language_model.lm_head.",
    }
)


def config(ignore: list[str], targets: list[str] | None = None) -> Sparse24Config:
    sparsity = {**ck.SPARSE_ONLY, "ignore": ignore, "targets": targets or ["Linear"]}
    made = Sparse24Config.from_config({"quant_method": "compressed-tensors", "sparsity_config": sparsity})
    assert isinstance(made, Sparse24Config)
    made.apply_vllm_mapper(MULTIMODAL)
    return made


def is_sparse(made: Sparse24Config, *names: str) -> bool:
    assert made.table is not None
    return made.table.sparse_scheme(list(names), "ColumnParallelLinear") is not None


@pytest.mark.parametrize(
    "ignore",
    [
        ["model.visual.blocks.0.attn.qkv", "model.language_model.layers.0.mlp.down_proj"],
        [r"re:model\.visual\..*", r"re:model\.language_model\.layers\.0\.mlp\.down_proj"],
        [r"re:visual\..*", r"re:language_model\.model\.layers\.0\.mlp\.down_proj"],
        [r"re:.*visual.*", r"re:.*layers\.0\.mlp\.down_proj$"],
    ],
    ids=["names", "regexes-of-the-checkpoint", "regexes-of-vllm", "open-regexes"],
)
def test_ignore_lists_under_a_multimodal_prefix(ignore: list[str]) -> None:
    made = config(ignore)
    assert not is_sparse(made, "visual.blocks.0.attn.qkv")
    assert not is_sparse(made, "language_model.model.layers.0.mlp.down_proj")
    assert is_sparse(made, "language_model.model.layers.1.mlp.down_proj")


def test_targets_under_a_multimodal_prefix() -> None:
    made = config([], [r"re:model\.language_model\.layers\..*_proj"])
    parts = [f"language_model.model.layers.1.self_attn.{part}_proj" for part in "qkv"]
    assert is_sparse(made, *parts)
    assert not is_sparse(made, "visual.blocks.0.attn.qkv")


def test_fused_modules_that_are_named_with_their_parent() -> None:
    """As Qwen2.5-Omni's vision tower and the speech models have them in vLLM."""
    fused = {"attn.qkv": ["attn.q", "attn.k", "attn.v"], "qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    assert unfused_names("visual.0.attn.qkv", fused) == [f"visual.0.attn.{part}" for part in "qkv"]
    assert unfused_names("layers.0.self_attn.qkv_proj", fused) == [
        f"layers.0.self_attn.{part}_proj" for part in "qkv"
    ]
    assert unfused_names("attn.qkv", fused) == ["attn.q", "attn.k", "attn.v"]
    assert unfused_names("qkv", fused) == ["qkv"]


@pytest.mark.parametrize("ignore", ["layers.1.mlp.down_proj", r"re:layers\.1\..*"])
def test_an_embedding_model_that_is_a_trunk_alone(monkeypatch: pytest.MonkeyPatch, ignore: str) -> None:
    """Its names lack the `model.` that vLLM puts before them."""
    sparsity = {**ck.SPARSE_ONLY, "ignore": [ignore]}
    block = {"quant_method": "compressed-tensors", "sparsity_config": sparsity}
    for pooling in (True, False):
        made = Sparse24Config.from_config(block)
        assert isinstance(made, Sparse24Config)
        monkeypatch.setattr(methods, "is_pooling", lambda pooling=pooling: pooling)
        made.get_quant_method(torch.nn.Identity(), "model.norm")
        assert is_sparse(made, "model.layers.1.mlp.down_proj") == (not pooling)
        assert is_sparse(made, "model.layers.0.mlp.down_proj")


def test_a_list_that_names_some_experts_only_is_an_error() -> None:
    made = config(["model.language_model.layers.0.mlp.experts.3.up_proj"])
    names = [
        f"language_model.model.layers.0.mlp.experts.{expert}.{part}_proj"
        for expert in range(64)
        for part in ("gate", "up", "down")
    ]
    with pytest.raises(FormatError, match=r"lists .*experts\.3\.up_proj but not .* and 185 more"):
        is_sparse(made, *names)


def test_a_left_over_block_that_vllm_does_not_read_is_named() -> None:
    left_over = {"format": "dense", "sparsity_structure": "0:0", "targets": ["Linear"]}
    block = {"quant_method": "compressed-tensors", "sparsity_config": left_over}
    nested = SimpleNamespace(text_config=SimpleNamespace(compression_config=block))
    with pytest.raises(UnsupportedError, match=r"text_config\.compression_config .*rename it to quant"):
        Sparse24Config().maybe_update_config("model", hf_config=nested)


@pytest.mark.e2e
def test_fused_names_on_the_ignore_list_and_the_older_key(tmp_path: Path) -> None:
    """`compression_config` instead of `quantization_config`; q, k and v listed under their own names."""
    attention = tuple(f"model.layers.0.self_attn.{part}_proj" for part in "qkv")
    folder = ck.write_bitmask(ck.pruned_model("llama", False), tmp_path / "s", skip=("lm_head", *attention))
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content["compression_config"] = content.pop("quantization_config")
    path.write_text(json.dumps(content))
    with engine(folder) as llm:
        layers = packed_layers(llm)
    assert len(layers) == 7
    assert "model.layers.0.self_attn.qkv_proj" not in layers


def test_names_of_an_eagle_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """VLLM numbers its layers on from the model's; EAGLE-3 calls its one layer ``midlayer``."""
    monkeypatch.setattr(methods, "layers_of_target", lambda: 32)
    monkeypatch.setattr(methods, "method_for", lambda *_: None)
    ignore = ["fc", "midlayer.mlp.down_proj", "layers.1.mlp.down_proj", r"re:layers\.1\.self_attn\.[kv]_proj"]
    sparsity = {**ck.SPARSE_ONLY, "ignore": ignore}
    block = {"quant_method": "compressed-tensors", "sparsity_config": sparsity}
    for architecture, knows in (
        ("Eagle3LlamaForCausalLM", True),
        ("LlamaForCausalLMEagle3", True),
        ("Eagle2_5_VLForConditionalGeneration", False),
    ):
        made = Sparse24Config.from_config(block)
        assert isinstance(made, Sparse24Config)
        made.maybe_update_config("head", SimpleNamespace(architectures=[architecture], model_type="llama"))
        made.get_quant_method(torch.nn.Linear(1, 1), "model.fc")
        assert made.packed_modules_mapping.get("qkv_proj", []) == (["q_proj", "k_proj", "v_proj"] * knows)
        dense = ("fc", "layers.32.mlp.down_proj", "layers.33.mlp.down_proj", "layers.33.self_attn.k_proj")
        for name in dense:
            assert is_sparse(made, f"model.{name}") is not knows
        for name in ("layers.32.self_attn.k_proj", "layers.34.mlp.down_proj", "layers.1.mlp.up_proj"):
            assert is_sparse(made, f"model.{name}")
