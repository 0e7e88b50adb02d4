"""Small checkpoints of every format that the fuzzer starts from, made without the converters."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

ROWS, COLS = 8, 32
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": COLS,
    "intermediate_size": COLS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "vocab_size": 16,
    "tie_word_embeddings": False,
    "dtype": "float32",
}


def _mask(generator: torch.Generator, rows: int = ROWS, cols: int = COLS) -> Tensor:
    kept = torch.rand(rows, cols // 4, 4, generator=generator).topk(2).indices
    return torch.zeros(rows, cols // 4, 4, dtype=torch.bool).scatter_(2, kept, True).reshape(rows, cols)


def _values(generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """2:4 values without zeros among the kept."""
    magnitude = torch.randint(1, 8, (ROWS, COLS), generator=generator).float()
    sign = torch.randint(0, 2, (ROWS, COLS), generator=generator).float() * 2 - 1
    return (magnitude * sign * _mask(generator)).to(dtype)


def _bits(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little"))


def _others() -> dict[str, Tensor]:
    return {
        "model.embed_tokens.weight": torch.arange(16.0 * COLS).reshape(16, COLS),
        "model.norm.weight": torch.ones(COLS),
        "lm_head.weight": torch.arange(16.0 * COLS).reshape(16, COLS).flip(0).contiguous(),
    }


def _packed24(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    tensors = {}
    for module in MODULES:
        weight = _values(generator, dtype).float()
        mask = weight != 0
        tensors[f"{module}.compressed"] = weight[mask].reshape(ROWS, COLS // 2).to(dtype)
        tensors[f"{module}.bitmask"] = _bits(mask)
        tensors[f"{module}.shape"] = torch.tensor([[ROWS], [COLS]])
    return tensors


def _quant_group(kind: str, bits: int = 8, strategy: str = "channel", size: int | None = None) -> dict:
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False}
    return {"group_0": {"targets": ["Linear"], "weights": weights | ({"group_size": size} if size else {})}}


SPARSITY = {
    "format": "sparse-24-bitmask",
    "sparsity_structure": "2:4",
    "global_sparsity": 0.5,
    "targets": ["Linear"],
    "ignore": ["lm_head", "re:.*embed.*"],
}
BLOCK = {"quant_method": "compressed-tensors", "sparsity_config": SPARSITY}


def _sparse24_bitmask(kind: str, generator: torch.Generator) -> tuple[dict[str, Tensor], dict]:
    dtype = {"float": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[kind]
    tensors = _packed24(dtype, generator)
    if kind == "float":
        return tensors, BLOCK
    for module in MODULES:
        tensors[f"{module}.weight_scale"] = torch.rand(ROWS, 1, generator=generator) + 0.5
    number = "int" if kind == "int8" else "float"
    more = {"format": f"{number}-quantized", "config_groups": _quant_group(number), "ignore": ["lm_head"]}
    return tensors, BLOCK | more


def _sparse24_int4(generator: torch.Generator) -> tuple[dict[str, Tensor], dict]:
    tensors = _packed24(torch.int8, generator)
    for module in MODULES:
        nibbles = tensors[f"{module}.compressed"].view(torch.uint8) & 15
        tensors[f"{module}.compressed"] = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
        tensors[f"{module}.weight_scale"] = torch.rand(ROWS, COLS // 8, generator=generator) + 0.5
    linear = {"pattern": "2:4", "weights": "int4", "group_size": 8, "activations": "none"}
    return tensors, _own(linear)


def _sparse24_branches(generator: torch.Generator) -> tuple[dict[str, Tensor], dict]:
    tensors = _packed24(torch.float32, generator)
    for module in MODULES:
        tensors[f"{module}.low_rank_a"] = torch.randint(-2, 3, (4, COLS), generator=generator).float()
        tensors[f"{module}.low_rank_b"] = torch.randint(-2, 3, (ROWS, 4), generator=generator).float()
    linear = {"pattern": "2:4", "weights": "fp32", "low_rank": {"projection": "dense", "columns_per_rank": 8}}
    return tensors, _own(linear)


def _sparse24_outliers(generator: torch.Generator) -> tuple[dict[str, Tensor], dict]:
    tensors = _packed24(torch.int8, generator)
    for module in MODULES:
        mask = torch.rand(ROWS, COLS, generator=generator) < 0.1
        counts = torch.nn.functional.pad(mask.sum(-1).cumsum(0), (1, 0))
        tensors[f"{module}.weight_scale"] = torch.rand(ROWS, 1, generator=generator) + 0.5
        tensors[f"{module}.input_scale"] = torch.full((1,), 0.25)
        tensors[f"{module}.outlier_values"] = torch.randn(int(mask.sum()), generator=generator)
        tensors[f"{module}.outlier_columns"] = mask.nonzero()[:, 1].to(torch.int32)
        tensors[f"{module}.outlier_row_offsets"] = counts
    linear = {"pattern": "2:4", "weights": "int8", "activations": "int8_static"}
    linear["outliers"] = {"layout": "csr"}
    return tensors, _own(linear) | {"format_version": 2}


def _own(linear: dict) -> dict:
    return {"quant_method": "sparse24", "format_version": 1, "linear": linear, "ignore": ["lm_head"]}


def _sparse_bitmask(generator: torch.Generator) -> tuple[dict[str, Tensor], dict]:
    tensors = {}
    for module in MODULES:
        weight = _values(generator, torch.float32)
        mask = weight != 0
        counts = mask.sum(-1)
        tensors[f"{module}.weight.compressed"] = weight[mask]
        tensors[f"{module}.weight.bitmask"] = _bits(mask)
        tensors[f"{module}.weight.shape"] = torch.tensor([ROWS, COLS])
        tensors[f"{module}.weight.row_offsets"] = counts.cumsum(0) - counts
    sparsity = SPARSITY | {"format": "sparse-bitmask", "sparsity_structure": "unstructured"}
    return tensors, {"quant_method": "compressed-tensors", "sparsity_config": sparsity}


def _marlin(generator: torch.Generator, names: tuple[str, str, str]) -> dict[str, Tensor]:
    """64 x 128 in the kernel's layout; every group keeps places 0 and 1, so that meta is one constant."""
    tensors = {}
    for module in MODULES:
        words = torch.randint(-(1 << 31), (1 << 31) - 1, (4, 128), generator=generator)
        tensors[f"{module}.{names[0]}"] = words.to(torch.int32)
        tensors[f"{module}.{names[1]}"] = (torch.rand(1, 64, generator=generator) + 0.5).half()
        tensors[f"{module}.{names[2]}"] = torch.full((4, 128), 0x4444, dtype=torch.int16)
    return tensors


def _write(folder: Path, tensors: dict[str, Tensor], block: dict | None, shards: int = 1) -> None:
    folder.mkdir(parents=True)
    config = CONFIG if block is None else CONFIG | {"quantization_config": block}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    tensors = {name: tensor.contiguous() for name, tensor in (tensors | _others()).items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    names = list(tensors)
    index = {}
    for shard in range(shards):
        part = names[shard::shards]
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def make_corpus(root: Path) -> list[Path]:
    """Every starting point, one folder each."""
    generator = torch.Generator().manual_seed(0)
    dense = {f"{module}.weight": _values(generator, torch.float32) for module in MODULES}
    _write(root / "dense", dense, None)
    vestigial = {"quant_method": "compressed-tensors", "sparsity_config": SPARSITY | {"format": "dense"}}
    _write(root / "dense-sharded", dense, vestigial, shards=3)
    for kind in ("float", "int8", "fp8"):
        tensors, block = _sparse24_bitmask(kind, generator)
        _write(root / f"bitmask24-{kind}", tensors, block, shards=2 if kind == "float" else 1)
    _write(root / "sparse24-int4", *_sparse24_int4(generator))
    _write(root / "sparse24-branches", *_sparse24_branches(generator))
    _write(root / "sparse24-outliers", *_sparse24_outliers(generator))
    _write(root / "sparse-bitmask", *_sparse_bitmask(generator))
    groups = _quant_group("int", 4)
    marlin = {"quant_method": "compressed-tensors", "format": "marlin-24", "config_groups": groups}
    names = ("weight_packed", "scale_packed", "meta")
    _write(root / "marlin24", _marlin(generator, names), marlin)
    gptq = {"quant_method": "gptq", "checkpoint_format": "marlin_24", "bits": 4, "group_size": -1}
    _write(root / "gptq-marlin24", _marlin(generator, ("B_24", "s", "B_meta")), gptq)
    whole = {f"{module}.weight": torch.randn(ROWS, COLS, generator=generator) for module in MODULES}
    _write(root / "maskllm", whole, None)
    masks = {f"{module}.weight.mask": np.packbits(_mask(generator).numpy()) for module in MODULES}
    np.savez(root / "maskllm/mask_compressed.npz", **masks)
    (root / "pickle").mkdir()
    (root / "pickle/config.json").write_text(json.dumps(CONFIG))
    torch.save({"model": dense | _others(), "step": 3}, root / "pickle/pytorch_model.bin")
    return sorted(root.iterdir())
