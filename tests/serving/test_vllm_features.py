"""What people turn on in vLLM beside a 2:4 model, where the plugin has a part in it (docs/serving.md)."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from safetensors.torch import load_file, save_file
from vllm.config import LoadConfig

from converters.convert import convert
from tests.serving import checkpoints as ck
from tests.serving.engine import engine
from tests.serving.test_families import write_pruned as write_family
from tests.serving.test_lora import generate
from vllm_sparse.errors import UnsupportedError
from vllm_sparse.quantization import methods

pytestmark = pytest.mark.e2e
drafts = pytest.mark.skipif(
    vllm.__version__.startswith("0.30."), reason="no model drafts on a CPU in vLLM 0.30, dense ones neither"
)


def accepted(llm: Any) -> float:
    """Of the drafted tokens, the share that the target took."""
    counts = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    return counts["vllm:spec_decode_num_accepted_tokens"] / counts["vllm:spec_decode_num_draft_tokens"]


@drafts
def test_a_sparse_model_drafts_for_another(tmp_path: Path) -> None:
    """vLLM puts a prefix before the draft's names, under which no ignore list knows them."""
    model = ck.pruned_model("llama", False)
    skip = ("lm_head", "model.layers.1.mlp.down_proj")
    target = ck.write_bitmask(model, tmp_path / "target")
    draft = ck.write_bitmask(model, tmp_path / "draft", skip=skip)
    speculative = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 3}
    with engine(target) as llm:
        alone, _ = generate(llm)
    with engine(target, speculative_config=speculative, disable_log_stats=False) as llm:
        drafted, _ = generate(llm)
        assert accepted(llm) > 0.9
    assert drafted == alone


def test_sharded_state_is_refused(tmp_path: Path) -> None:
    folder = ck.write_bitmask(ck.pruned_model("llama", False), tmp_path / "s")
    with (
        pytest.raises(UnsupportedError, match="sharded_state stores weights as the kernels have them"),
        engine(folder, load_format="sharded_state"),
    ):
        pass


@pytest.mark.parametrize("load_format", ["sharded_state", "runai_streamer_sharded", "tensorizer"])
def test_load_formats_without_a_checkpoint_are_refused(
    monkeypatch: pytest.MonkeyPatch, load_format: str
) -> None:
    """Two of them need packages that are not installed here."""
    current = SimpleNamespace(load_config=LoadConfig(load_format=load_format))
    monkeypatch.setattr(methods, "get_current_vllm_config_or_none", lambda: current)
    with pytest.raises(UnsupportedError, match=f"--load-format {load_format} .* without --load-format"):
        methods._check_load_format()


def add_drafting_layer(folder: Path) -> Path:
    """DeepSeek-V3's layer for further tokens: the last one again, between a joining matrix and a head."""
    file, last, new = folder / "model.safetensors", "model.layers.1.", "model.layers.2."
    tensors = load_file(file)
    again = {new + name.removeprefix(last): x.clone() for name, x in tensors.items() if name.startswith(last)}
    norm, head = tensors["model.norm.weight"], tensors["lm_head.weight"]
    width = norm.numel()
    torch.manual_seed(5)
    joining = torch.cat([torch.zeros(width, width), torch.eye(width)], 1) + 0.01 * torch.randn(
        width, 2 * width
    )
    again |= {
        f"{new}enorm.weight": torch.ones_like(norm),
        f"{new}hnorm.weight": torch.ones_like(norm),
        f"{new}eh_proj.weight": (joining * ck.topk_mask(joining.abs())).to(norm.dtype),
        f"{new}embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(),
        f"{new}shared_head.norm.weight": norm.clone(),
        f"{new}shared_head.head.weight": (head * ck.topk_mask(head.float().abs())),
    }
    save_file(tensors | again, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    return folder


@drafts
def test_layers_that_draft_further_tokens(tmp_path: Path) -> None:
    """MTP; their head and the matrix before them stay dense, also where their values are 2:4."""
    dense = add_drafting_layer(write_family("deepseek-v3", tmp_path / "d"))
    convert(dense, tmp_path / "s")
    speculative = {"method": "mtp", "num_speculative_tokens": 1}
    drafted = []
    for folder in (dense, tmp_path / "s"):
        with engine(folder, speculative_config=speculative, disable_log_stats=False) as llm:
            drafted.append((*generate(llm), accepted(llm)))
            runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
            packed = [
                name for name, m in runner.drafter.model.named_modules() if hasattr(m, "sparse_backend")
            ]
    (tokens, expected, share), (got_tokens, got, got_share) = drafted
    assert len(packed) == 6
    assert got_tokens == tokens
    assert (got - expected).abs().max() <= 1e-4
    assert got_share == share > 0


def write_eagle_head(folder: Path, ignore: list[str]) -> Path:
    """One 2:4 layer that drafts from the model's hidden states; ``ignore`` names what is not 2:4 in it."""
    model = ck.pruned_model("llama", False, seed=1)
    inner, width = model.model, model.config.hidden_size
    tensors = {"fc.weight": torch.randn(width, 2 * width).bfloat16() / width**0.5}
    tensors["embed_tokens.weight"] = inner.embed_tokens.weight.data
    layer = inner.layers[0].state_dict()
    del layer["input_layernorm.weight"]
    for name, weight in layer.items():
        module = f"layers.0.{name.removesuffix('.weight')}"
        if weight.ndim == 1 or module in ignore:
            tensors[f"layers.0.{name}"] = torch.randn_like(weight) / 8 if module in ignore else weight
        else:
            tensors |= ck.packed(module, weight)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    ck.set_quantization(folder, {"sparsity_config": {**ck.SPARSE_ONLY, "ignore": ignore}})
    return folder


@drafts
def test_a_sparse_eagle_head_with_dense_layers_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """VLLM numbers its layers on from the model's, and tells nobody what is fused in them."""
    monkeypatch.setenv("VLLM_SPARSE_STRICT", "1")
    target = ck.write_bitmask(ck.pruned_model("llama", False), tmp_path / "target")
    ignore = ["fc", "layers.0.self_attn.k_proj", "layers.0.mlp.down_proj"]
    head = write_eagle_head(tmp_path / "head", ignore)
    speculative = {"method": "eagle", "model": str(head), "num_speculative_tokens": 2}
    with engine(target) as llm:
        alone, _ = generate(llm)
    with engine(target, speculative_config=speculative) as llm:
        drafted, _ = generate(llm)
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        modules = runner.drafter.model.named_modules()
        packed = {name.rpartition(".")[2] for name, m in modules if hasattr(m, "sparse_backend")}
    assert packed == {"qkv_proj", "o_proj", "gate_up_proj"}
    assert drafted == alone
