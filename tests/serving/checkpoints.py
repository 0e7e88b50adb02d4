"""Tiny random checkpoints, dense and 2:4, made without the converters so that both sides are tested apart."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from vllm_sparse.sparse24 import compress, topk_mask

VOCAB = 250
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
FAMILIES = {
    "llama": lambda tied: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=tied)),
    "llama-bias": lambda tied: LlamaForCausalLM(
        LlamaConfig(**SHAPE, tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
    ),
    "one-kv-head": lambda tied: LlamaForCausalLM(
        LlamaConfig(**{**SHAPE, "num_key_value_heads": 1}, tie_word_embeddings=tied)
    ),
    "llama-256": lambda tied: LlamaForCausalLM(
        LlamaConfig(**{**SHAPE, "intermediate_size": 256}, tie_word_embeddings=tied)
    ),
    "qwen3": lambda tied: Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=tied)),
}
SPARSE_ONLY = {"format": "sparse-24-bitmask", "sparsity_structure": "2:4", "targets": ["Linear"]}


def linear_names(model: PreTrainedModel, head: bool = False) -> list[str]:
    """Module names of the linears in the decoder layers, and of the head if asked."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ("layers" in name or head)
    ]


def pruned_model(family: str, tied: bool = True, seed: int = 0, head: bool = False) -> PreTrainedModel:
    """A bf16 model whose decoder linears (and head) are 2:4, with non-trivial biases and norms."""
    torch.manual_seed(seed)
    model = FAMILIES[family](tied)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for name in linear_names(model, head):
            weight = model.get_submodule(name).weight
            weight.mul_(topk_mask(weight.abs()))
    return model.bfloat16()


def tensors_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict as it is saved: tied heads left out."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight")
    return tensors


def write_dense(model: PreTrainedModel, folder: Path, quantization: dict[str, Any] | None = None) -> Path:
    """Plain checkpoint, optionally with a quantization_config."""
    model.save_pretrained(folder)
    if quantization is not None:
        set_quantization(folder, quantization)
    return folder


def set_quantization(folder: Path, quantization: dict[str, Any]) -> None:
    """Put a quantization_config into an existing config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", **quantization}
    path.write_text(json.dumps(config))


def packed(name: str, weight: Tensor) -> dict[str, Tensor]:
    """The three on-disk tensors of one linear."""
    values, bitmask = compress(weight)
    return {
        f"{name}.compressed": values,
        f"{name}.bitmask": bitmask,
        f"{name}.shape": torch.tensor(weight.shape).reshape(2, 1),
    }


def write_bitmask(model: PreTrainedModel, folder: Path, skip: tuple[str, ...] = ("lm_head",)) -> Path:
    """sparse-24-bitmask checkpoint; ``skip`` names linears that stay dense and go on the ignore list."""
    tensors = tensors_of(model)
    for name in linear_names(model, head=True):
        if name not in skip:
            tensors.update(packed(name, tensors.pop(f"{name}.weight")))
    return _write(model, tensors, folder, {"sparsity_config": {**SPARSE_ONLY, "ignore": list(skip)}})


def quantize(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Symmetric per-channel int8 or fp8 values and their float32 scale ``[n, 1]``."""
    limit = 127.0 if kind == "int" else 448.0
    scale = weight.float().abs().amax(1, keepdim=True).clamp_min(1e-8) / limit
    scaled = weight.float() / scale
    if kind == "int":
        return scaled.round().clamp(-127, 127).to(torch.int8), scale
    return scaled.to(torch.float8_e4m3fn), scale


def write_quantized(
    model: PreTrainedModel, folder: Path, kind: str, activations: bool, per_tensor: bool = False
) -> Path:
    """8-bit 2:4 checkpoint, and the model's weights replaced by their dequantised values (the twin)."""
    tensors = tensors_of(model)
    for name in linear_names(model):
        module = model.get_submodule(name)
        values, scale = quantize(module.weight.data, kind)
        if per_tensor:
            scale = scale.amax()
            limit = 127.0 if kind == "int" else 448.0
            scaled = module.weight.data.float() / scale
            values = (
                scaled.round().clamp(-limit, limit).to(torch.int8)
                if kind == "int"
                else scaled.to(torch.float8_e4m3fn)
            )
        tensors.pop(f"{name}.weight")
        tensors.update(packed(name, values))
        tensors[f"{name}.weight_scale"] = scale.reshape(1) if per_tensor else scale
        module.weight.data = (values.float() * scale).to(module.weight.dtype)
    group: dict[str, Any] = {
        "targets": ["Linear"],
        "weights": {
            "num_bits": 8,
            "type": kind,
            "strategy": "tensor" if per_tensor else "channel",
            "symmetric": True,
            "dynamic": False,
        },
    }
    if activations:
        group["input_activations"] = {
            "num_bits": 8,
            "type": kind,
            "strategy": "token",
            "symmetric": True,
            "dynamic": True,
        }
    quantization = {
        "format": "int-quantized" if kind == "int" else "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "sparsity_config": {**SPARSE_ONLY, "ignore": ["lm_head"]},
    }
    return _write(model, tensors, folder, quantization)


def _write(
    model: PreTrainedModel, tensors: dict[str, Tensor], folder: Path, quantization: dict[str, Any]
) -> Path:
    folder.mkdir(parents=True)
    model.config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config_path = folder / "config.json"
    config = json.loads(config_path.read_text())
    config["architectures"] = [type(model).__name__]
    config_path.write_text(json.dumps(config))
    set_quantization(folder, quantization)
    return folder


def load_dequantised(folder: Path) -> dict[str, Tensor]:
    """Float32 weights of an 8-bit 2:4 checkpoint, rebuilt from its own tensors."""
    from safetensors.torch import load_file

    from vllm_sparse.sparse24 import decompress

    tensors = load_file(folder / "model.safetensors")
    names = [name.removesuffix(".compressed") for name in tensors if name.endswith(".compressed")]
    return {
        f"{name}.weight": decompress(tensors[f"{name}.compressed"], tensors[f"{name}.bitmask"]).float()
        * tensors[f"{name}.weight_scale"]
        for name in names
    }


def damage(folder: Path, kind: str) -> None:
    """Break a layer of a bitmask checkpoint: a wrong bit count, shape or scale, or a missing tensor."""
    from safetensors.torch import load_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    if kind == "popcount":
        tensors["model.layers.1.mlp.down_proj.bitmask"][3, 2] = 0b0111_0011
    elif kind == "shape":
        tensors["model.layers.1.mlp.down_proj.shape"][1] = 200
    elif kind == "scale":
        tensors["model.layers.1.mlp.down_proj.weight_scale"][5] = float("nan")
    else:
        del tensors["model.layers.0.self_attn.k_proj.bitmask"]
    save_file(tensors, path, metadata={"format": "pt"})
