"""Layers that vLLM's model classes prepare while they load them: rows in another order, a bias left out."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from converters.convert import convert
from tests.serving import checkpoints as ck
from tests.serving.engine import engine, packed_layers, score, serve_and_score
from tests.serving.test_serving import assert_twins
from vllm_sparse.errors import UnsupportedError
from vllm_sparse.kernels.base import ActivationQuant, WeightFormat
from vllm_sparse.quantization import prepared
from vllm_sparse.quantization.scheme import LowRank, ScaleLayout, SparseScheme, Storage, WeightQuant
from vllm_sparse.quantization.spec import Projection, StaticQuant

pytestmark = pytest.mark.e2e

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": ck.VOCAB, "hidden_size": 128, "n_layer": 2, "n_head": 4},
    ),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            **ck.SHAPE,
            "intermediate_size_mlp": 192,
            "interleave_moe_layer_step": 3,
            "no_rope_layers": [1, 0],
            "num_local_experts": 2,
            "pad_token_id": 0,
        },
    ),
}


def write_pruned(family: str, folder: Path) -> Path:
    """A dense checkpoint whose linears are 2:4, with biases that are not zero."""
    class_name, config_class, config = MODELS[family]
    torch.manual_seed(3)
    model = getattr(transformers, class_name)(getattr(transformers, config_class)(**config))
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.weight.mul_(3 * ck.topk_mask(module.weight.abs()))
                if module.bias is not None:
                    module.bias.add_(0.1 * torch.randn_like(module.bias))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("family", "weights"),
    [
        ("bloom", "int4"),
        ("llama4", "int4"),
        pytest.param("bloom", "keep", marks=pytest.mark.slow),
        pytest.param("llama4", "keep", marks=pytest.mark.slow),
    ],
)
def test_rows_that_the_model_reorders(tmp_path: Path, family: str, weights: str) -> None:
    """Values, bitmask and scales (with int4, one per group) all follow."""
    dense = write_pruned(family, tmp_path / "d")
    convert(dense, tmp_path / "s", weights=weights)
    if weights != "keep":
        dense = tmp_path / "t"
        convert(tmp_path / "s", dense, to="dense")
    with engine(tmp_path / "s") as llm:
        assert len(packed_layers(llm)) == 8
        ours = score(llm, ck.VOCAB)
    assert_twins(ours, serve_and_score(dense, ck.VOCAB))


def test_rows_of_the_picture_encoder_stay_where_they_are() -> None:
    assert prepared.row_order("vision_model.model.layers.0.self_attn.qkv_proj", "llama4") is None
    assert prepared.row_order("language_model.model.layers.0.self_attn.qkv_proj", "llama4") is not None


@pytest.mark.parametrize(
    ("config", "family"),
    [
        (transformers.BloomConfig(), "bloom"),
        (transformers.Llama4Config(), "llama4"),
        (transformers.Llama4TextConfig(), "llama4"),
        (transformers.LlamaConfig(architectures=["EagleLlama4ForCausalLM"]), "llama4"),
        (transformers.LlamaConfig(architectures=["LlamaForCausalLM"]), None),
        (None, None),
    ],
)
def test_families_are_known_by_their_config(config: Any, family: str | None) -> None:
    assert prepared.family_of(config) == family


INT8 = WeightQuant(WeightFormat.INT8, ScaleLayout.CHANNEL)
PER_TENSOR = WeightQuant(WeightFormat.INT8, ScaleLayout.TENSOR)
BRANCH = {"low_rank": LowRank(Projection.POOLED, 16)}


@pytest.mark.parametrize(
    ("family", "layer", "quant", "beside", "refused"),
    [
        ("bloom", "query_key_value", INT8, {}, None),
        ("bloom", "query_key_value", PER_TENSOR, {}, "scales per tensor"),
        ("bloom", "query_key_value", INT8, {"static_quant": StaticQuant.INT8}, "scales per tensor"),
        ("bloom", "query_key_value", None, BRANCH, "a low-rank branch"),
        ("bloom", "dense", PER_TENSOR, {}, None),
        ("llama4", "qkv_proj", PER_TENSOR, {"static_quant": StaticQuant.INT8}, None),
        ("llama4", "qkv_proj", None, BRANCH, "a low-rank branch"),
        ("llama4", "qkv_proj", None, {"outliers": True}, "outliers"),
        ("llama4", "o_proj", None, {"outliers": True}, None),
        ("falcon", "query_key_value", None, {"outliers": True}, "outliers"),
        ("falcon", "query_key_value", None, BRANCH, None),
        (None, "qkv_proj", None, {"outliers": True}, None),
    ],
)
def test_what_cannot_follow_is_refused(
    family: str | None, layer: str, quant: WeightQuant | None, beside: dict[str, Any], refused: str | None
) -> None:
    scheme = SparseScheme(Storage.BITMASK, quant, ActivationQuant.NONE, **beside)
    prefix = f"model.layers.0.{layer}"
    if refused is None:
        prepared.check(scheme, prefix, family)
        return
    with pytest.raises(UnsupportedError, match=rf"{prefix}: .* which {refused}.*--quantization sparse24"):
        prepared.check(scheme, prefix, family)


def test_a_bias_that_the_file_has_for_some_parts_only(tmp_path: Path) -> None:
    """As Whisper's, whose keys have none; vLLM leaves in it what lies in memory."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.linear import QKVParallelLinear

    folder = ck.write_bitmask(ck.pruned_model("llama", False), tmp_path / "s")
    with engine(folder) as llm, set_current_vllm_config(llm.llm_engine.vllm_config):
        config = llm.llm_engine.vllm_config.quant_config
        layer = QKVParallelLinear(64, 16, 4, quant_config=config, prefix="model.layers.0.self_attn.qkv_proj")
        assert layer.bias is not None
        for _ in range(2):
            layer.bias.data.fill_(torch.nan)
            for part in ("q", "v"):
                layer.bias.weight_loader(layer.bias, torch.ones(64), part)
            q, k, v = layer.bias.split(64)
            assert torch.equal(q, torch.ones(64))
            assert torch.equal(k, torch.zeros(64))
            assert torch.equal(v, torch.ones(64))
            # As a reload of weights does it.
            again = torch.nn.Parameter(layer.bias.data.clone(), requires_grad=False)
            vars(again).update(vars(layer.bias))
            layer.bias = again
