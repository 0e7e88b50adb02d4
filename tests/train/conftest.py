"""Small corpora, tokenizers and models shared by the training tests."""

import os
from pathlib import Path

import pytest
import torch

from converters.train.corpus import load_corpus
from converters.train.evaluate import perplexity
from converters.train.loading import load_model
from converters.train.models import ModelShape, build_model
from converters.train.packing import encode_documents
from converters.train.recipes import DataRecipe, OptimiserRecipe, RunRecipe, TrainRecipe
from converters.train.saving import save_model
from converters.train.tokenizer import train_tokenizer
from converters.train.trainer import train_model

os.environ.setdefault("HF_HUB_OFFLINE", "1")

SENTENCES = (
    "The quick brown fox jumps over the lazy dog near the river bank.\n"
    "def add(left, right):\n    return left + right\n"
    "Sparse matrices store only the values that are not zero.\n"
    "for index in range(10):\n    total += values[index]\n"
)


def text_of(words: int, seed: int = 0) -> str:
    """Reproducible text with some structure."""
    generator = torch.Generator().manual_seed(seed)
    lines = SENTENCES.splitlines()
    picks = torch.randint(0, len(lines), (words // 8,), generator=generator).tolist()
    return "\n".join(f"{lines[p]} {i % 97}" for i, p in enumerate(picks)) + "\n"


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text(text_of(40_000), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer(text_file: Path):
    return train_tokenizer([text_file.read_text(encoding="utf-8")], 300, 256)


TINY = {
    "llama": ModelShape(
        hidden_size=64, intermediate_size=128, num_layers=2, num_heads=2, num_kv_heads=1, max_positions=256
    ),
    "qwen3": ModelShape(
        family="qwen3", hidden_size=64, intermediate_size=128, num_layers=2, num_heads=2, num_kv_heads=1,
        max_positions=256,
    ),
}  # fmt: skip


@pytest.fixture(scope="session", params=sorted(TINY))
def model_dir(request: pytest.FixtureRequest, tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 model with weights large enough for its answers to differ from uniform."""
    directory = tmp_path_factory.mktemp(request.param) / "model"
    model = build_model(TINY[request.param], len(tokenizer), tokenizer.eos_token_id, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    save_model(model, directory, torch.float32, tokenizer)
    return directory


@pytest.fixture(scope="session")
def trained_dir(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama that has learned the session's text, so that pruning it hurts."""
    recipe = TrainRecipe(
        model=TINY["llama"],
        vocab_size=300,
        data=DataRecipe(source=str(text_file), sequence_length=32),
        optimiser=OptimiserRecipe(steps=150, batch_size=16, lr=1e-2, warmup=10),
        run=RunRecipe(device="cpu"),
        eval_tokens=2000,
    )
    out = tmp_path_factory.mktemp("learned") / "model"
    train_model(recipe, out, quiet=True)
    return out


def heldout_perplexity(directory: Path, text_file: Path, context_length: int, tokens: int) -> float:
    """Perplexity of a saved model on the text that ``compress_model`` holds out."""
    loaded = load_model(directory)
    stream = encode_documents(load_corpus(str(text_file), 0.05).heldout, loaded.tokenizer, tokens)
    return perplexity(loaded.model, stream, context_length).perplexity


@pytest.fixture(scope="session")
def gqa_dir(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2, whose q, k and v have biases: 8 query heads on 4 KV heads, untrained but far from uniform."""
    import transformers

    config = transformers.Qwen2Config(
        vocab_size=300, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, head_dim=32, max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(1))
            elif parameter.ndim == 2:
                parameter.mul_(4.0)
    directory = tmp_path_factory.mktemp("gqa") / "m"
    save_model(model, directory, torch.float32, tokenizer)
    return directory


EXPERTS, WIDTH, TOP_K = 6, 32, 2


def make_moe(directory: Path, tokenizer) -> Path:
    """A Qwen3-MoE of three layers, the middle one dense, untrained but far from uniform."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, moe_intermediate_size=WIDTH,
        num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=32, num_experts=EXPERTS,
        num_experts_per_tok=TOP_K, norm_topk_prob=True, mlp_only_layers=[1], max_position_embeddings=64,
        eos_token_id=0, pad_token_id=0, bos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3MoeForCausalLM(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.ndim >= 2 else 1.0)
    save_model(model, directory, torch.float32, tokenizer)
    return directory
