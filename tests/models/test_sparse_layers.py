"""Both at once: layers that differ, and linears that are 2:4 (and int8) inside them."""

import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import structured_checkpoints as checkpoints
import structured_engine as engines
import torch
from structured_reference import Tensors
from vllm.config import CompilationMode

from vllm_sparse.errors import UnsupportedError
from vllm_sparse.quantization import methods
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
#: Linear weights; routers stay dense.
LINEAR = re.compile(r"(_proj|_with_mqa|\.c_fc|\.c_attn|\.fc[12]|experts\.\d+\.w[123])\.weight$")
#: GPT-2 stores these (in, out); packed they are (out, in) like all others, and pruned along the input.
CONV1D = re.compile(r"\.c_(fc|proj|attn)\.weight$")


def sparsify(tensors: Tensors, int8: bool, dense: Sequence[str] = ()) -> tuple[Tensors, Tensors]:
    """Prune every projection to 2:4 but the ``dense``; return what goes on disk and its dense twin."""
    disk, twin = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if not LINEAR.search(name) or name.removesuffix(".weight") in dense:
            continue
        turned = bool(CONV1D.search(name))
        weight = weight.t() if turned else weight
        values = weight * topk_mask(weight.abs())
        twin[name] = values.t() if turned else values
        module = name.removesuffix(".weight")
        if int8:
            scale = values.abs().amax(1, keepdim=True) / 127
            values = (values / scale).round().to(torch.int8)
            twin[name] = (values * scale).t() if turned else values * scale
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


#: Linears that vLLM runs as one, in a layer where they stay dense beside 2:4 ones.
FUSED = {
    "qwen3_moe": ["model.layers.4.mlp.gate_proj", "model.layers.4.mlp.up_proj"],
    "deepseek": [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"],
    "deepseek_v3": ["model.layers.0.self_attn.q_a_proj", "model.layers.0.self_attn.kv_a_proj_with_mqa"],
}


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("family", FUSED)
def test_fused_linears_that_stay_dense(family: str, tmp_path: Path) -> None:
    """The ignore list has the checkpoint's names, of which vLLM makes one."""
    config = checkpoints.make_config(family, 6, **checkpoints.CASES[family])
    disk, twin = sparsify(checkpoints.make_tensors(config), False, FUSED[family])
    assert set(FUSED[family]) <= {name.removesuffix(".weight") for name in disk}
    sparsity = {**SPARSITY, "ignore": [*SPARSITY["ignore"], *FUSED[family]]}
    config["quantization_config"] = {"quant_method": "compressed-tensors", "sparsity_config": sparsity}
    checkpoints.save_checkpoint(tmp_path, config, disk)
    with engines.engine(tmp_path) as llm:
        engines.assert_parity(engines.run(llm, engines.prompts()), config, twin)


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "deepseek_v2"])
def test_24_found_in_dense_tensors(family: str, tmp_path: Path) -> None:
    """No quantisation config: ``--quantization sparse24`` looks at the data, also of a latent's expansion."""
    config = checkpoints.make_config(family, 6, checkpoints.layers_for(family))
    _, twin = sparsify(checkpoints.make_tensors(config), False)
    checkpoints.save_checkpoint(tmp_path, config, twin)
    with engines.engine(tmp_path, quantization="sparse24") as llm:
        engines.assert_parity(engines.run(llm, engines.prompts()), config, twin)
        (packed,) = llm.apply_model(count_packed)
    assert packed


def count_packed(model: torch.nn.Module) -> int:
    """How many linears are served from packed 2:4 weights."""
    return sum(hasattr(module, "weight_packed") for module in model.modules())


@pytest.mark.e2e
@pytest.mark.parametrize("int8", [False, True], ids=["plain", "int8"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_sparse_linears_in_pruned_layers(family: str, int8: bool, tmp_path: Path) -> None:
    check(family, tmp_path, int8, positions=False)


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.parametrize("int8", [False, True], ids=["plain", "int8"])
@pytest.mark.parametrize("family", checkpoints.FAMILIES)
def test_contract_of_sparse_linears_and_experts(family: str, int8: bool, tmp_path: Path) -> None:
    """Also where the linears are those of experts that differ by layer in number and width."""
    check(family, tmp_path, int8, positions=True)


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.parametrize("int8", [False, True], ids=["plain", "int8"])
@pytest.mark.parametrize("family", checkpoints.FAMILIES)
def test_sparse_linears_compiled(family: str, int8: bool, tmp_path: Path) -> None:
    """The operators inside a compiled graph, in layers that differ."""
    check(family, tmp_path, int8, positions=True, enforce_eager=False)


@pytest.mark.parametrize("mode", [CompilationMode.DYNAMO_TRACE_ONCE, CompilationMode.NONE])
@pytest.mark.parametrize("architecture", ["DeepseekV3ForCausalLM", "SparseDeepseekV3ForCausalLM"])
def test_vllms_own_deepseek_v3_is_refused_compiled(
    architecture: str, mode: CompilationMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its routers may be read before they are written; the classes for pruned models route by torch."""
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(mode=mode), model_config=SimpleNamespace(architecture=architecture)
    )
    monkeypatch.setattr(methods, "get_current_vllm_config_or_none", lambda: config)
    name = "model.layers.0.self_attn.fused_qkv_a_proj"
    methods._check_compiled(name.replace("fused_qkv_a_proj", "o_proj"))
    if architecture.startswith("Sparse") or mode is CompilationMode.NONE:
        methods._check_compiled(name)
    else:
        with pytest.raises(UnsupportedError, match=r"fused_qkv_a_proj gives wrong results .*--enforce-eager"):
            methods._check_compiled(name)
