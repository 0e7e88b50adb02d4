"""The checking loader against plain torch in float64, on every family's layers that differ."""

import sys
from pathlib import Path

import pytest
import torch
from checkpoint_maker import write_checkpoint

from converters.hf import load_for_evaluation
from converters.verify import verify
from vllm_sparse.errors import UnsupportedError

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
import structured_checkpoints as models
from structured_reference import logprobs

IDS = torch.randint(3, models.VOCAB, (20,), generator=torch.Generator().manual_seed(2)).tolist()


@pytest.mark.parametrize("family", models.FAMILIES)
def test_layers_are_built_from_their_own_values(family, tmp_path):
    layers = {key: dict(entry) for key, entry in models.layers_for(family).items()}
    extra = {}
    if family not in ("opt", "gpt2"):
        layers["2"]["o_proj_bias"] = True
        extra = {"o_proj_bias": False}
    config = models.make_config(family, 6, layers, **extra)
    tensors = models.make_tensors(config)
    folder = write_checkpoint(tmp_path / family, tensors, config)
    model = load_for_evaluation(folder)
    with torch.no_grad():
        found = model(input_ids=torch.tensor([IDS]), use_cache=False).logits[0].log_softmax(-1)
    torch.testing.assert_close(found.double(), logprobs(tensors, config, IDS), rtol=0, atol=1e-4)


def test_verify_compares_structured_experts(tmp_path):
    config = models.make_config("deepseek", 3, models.even_layers_for("deepseek"))
    tensors = models.make_tensors(config)
    same = write_checkpoint(tmp_path / "a", tensors, config)
    other = dict(tensors)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    other[name] = tensors[name] + 0.01
    changed = write_checkpoint(tmp_path / "b", other, config)
    assert verify(same, same).ok
    assert not verify(same, changed).ok


def test_a_router_that_transformers_lacks_is_refused(tmp_path):
    config = models.make_config("deepseek", 3, None, norm_topk_prob=True)
    folder = write_checkpoint(tmp_path / "a", models.make_tensors(config), config)
    with pytest.raises(UnsupportedError, match="norm_topk_prob is true"):
        load_for_evaluation(folder)
