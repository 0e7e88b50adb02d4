import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from converters.train.evaluate import perplexity, unigram_perplexity, windows
from converters.train.loading import load_model
from converters.train.saving import save_like
from vllm_sparse.errors import FormatError, NumericsError
from vllm_sparse.sparse24 import compress, topk_mask


def pack_directory(source: Path, target: Path) -> dict[str, torch.Tensor]:
    """A canonical 2:4 checkpoint of a model pruned by magnitude; returns the dense pruned weights."""
    shutil.copytree(source, target)
    state = load_file(source / "model.safetensors")
    packed, dense = {}, {}
    for name, weight in state.items():
        if not name.endswith("_proj.weight"):
            packed[name] = dense[name] = weight
            continue
        dense[name] = weight * topk_mask(weight.abs())
        stem = name.removesuffix(".weight")
        packed[f"{stem}.compressed"], packed[f"{stem}.bitmask"] = compress(dense[name])
        packed[f"{stem}.shape"] = torch.tensor(weight.shape).reshape(2, 1)
    save_file(packed, target / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "sparsity_config": {
            "format": "sparse-24-bitmask",
            "sparsity_structure": "2:4",
            "targets": ["Linear"],
        },
    }
    (target / "config.json").write_text(json.dumps(config))
    return dense


def stream(tokens: int = 500) -> torch.Tensor:
    return torch.randint(0, 300, (tokens,), generator=torch.Generator().manual_seed(3))


def test_perplexity_equals_token_by_token_evaluation(model_dir: Path):
    model = load_model(model_dir).model
    tokens = stream(150)
    result = perplexity(model, tokens, context_length=64, batch_tokens=128)
    assert result.tokens == 63 + 63 + 21
    total = 0.0
    with torch.no_grad():
        for start in range(0, 150, 64):
            piece = tokens[start : start + 64]
            for position in range(1, len(piece)):
                logits = model(input_ids=piece[None, :position]).logits[0, -1]
                total -= float(F.log_softmax(logits.double(), -1)[piece[position]])
    assert result.nll == pytest.approx(total / result.tokens, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.nll))
    assert result.to_json()["schema"] == "vllm-sparse/eval/1"


def test_unigram_perplexity_of_a_known_distribution():
    train = torch.tensor([0] * 7 + [1] * 3)  # with one added: 8/13 and 4/13, and 1/13 for token 2
    expected = math.exp(-(math.log(4 / 13) + math.log(1 / 13)) / 2)
    assert unigram_perplexity(train, torch.tensor([0, 1, 2]), 8, 3) == pytest.approx(expected)


def test_windows_cover_every_token_once():
    pieces = windows(torch.arange(21), 10)
    assert [len(p) for p in pieces] == [10, 10]  # the single last token predicts nothing
    with pytest.raises(FormatError, match="at least 2"):
        windows(torch.arange(1), 10)


def test_damaged_weights_are_reported(model_dir: Path):
    model = load_model(model_dir).model
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(NumericsError, match="NaN"):
        perplexity(model, stream(), 64)


def test_a_loss_beyond_any_perplexity_is_reported(model_dir: Path):
    model = load_model(model_dir).model
    model.model.norm.weight.data.mul_(1e5)
    with pytest.raises(NumericsError, match=r"nats a token, beyond any perplexity"):
        perplexity(model, stream(), 64)


def test_both_names_of_the_dtype_state_what_was_saved(model_dir: Path, tmp_path: Path):
    config = json.loads((model_dir / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    assert config["torch_dtype"] == "float32"
    save_like(load_model(model_dir).model, tmp_path, model_dir, config, torch.bfloat16)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["torch_dtype"] == saved["dtype"] == "bfloat16"


def test_packed_24_answers_as_its_dense_twin(model_dir: Path, tmp_path: Path):
    dense = pack_directory(model_dir, tmp_path / "packed")
    twin = load_model(model_dir).model
    twin.load_state_dict(dense, strict=False)
    packed = load_model(tmp_path / "packed")
    assert "quantization_config" not in packed.config
    ids = stream(64)[None]
    with torch.no_grad():
        assert torch.equal(packed.model(ids).logits, twin(ids).logits)


def test_damaged_directories_are_explained(model_dir: Path, tmp_path: Path):
    with pytest.raises(FormatError, match=r"no config\.json"):
        load_model(tmp_path)
    with pytest.raises(FormatError, match="no such folder"):
        load_model(tmp_path / "absent")

    broken = tmp_path / "broken"
    shutil.copytree(model_dir, broken)
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(FormatError, match="file is truncated"):
        load_model(broken)

    state = load_file(model_dir / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, broken / "model.safetensors")
    with pytest.raises(FormatError, match=r"lacks weights .*: model\.norm\.weight"):
        load_model(broken)
