"""What people turn on in vLLM beside a 2:4 model, where the plugin has a part in it (docs/serving.md)."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from converters.convert import convert
from tests.serving import checkpoints as ck
from tests.serving.engine import engine
from tests.serving.test_lora import generate
from vllm_sparse.errors import UnsupportedError
from vllm_sparse.kernels.base import ActivationQuant
from vllm_sparse.quantization import methods
from vllm_sparse.quantization.scheme import SparseScheme, Storage

pytestmark = pytest.mark.e2e


def accepted(llm: Any) -> float:
    """Of the drafted tokens, the share that the target took."""
    counts = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    return counts["vllm:spec_decode_num_accepted_tokens"] / counts["vllm:spec_decode_num_draft_tokens"]


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


def test_a_layer_that_vllm_prepares_is_refused_packed_and_served_from_dense(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=ck.VOCAB, hidden_size=128, n_layer=2, n_head=4)
    dense, packed = tmp_path / "d", tmp_path / "s"
    model = BloomForCausalLM(config)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.weight.mul_(ck.topk_mask(module.weight.abs()))
    model.save_pretrained(dense)
    convert(dense, packed)
    with pytest.raises(UnsupportedError, match=r"query_key_value: .*--quantization sparse24"), engine(packed):
        pass
    with engine(dense) as llm:
        tokens, expected = generate(llm)
    with engine(dense, quantization="sparse24") as llm:
        got = generate(llm)
    assert got[0] == tokens
    assert (got[1] - expected).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("model_type", "layer", "outliers", "refused"),
    [
        ("llama4_text", "self_attn.qkv_proj", False, True),
        ("llama4_text", "self_attn.o_proj", False, False),
        ("whisper", "encoder_attn.kv_proj", False, True),
        ("falcon", "self_attention.query_key_value", True, True),
        ("falcon", "self_attention.query_key_value", False, False),
    ],
)
def test_layers_that_vllm_prepares_while_it_loads_them(
    monkeypatch: pytest.MonkeyPatch, model_type: str, layer: str, outliers: bool, refused: bool
) -> None:
    text_config = SimpleNamespace(model_type=model_type)
    current = SimpleNamespace(model_config=SimpleNamespace(hf_text_config=text_config))
    monkeypatch.setattr(methods, "get_current_vllm_config_or_none", lambda: current)
    scheme = SparseScheme(Storage.BITMASK, None, ActivationQuant.NONE, outliers=outliers)
    if refused:
        with pytest.raises(UnsupportedError, match=f"class for {model_type} prepares this layer"):
            methods._check_prepared(scheme, f"model.layers.0.{layer}")
    else:
        methods._check_prepared(scheme, f"model.layers.0.{layer}")
