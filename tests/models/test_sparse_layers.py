"""Both at once: layers that differ, and linears that are 2:4 (and int8) inside them."""

from pathlib import Path
from typing import Any

import pytest
import structured_checkpoints as checkpoints
import structured_engine as engines
import torch
from structured_reference import Tensors

from vllm_sparse.sparse24 import compress, topk_mask

SPARSITY = {
    "format": "sparse-24-bitmask",
    "sparsity_structure": "2:4",
    "targets": ["Linear"],
    "ignore": ["lm_head"],
}
INT8 = {
    "format": "int-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8,
                "type": "int",
                "strategy": "channel",
                "symmetric": True,
                "dynamic": False,
            },
        }
    },
    "ignore": ["lm_head"],
}


def sparsify(tensors: Tensors, int8: bool) -> tuple[Tensors, Tensors]:
    """Prune every projection to 2:4; return what goes on disk and its dense twin."""
    disk, twin = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if not name.endswith("_proj.weight"):
            continue
        values = weight * topk_mask(weight.abs())
        twin[name] = values
        module = name.removesuffix(".weight")
        if int8:
            scale = values.abs().amax(1, keepdim=True) / 127
            values = (values / scale).round().to(torch.int8)
            twin[name] = values * scale
            disk[f"{module}.weight_scale"] = scale
        packed, bitmask = compress(values)
        del disk[name]
        disk[f"{module}.compressed"] = packed
        disk[f"{module}.bitmask"] = bitmask
        disk[f"{module}.shape"] = torch.tensor(weight.shape).reshape(2, 1)
    return disk, twin


def check(family: str, folder: Path, int8: bool = False, layers: Any = None, **options: Any) -> None:
    config = checkpoints.make_config(family, 6, layers or checkpoints.GATED_LAYERS)
    disk, twin = sparsify(checkpoints.make_tensors(config), int8)
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "sparsity_config": SPARSITY,
        **(INT8 if int8 else {}),
    }
    checkpoints.save_checkpoint(folder, config, disk)
    with engines.engine(folder, **options) as llm:
        engines.assert_parity(engines.run(llm, engines.prompts()), config, twin)


@pytest.mark.e2e
@pytest.mark.parametrize("int8", [False, True], ids=["plain", "int8"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_sparse_linears_in_pruned_layers(family: str, int8: bool, tmp_path: Path) -> None:
    check(family, tmp_path, int8)
