"""Checkpoints whose bytes and configs compressed-tensors 0.13 wrote, in a process of its own."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.serving import checkpoints as ck
from vllm_sparse.sparse24 import topk_mask

HERE = Path(__file__).parent
INPUT_SCALE = {"int": 4.0 / 127, "float": 4.0 / 448}


@dataclass(frozen=True)
class Format:
    """One row of the table of formats: stored dtype, and quantisation as the library's config says it."""

    dtype: torch.dtype = torch.bfloat16
    type: str | None = None
    strategy: str = "channel"
    activations: str | None = None


FORMATS = {
    "bf16": Format(),
    "fp16": Format(torch.float16),
    "fp32": Format(torch.float32),
    "int8": Format(type="int"),
    "int8-tensor": Format(type="int", strategy="tensor"),
    "int8-dynamic": Format(type="int", activations="dynamic"),
    "int8-static": Format(type="int", activations="static"),
    "fp8": Format(type="float"),
    "fp8-dynamic": Format(type="float", activations="dynamic"),
    "fp8-static": Format(type="float", strategy="tensor", activations="static"),
}


@dataclass(frozen=True)
class Packing:
    """A format that is converted before it is served."""

    packing: str
    bits: int = 16
    group_size: int | None = None


CONVERTED = {
    "marlin-24-int4": Packing("marlin-24", 4, 128),
    "marlin-24-int8": Packing("marlin-24", 8),
    "sparse-bitmask-bf16": Packing("sparse-bitmask"),
}
MOE = {**ck.SHAPE, "intermediate_size": 96}
# Whole groups of 128 columns on each of two ranks, and marlin's tiles of 64 outputs.
WIDE = {**ck.SHAPE, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**ck.SHAPE)),
    "llama-wide": lambda: LlamaForCausalLM(LlamaConfig(**WIDE)),
    "qwen3-moe-wide": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **WIDE, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=256, norm_topk_prob=True
        )
    ),
    "qwen3-moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **MOE, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True
        )
    ),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**MOE, num_local_experts=4, num_experts_per_tok=2)),
    # OLMoE has no head_dim of its own: two heads of 32, as vLLM's CPU attention takes no 16.
    "olmoe": lambda: OlmoeForCausalLM(
        OlmoeConfig(
            **(MOE | {"intermediate_size": 32, "num_attention_heads": 2}),
            num_experts=8,
            num_experts_per_tok=2,
        )
    ),
}


@dataclass(frozen=True)
class Pair:
    """A checkpoint that the library wrote, and the dense weights that it makes of it."""

    sparse: Path
    twin: Path
    format: Format


def library() -> Path:
    """The folder that holds compressed-tensors 0.13; `make setup` makes it."""
    made = Path(sys.prefix) / "compressed-tensors-0.13"
    if not made.is_dir():
        pytest.skip("compressed-tensors 0.13 is not installed; make setup installs it")
    return made


def write_pruned(family: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A dense checkpoint with per-expert names whose linears, routers aside, are 2:4."""
    torch.manual_seed(3)
    model = FAMILIES[family]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name, weight in tensors.items():
        if weight.ndim == 2 and "layers" in name and not name.endswith(".gate.weight"):
            tensors[name] = weight * topk_mask(weight.float().abs()) * 2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def written_by_library(family: str, names: list[str], root: Path) -> dict[str, Pair]:
    """One checkpoint for each named format, from one process of the library."""
    jobs, pairs = [], {}
    for name in names:
        fmt = FORMATS[name]
        dense = root / f"{family}-{str(fmt.dtype).removeprefix('torch.')}"
        if not dense.is_dir():
            write_pruned(family, dense, fmt.dtype)
        out = root / f"{family}-{name}"
        jobs.append(
            {
                "dense": str(dense),
                "out": str(out),
                "type": fmt.type,
                "strategy": fmt.strategy,
                "activations": fmt.activations,
                "input_scale": INPUT_SCALE.get(fmt.type or ""),
            }
        )
        pairs[name] = Pair(out, Path(f"{out}-twin"), fmt)
    _run_library(jobs)
    return pairs


def to_convert(family: str, names: list[str], root: Path) -> dict[str, Pair]:
    """Checkpoints of formats that have to be converted, from one process of the library."""
    dense = write_pruned(family, root / family)
    pairs = {name: Pair(root / name, root / f"{name}-twin", Format()) for name in names}
    _run_library(
        [{"dense": str(dense), "out": str(pairs[name].sparse), **vars(CONVERTED[name])} for name in names]
    )
    return pairs


def _run_library(jobs: list[dict[str, Any]]) -> None:
    done = subprocess.run(
        [sys.executable, str(HERE / "ct13_serving_worker.py"), json.dumps(jobs)],
        env=os.environ | {"PYTHONPATH": str(library()), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
