"""``vllm-sparse eval`` rounds activations where serving rounds them."""

import json
import logging
from pathlib import Path

import pytest
import torch

from converters.activations import round_activations
from converters.checkpoint import open_checkpoint
from converters.convert import convert
from converters.hf import load_for_evaluation
from tests.serving.foreign import write_pruned
from vllm_sparse.kernels.base import ActivationQuant

TOKENS = torch.randint(0, 250, (4, 24), generator=torch.Generator().manual_seed(1))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


def rounded(x: torch.Tensor, largest: float) -> torch.Tensor:
    scale = x.abs().amax(-1, keepdim=True) / largest
    steps = (x / scale).round() if largest == 127 else (x / scale).to(torch.float8_e4m3fn).float()
    return steps * scale


@pytest.mark.parametrize(
    ("weights", "expected", "largest"),
    [
        ("int8", ActivationQuant.INT8_PER_TOKEN, 127.0),
        ("fp8", ActivationQuant.FP8_PER_TOKEN, 448.0),
        ("w4a8", ActivationQuant.INT8_PER_TOKEN, 127.0),
        ("int4", ActivationQuant.NONE, None),
    ],
)
def test_linears_see_what_served_ones_see(tmp_path: Path, weights, expected, largest):
    write_pruned("llama-wide", tmp_path / "d", torch.float32)
    convert(tmp_path / "d", tmp_path / "s", weights=weights)
    ours = load_for_evaluation(tmp_path / "s")
    before = logits(ours)
    assert round_activations(ours, open_checkpoint(tmp_path / "s")) is expected
    twin = load_for_evaluation(tmp_path / "s")
    if largest is None:
        assert torch.equal(logits(ours), before)
        return
    for name, module in twin.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(lambda _, args: (rounded(args[0], largest),))
    assert torch.allclose(logits(ours), logits(twin), rtol=0, atol=1e-5)
    assert not torch.allclose(logits(ours), before, rtol=0, atol=1e-5)


def test_what_is_not_imitated_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    write_pruned("qwen3-moe", tmp_path / "d", torch.float32)
    convert(tmp_path / "d", tmp_path / "s", weights="int8")
    model = load_for_evaluation(tmp_path / "s")
    with caplog.at_level(logging.WARNING):
        assert round_activations(model, open_checkpoint(tmp_path / "s")) is ActivationQuant.INT8_PER_TOKEN
    assert "round their activations when served, but not in this evaluation" in caplog.text
    assert "experts.0" in caplog.text


def test_fixed_scales_are_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    write_pruned("llama-wide", tmp_path / "d", torch.float32)
    convert(tmp_path / "d", tmp_path / "s", weights="int8")
    model = load_for_evaluation(tmp_path / "s")
    config = json.loads((tmp_path / "s" / "config.json").read_text())
    (group,) = config["quantization_config"]["config_groups"].values()
    group["input_activations"] |= {"dynamic": False, "strategy": "tensor"}
    (tmp_path / "s" / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING):
        assert round_activations(model, open_checkpoint(tmp_path / "s")) is ActivationQuant.NONE
    assert "not in this evaluation" in caplog.text
