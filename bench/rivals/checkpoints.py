"""One model shape with random 2:4 weights, written in every format that is compared.

Speed does not depend on the values of the weights, so they are random; the models answer nothing. All
checkpoints of a set hold the same weights as far as their formats can say them: the dense ones store the
zeros.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bench.demo.real_size import random_24
from converters.convert import convert

SEED = 0
_STD = 0.02
GROUP = 128
_INT8_MAX, _INT4_MAX = 127, 7
# Sparse checkpoints, by what follows "2of4-": how the converter is asked for them.
_SPARSE = {"bf16": "keep", "int8": "int8", "int4": "int4", "w4a8": "w4a8"}


@dataclass(frozen=True)
class Shape:
    """A Llama-like decoder."""

    name: str
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = True

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden // self.heads

    def linears(self) -> dict[str, tuple[int, int]]:
        """Linear modules of one layer, ``(out, in)`` features."""
        kv = self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.ffn, self.hidden),
            "mlp.up_proj": (self.ffn, self.hidden),
            "mlp.down_proj": (self.hidden, self.ffn),
        }

    def config(self) -> dict[str, Any]:
        """config.json of the bf16 model."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "tie_word_embeddings": self.tied,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "torch_dtype": "bfloat16",
        }


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-3.2-1b", 2048, 8192, 16, 32, 8, 128256),
        Shape("tiny", 256, 512, 2, 4, 2, 1024),  # to try the commands
    )
}


def write_dense(folder: Path, shape: Shape) -> None:
    """Plain bf16 safetensors whose linears hold two non-zeros in every four."""

    def fill(partial: Path) -> None:
        generator = torch.Generator().manual_seed(SEED)
        ones = torch.ones(shape.hidden, dtype=torch.bfloat16)
        embedding = torch.empty(shape.vocab, shape.hidden, dtype=torch.bfloat16)
        tensors = {
            "model.embed_tokens.weight": embedding.normal_(0, _STD, generator=generator),
            "model.norm.weight": ones,
        }
        for index in range(shape.layers):
            prefix = f"model.layers.{index}"
            for name, size in shape.linears().items():
                tensors[f"{prefix}.{name}.weight"] = random_24(*size, generator)
            for name in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}.{name}.weight"] = ones.clone()
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        write_tokenizer(partial, shape.vocab)
        (partial / "config.json").write_text(json.dumps(shape.config(), indent=2))

    _make(folder, fill)


def write_tokenizer(folder: Path, vocab: int) -> None:
    """A word for every id, so that a server can spell whatever a model emits."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0", "eos_token": "w1"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _make(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fill a folder under a temporary name; an existing complete one is kept."""
    if (folder / "config.json").is_file():
        return
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    fill(partial)
    partial.replace(folder)


def _quantised(weight: Tensor, group: int, most: int) -> tuple[Tensor, Tensor]:
    """Symmetric integers ``[n, k]`` (int8) and float32 scales ``[n, k/group]``."""
    grouped = weight.float().unflatten(1, (-1, group))
    scale = (grouped.abs().amax(-1, keepdim=True) / most).clamp_min(1e-12)
    return (grouped / scale).round().to(torch.int8).flatten(1), scale.squeeze(-1)


def _w8a8(name: str, weight: Tensor) -> dict[str, Tensor]:
    values, scale = _quantised(weight, weight.shape[1], _INT8_MAX)
    return {f"{name}.weight": values, f"{name}.weight_scale": scale}


def _w4a16(name: str, weight: Tensor) -> dict[str, Tensor]:
    values, scale = _quantised(weight, GROUP, _INT4_MAX)
    nibbles = (values.to(torch.int32) + 8).unflatten(1, (-1, 8))
    packed = sum((nibbles[..., i] << (4 * i) for i in range(8)), torch.zeros((), dtype=torch.int32))
    return {
        f"{name}.weight_packed": packed.to(torch.int32),
        f"{name}.weight_scale": scale.to(torch.bfloat16),
        f"{name}.weight_shape": torch.tensor(weight.shape),
    }


_WEIGHTS_8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
_TOKENS_8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
_WEIGHTS_4 = {
    "num_bits": 4,
    "type": "int",
    "symmetric": True,
    "strategy": "group",
    "group_size": GROUP,
    "dynamic": False,
}


def _quantization_config(fmt: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": fmt,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def _each(dense: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(dense / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            yield name, file.get_tensor(name)


def write_quantised(
    folder: Path, dense: Path, quantise: Callable[[str, Tensor], dict[str, Tensor]], block: dict[str, Any]
) -> None:
    """A dense compressed-tensors checkpoint that stock vLLM serves."""

    def fill(partial: Path) -> None:
        tensors: dict[str, Tensor] = {}
        for name, tensor in _each(dense):
            is_linear = tensor.dim() == 2 and name.startswith("model.layers.")
            tensors |= quantise(name.removesuffix(".weight"), tensor) if is_linear else {name: tensor}
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(dense / name, partial / name)
        config = json.loads((dense / "config.json").read_text()) | {"quantization_config": block}
        (partial / "config.json").write_text(json.dumps(config, indent=2))

    _make(folder, fill)


def write_set(out: Path, shape: Shape, say: Callable[[str], None]) -> dict[str, Path]:
    """All checkpoints, by short name: ``bf16``, ``w8a8``, ``w4a16`` dense; ``2of4-*`` sparse.

    What is there already is kept.
    """
    paths = {name: out / name for name in ("bf16", "w8a8", "w4a16", *(f"2of4-{name}" for name in _SPARSE))}
    say("bf16")
    write_dense(paths["bf16"], shape)
    say("w8a8")
    write_quantised(
        paths["w8a8"], paths["bf16"], _w8a8, _quantization_config("int-quantized", _WEIGHTS_8, _TOKENS_8)
    )
    say("w4a16")
    write_quantised(
        paths["w4a16"], paths["bf16"], _w4a16, _quantization_config("pack-quantized", _WEIGHTS_4, None)
    )
    for short, weights in _SPARSE.items():
        name = f"2of4-{short}"
        if not (paths[name] / "config.json").is_file():
            say(name)
            shutil.rmtree(paths[name], ignore_errors=True)
            convert(paths["bf16"], paths[name], weights=weights)
    return paths
