"""A Qwen3-0.6B-shaped model with random 2:4 weights, for speed only.

The demo's own model is so small that its serving time is overhead. Speed does not depend on the values of
the weights, quality does not depend on speed: this model answers nothing, and the report says so.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vllm_sparse.sparse24 import decompress

NAME = "Qwen3-0.6B shape, random weights"
SEED = 0
_STD = 0.02
# The six 2-of-4 masks as nibbles, lowest bit = first column.
_NIBBLES = (0b0011, 0b0101, 0b1001, 0b0110, 0b1010, 0b1100)

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "attention_bias": False,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
    "use_cache": True,
    "torch_dtype": "bfloat16",
}


def random_24(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    """Normal bf16 weights ``[rows, cols]``, exactly 2 of every 4 non-zero at random places."""
    values = torch.empty(rows, cols // 2, dtype=torch.bfloat16).normal_(0, _STD, generator=generator)
    patterns = torch.randint(0, len(_NIBBLES), (rows, cols // 4), generator=generator, dtype=torch.uint8)
    nibbles = torch.tensor(_NIBBLES, dtype=torch.uint8)[patterns.long()]
    return decompress(values, nibbles[:, ::2] | (nibbles[:, 1::2] << 4))


def _layer(index: int, generator: torch.Generator) -> dict[str, Tensor]:
    hidden, ffn, dim = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["head_dim"]
    queries, keys = CONFIG["num_attention_heads"] * dim, CONFIG["num_key_value_heads"] * dim
    shapes = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    norms |= {"self_attn.q_norm": dim, "self_attn.k_norm": dim}
    prefix = f"model.layers.{index}"
    tensors = {f"{prefix}.{name}.weight": random_24(*shape, generator) for name, shape in shapes.items()}
    ones = {f"{prefix}.{name}.weight": torch.ones(size).bfloat16() for name, size in norms.items()}
    return tensors | ones


def write_dense(folder: Path, tokenizer_from: Path) -> Path:
    """Write the model once; an existing complete one is kept.

    Args:
        folder: destination, made under a temporary name first.
        tokenizer_from: a directory whose tokenizer is extended to this vocabulary.
    """
    if (folder / "config.json").is_file():
        return folder
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    generator = torch.Generator().manual_seed(SEED)
    hidden = CONFIG["hidden_size"]
    embedding = torch.empty(CONFIG["vocab_size"], hidden, dtype=torch.bfloat16)
    tensors = {
        "model.embed_tokens.weight": embedding.normal_(0, _STD, generator=generator),
        "model.norm.weight": torch.ones(hidden).bfloat16(),
    }
    for index in range(CONFIG["num_hidden_layers"]):
        tensors |= _layer(index, generator)
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    _extend_tokenizer(tokenizer_from, partial)
    (partial / "config.json").write_text(json.dumps(CONFIG, indent=2))
    partial.replace(folder)
    return folder


def _extend_tokenizer(source: Path, destination: Path) -> None:
    """The small tokenizer with filler entries, so that every id the model can emit has a text."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, destination / name)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    taken = set(vocabulary.values()) | {token["id"] for token in tokenizer.get("added_tokens", [])}
    vocabulary |= {f"<filler{i}>": i for i in range(CONFIG["vocab_size"]) if i not in taken}
    (destination / "tokenizer.json").write_text(json.dumps(tokenizer))
