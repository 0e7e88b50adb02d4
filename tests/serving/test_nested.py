"""A multimodal model's language part: the block below ``text_config``, the rest dense."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Idefics3Config, Idefics3ForConditionalGeneration

from tests.serving import checkpoints as ck
from tests.serving.engine import MANY_PROMPTS, Scores, engine, packed_layers, prompts, score
from tests.serving.test_formats import assert_parity
from vllm_sparse.sparse24 import topk_mask

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
IMAGE_TOKEN = ck.VOCAB  # No prompt has it.
PARTS = ("vision_model", "connector", "lm_head")


def write_idefics3(folder: Path, holder: str) -> Path:
    """An Idefics3 whose text model's linears are 2:4 and packed, all else dense; ``holder`` has the block."""
    torch.manual_seed(11)
    vision = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Idefics3Config(
        text_config={"model_type": "llama", **ck.SHAPE, "vocab_size": ck.VOCAB + 6, "pad_token_id": 0},
        vision_config={"hidden_size": 64, "image_size": 32, "patch_size": 16, **vision},
        image_token_id=IMAGE_TOKEN,
        scale_factor=1,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    model = Idefics3ForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".text_model.layers." in name and parameter.ndim == 2:
                parameter.mul_(2 * topk_mask(parameter.abs()))
    twin = folder.with_name(f"{folder.name}-twin")
    for place in (twin, folder):
        model.bfloat16().save_pretrained(place)
    path = folder / "model.safetensors"
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(path).items():
        if weight.ndim == 2 and ".text_model.layers." in name:
            tensors |= ck.packed(name.removesuffix(".weight"), weight)
        else:
            tensors[name] = weight
    save_file(tensors, path, metadata={"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    ignore = [f"re:.*{part}.*" for part in PARTS]
    block = {"quant_method": "compressed-tensors", "sparsity_config": {**ck.SPARSE_ONLY, "ignore": ignore}}
    below = content["text_config"] if holder.startswith("text_config.") else content
    below[holder.rpartition(".")[2]] = block
    (folder / "config.json").write_text(json.dumps(content))
    return twin


def score_transformers(folder: Path) -> Scores:
    model = Idefics3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([prompt["prompt_token_ids"] for prompt in prompts(ck.VOCAB, MANY_PROMPTS)])
    with torch.no_grad():
        logits = torch.cat([model(input_ids=part).logits for part in ids.split(8)])
    logprobs = logits.log_softmax(-1)[:, :-1]
    return Scores(logprobs.gather(2, ids[:, 1:, None])[..., 0], logprobs.argmax(-1))


HOLDERS = ["text_config.quantization_config", "text_config.compression_config", "compression_config"]


@pytest.mark.parametrize("holder", HOLDERS)
def test_the_language_model_of_a_multimodal_model_is_served_sparse(tmp_path: Path, holder: str) -> None:
    twin = write_idefics3(tmp_path / "s", holder)
    options: dict[str, Any] = {"language_model_only": True}
    with engine(tmp_path / "s", **options) as llm:
        layers = packed_layers(llm)
        assert len(layers) == 4 * ck.SHAPE["num_hidden_layers"]
        assert all(".text_model.layers." in name for name in layers)
        ours = score(llm, ck.VOCAB, MANY_PROMPTS)
    assert_parity(ours, score_transformers(twin), holder)
