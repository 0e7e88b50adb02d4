"""Checkpoints that are not ours: the same answers with the plugin as without it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from vllm.platforms import current_platform

from tests.serving import checkpoints as ck
from tests.serving.engine import engine, packed_layers, score
from tests.serving.foreign import write_pruned

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
GROUP = 32
STOCK = """
import json, sys, torch
from pathlib import Path
from tests.serving.engine import serve_and_score
if __name__ == "__main__":
    out, *folders = sys.argv[1:]
    torch.save([serve_and_score(Path(f), 250, "bfloat16").logprobs for f in folders], out)
"""


def random_words(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31 - 1, shape, generator=generator, dtype=torch.int64).to(torch.int32)


def awq(name: str, weight: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    n, k = weight.shape
    return {
        f"{name}.qweight": random_words(generator, k, n // 8),
        f"{name}.qzeros": random_words(generator, k // GROUP, n // 8),
        f"{name}.scales": 0.01 * torch.rand(k // GROUP, n, generator=generator).half(),
    }


def gptq(name: str, weight: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    n, k = weight.shape
    return {
        f"{name}.qweight": random_words(generator, k // 8, n),
        f"{name}.qzeros": torch.full((k // GROUP, n // 8), 0x77777777, dtype=torch.int32),
        f"{name}.scales": 0.01 * torch.rand(k // GROUP, n, generator=generator).half(),
        f"{name}.g_idx": (torch.arange(k) // GROUP).to(torch.int32),
    }


def w8a8(name: str, weight: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    values, scale = ck.quantize(weight, "int")
    return {f"{name}.weight": values, f"{name}.weight_scale": scale}


def w4a16(name: str, weight: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    n, k = weight.shape
    return {
        f"{name}.weight_packed": random_words(generator, n, k // 8),
        f"{name}.weight_scale": 0.01 * torch.rand(n, k // GROUP, generator=generator).bfloat16(),
        f"{name}.weight_shape": torch.tensor([n, k]),
    }


def compressed_tensors(fmt: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"type": "int", "symmetric": True, **weights}}
    if inputs is not None:
        group["input_activations"] = {"type": "int", "symmetric": True, **inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": fmt,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


Writer = Callable[[str, Tensor, torch.Generator], dict[str, Tensor]]
INT8 = compressed_tensors(
    "int-quantized",
    {"num_bits": 8, "strategy": "channel"},
    {"num_bits": 8, "strategy": "token", "dynamic": True},
)
LEFT_OVER = {"format": "dense", "sparsity_structure": "0:0", "targets": ["Linear"], "ignore": []}
ORDINARY: dict[str, tuple[Writer | None, dict[str, Any] | None]] = {
    "dense": (None, None),
    "awq": (
        awq,
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
    ),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}),
    "compressed-tensors-w8a8": (w8a8, INT8),
    "compressed-tensors-w4a16": (
        w4a16,
        compressed_tensors("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": GROUP}, None),
    ),
}

INT4 = ("awq", "gptq", "compressed-tensors-w4a16")


def write(name: str, folder: Path, extra: dict[str, Any] | None = None) -> Path:
    convert, block = ORDINARY[name]
    model = ck.pruned_model("llama", False)
    ck.write_dense(model, folder)
    if convert is None or block is None:
        return folder
    generator = torch.Generator().manual_seed(5)
    tensors = load_file(folder / "model.safetensors")
    for layer in ck.linear_names(model):
        tensors |= convert(layer, tensors.pop(f"{layer}.weight"), generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ck.set_quantization(folder, {**block, **(extra or {})})
    return folder


def without_plugin(folders: list[Path], tmp_path: Path) -> list[Tensor]:
    script, out = tmp_path / "stock.py", tmp_path / "stock.pt"
    script.write_text(STOCK)
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, str(script), str(out), *map(str, folders)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "VLLM_SPARSE_DISABLE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    loaded: list[Tensor] = torch.load(out)
    return loaded


def has_int4_kernel() -> bool:
    """Whether this build of vLLM multiplies int4 weights on this machine; on a CPU that takes AVX-512."""
    current_platform.import_kernels()
    return not current_platform.is_cpu() or hasattr(torch.ops._C, "cpu_gemm_wna16")


@pytest.mark.parametrize("int4", [False, True])
def test_ordinary_checkpoints_answer_as_without_the_plugin(int4: bool, tmp_path: Path) -> None:
    if int4 and not has_int4_kernel():
        pytest.skip("vLLM has no int4 kernel for this CPU")
    folders = [write(name, tmp_path / name) for name in ORDINARY if (name in INT4) is int4]
    if not int4:
        folders.append(write_pruned("qwen3-moe", tmp_path / "qwen3-moe"))
    stock = without_plugin(folders, tmp_path)
    for folder, expected in zip(folders, stock, strict=True):
        with engine(folder, "bfloat16") as llm:
            assert packed_layers(llm) == {}, folder.name
            config = llm.llm_engine.vllm_config.quant_config
            assert "vllm_sparse" not in type(config).__module__, folder.name
            assert torch.equal(score(llm, ck.VOCAB).logprobs, expected), folder.name


def test_a_leftover_sparsity_config_changes_nothing(tmp_path: Path) -> None:
    """Stock vLLM refuses these; with the plugin they answer as stock vLLM does without the leftover."""
    plain = write("compressed-tensors-w8a8", tmp_path / "plain")
    left = write("compressed-tensors-w8a8", tmp_path / "left", {"sparsity_config": LEFT_OVER})
    (expected,) = without_plugin([plain], tmp_path)
    with engine(left, "bfloat16") as llm:
        assert packed_layers(llm) == {}
        assert torch.equal(score(llm, ck.VOCAB).logprobs, expected)


@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_without_the_plugin_vllm_itself_refuses(tmp_path: Path, family: str) -> None:
    folder = write_pruned(family, tmp_path / "d")
    ck.set_quantization(folder, {"sparsity_config": {**ck.SPARSE_ONLY, "ignore": ["lm_head"]}})
    code = (
        "from vllm.engine.arg_utils import EngineArgs\n"
        f"EngineArgs(model={json.dumps(str(folder))}, skip_tokenizer_init=True).create_engine_config()\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "VLLM_SPARSE_DISABLE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    assert "Sparsity support has been removed" in run.stderr
