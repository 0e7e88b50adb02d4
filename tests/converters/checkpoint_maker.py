"""Small checkpoints on disk, written with the safetensors library."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCAB, LAYERS = 64, 96, 4, 2, 16, 128, 2

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}


def prune(weight: Tensor) -> Tensor:
    """Magnitude 2:4, independent of the package's own masks."""
    groups = weight.reshape(-1, 4)
    drop = groups.float().abs().argsort(dim=-1)[:, :2]
    return groups.scatter(1, drop, torch.zeros((), dtype=weight.dtype).expand(drop.shape)).reshape(
        weight.shape
    )


def llama_tensors(
    dtype: torch.dtype = torch.bfloat16, seed: int = 0, pruned: bool = True
) -> dict[str, Tensor]:
    """A two-layer Llama; its linears are 2:4 when ``pruned``."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, cols: int) -> Tensor:
        return (torch.randn(rows, cols, generator=generator) * 0.05).to(dtype)

    tensors = {"model.embed_tokens.weight": matrix(VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        shapes = {
            "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
            "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
            "mlp.gate_proj": (FFN, HIDDEN),
            "mlp.up_proj": (FFN, HIDDEN),
            "mlp.down_proj": (HIDDEN, FFN),
        }
        for name, shape in shapes.items():
            weight = matrix(*shape)
            tensors[f"{prefix}.{name}.weight"] = prune(weight) if pruned else weight
        tensors[f"{prefix}.input_layernorm.weight"] = torch.ones(HIDDEN, dtype=dtype)
        tensors[f"{prefix}.post_attention_layernorm.weight"] = torch.ones(HIDDEN, dtype=dtype)
    tensors["model.norm.weight"] = torch.ones(HIDDEN, dtype=dtype)
    tensors["lm_head.weight"] = matrix(VOCAB, HIDDEN)
    return tensors


def write_checkpoint(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping | None = None, shards: int = 1
) -> Path:
    """A checkpoint folder with tokenizer side files; several shards get an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(CONFIG if config is None else config)))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "generation_config.json").write_text('{"do_sample": false}')
    names = list(tensors)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for shard in range(shards):
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    return folder
