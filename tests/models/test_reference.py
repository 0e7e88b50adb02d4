"""The reference itself against Transformers, on models whose layers are all equal.

Transformers builds every layer from the global config, so this is as far as it can vouch; the
reference's per-layer look-ups are the only part beyond it. Transformers' norms, rotations and softmax run in
float32 whatever the model's dtype, hence the tolerance.
"""

from pathlib import Path

import pytest
import structured_checkpoints as checkpoints
import structured_reference as reference
import torch
from transformers import AutoModelForCausalLM

from vllm_sparse.models.families import FAMILIES

#: Transformers leaves DeepSeek V1 to the checkpoint's own code; its attention is Llama's, its experts V2's.
KNOWN = [family for family in checkpoints.FAMILIES if family != "deepseek"]


@pytest.mark.parametrize("family", KNOWN)
def test_reference_equals_transformers(family: str, tmp_path: Path) -> None:
    extra = {"sliding_window": 8} if family == "mistral" else {}
    config = checkpoints.make_config(family, 2, **extra)
    config["architectures"] = [FAMILIES[family].stock_architecture]
    tensors = checkpoints.make_tensors(config)
    if family not in ("opt", "gpt2", *checkpoints.LATENT):
        config["num_key_value_heads"] = 2
        tensors = checkpoints.make_tensors(config)
    checkpoints.save_checkpoint(tmp_path, config, tensors)
    # Transformers' grouped expert product has no float64.
    dtype = torch.float32 if family in ("qwen3_moe", "mixtral", *checkpoints.LATENT) else torch.float64
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = torch.randint(3, checkpoints.VOCAB, (20,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    torch.testing.assert_close(reference.logprobs(tensors, config, ids), expected.double(), rtol=0, atol=3e-5)


def test_registered_names_are_the_ones_under_test() -> None:
    assert {name: family.architecture for name, family in FAMILIES.items()} == checkpoints.ARCHITECTURES
