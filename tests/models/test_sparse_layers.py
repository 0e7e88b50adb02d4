"""Both at once: layers that differ, and linears that are 2:4 (and int8) inside them."""

import re
from pathlib import Path
from typing import Any

import pytest
import structured_checkpoints as checkpoints
import structured_engine as engines
import torch
from structured_reference import Tensors

from vllm_sparse.sparse24 import compress, topk_mask

ROUTERS = r"re:.*\.gate$"
SPARSITY = {
    "format": "sparse-24-bitmask",
    "sparsity_structure": "2:4",
    "targets": ["Linear"],
    "ignore": ["lm_head", ROUTERS],
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
    "ignore": ["lm_head", ROUTERS],
}
#: Linear weights; GPT-2 stores its own the other way round, and routers stay dense.
LINEAR = re.compile(r"(_proj|_with_mqa|\.fc[12]|experts\.\d+\.w[123])\.weight$")
FAMILIES = tuple(f for f in checkpoints.FAMILIES if f not in ("gpt2", *checkpoints.LATENT))


def sparsify(tensors: Tensors, int8: bool) -> tuple[Tensors, Tensors]:
    """Prune every projection to 2:4; return what goes on disk and its dense twin."""
    disk, twin = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if not LINEAR.search(name):
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


def check(family: str, folder: Path, int8: bool, positions: bool, **options: Any) -> None:
    config = checkpoints.make_config(family, 6, checkpoints.layers_for(family))
    disk, twin = sparsify(checkpoints.make_tensors(config), int8)
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "sparsity_config": SPARSITY,
        **(INT8 if int8 else {}),
    }
    checkpoints.save_checkpoint(folder, config, disk)
    with engines.engine(folder, **options) as llm:
        engines.assert_parity(engines.run(llm, engines.prompts()), config, twin)
        if positions:
            engines.assert_contract(llm, config, twin)


@pytest.mark.e2e
@pytest.mark.parametrize("int8", [False, True], ids=["plain", "int8"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_sparse_linears_in_pruned_layers(family: str, int8: bool, tmp_path: Path) -> None:
    check(family, tmp_path, int8, positions=False)


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.parametrize("int8", [False, True], ids=["plain", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_contract_of_sparse_linears_and_experts(family: str, int8: bool, tmp_path: Path) -> None:
    """Also where the linears are those of experts that differ by layer in number and width."""
    check(family, tmp_path, int8, positions=True)
