"""Single vLLM layers with our methods, in the parallel state of a running engine."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.serving import checkpoints as ck
from tests.serving.engine import engine
from vllm_sparse.quantization.config import Sparse24Config
from vllm_sparse.sparse24 import CsrMatrix, topk_mask

pytestmark = pytest.mark.e2e
N, K, SCALE = 48, 64, 3.0 / 127


def own_config() -> Sparse24Config:
    linear = {
        "pattern": "2:4",
        "weights": "int8",
        "activations": "int8_static",
        "outliers": {"layout": "csr"},
    }
    block = {"quant_method": "sparse24", "format_version": 2, "linear": linear, "ignore": []}
    made = Sparse24Config.from_config(block)
    assert isinstance(made, Sparse24Config)
    return made


def tensors_of(dense: Tensor, outliers: Tensor) -> dict[str, Tensor]:
    values, scale = ck.quantize(dense, "int")
    csr = CsrMatrix.from_dense(outliers)
    return {
        **{name.removeprefix("."): tensor for name, tensor in ck.packed("", values).items()},
        "weight_scale": scale,
        "input_scale": torch.tensor([SCALE]),
        "outlier_values": csr.values,
        "outlier_columns": csr.columns,
        "outlier_row_offsets": csr.row_offsets,
    }


def load(layer: Any, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        parameter = getattr(layer, name)
        parameter.weight_loader(parameter, tensor)
    layer.quant_method.process_weights_after_loading(layer)


def test_replicated_and_parallel_linears_load_every_tensor(tmp_path: Path) -> None:
    """Replicated layers go through vLLM's older loader, column and row parallel ones through the newer."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear

    torch.manual_seed(0)
    dense = torch.randn(N, K)
    dense *= topk_mask(dense.abs())
    outliers = torch.where(torch.rand(N, K) < 0.05, torch.randn(N, K), torch.zeros(()))
    tensors = tensors_of(dense, outliers)
    x = torch.randn(5, K)
    weight = ck.quantize(dense, "int")[0].float() * tensors["weight_scale"]
    rounded = (x / SCALE).round().clamp(-128, 127) * SCALE
    expected = rounded @ weight.T + x @ outliers.T
    folder = ck.write_bitmask(ck.pruned_model("llama", False), tmp_path / "s")
    with engine(folder) as llm, set_current_vllm_config(llm.llm_engine.vllm_config):
        for kind in (ReplicatedLinear, ColumnParallelLinear, RowParallelLinear):
            layer = kind(
                K, N, bias=False, params_dtype=torch.float32, quant_config=own_config(), prefix="model.a"
            )
            load(layer, tensors)
            out, _ = layer(x)
            assert (out - expected).abs().max() <= 1e-4, kind.__name__
            assert {name for name, _ in layer.named_parameters()} == {
                "weight_packed",
                "weight_packed_scale",
                "outlier_values",
                "outlier_columns",
                "outlier_row_offsets",
            }


def scaled(dense: Tensor, kind: str) -> tuple[Any, dict[str, Tensor], Tensor, float | None]:
    """An int8 layer with a scale per channel, group of 32 columns, or tensor (then for activations as well).

    Returns:
        Its config, its tensors on disk, the weight they stand for, and the scale of the activations.
    """
    values, scales = ck.quantize(dense, "int")
    if kind != "tensor":
        group = 32 if kind == "group" else None
        linear = {"pattern": "2:4", "weights": "int8", "group_size": group}
        block: dict[str, Any] = {
            "quant_method": "sparse24",
            "format_version": 1,
            "linear": linear,
            "ignore": [],
        }
        stored = {"weight_scale": scales.expand(-1, 2 if group else 1).contiguous()}
    else:
        scales = torch.tensor([0.02])
        stored = {"weight_scale": scales, "input_scale": torch.tensor([SCALE])}
        one = {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": True, "dynamic": False}
        block = {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "config_groups": {"all": {"targets": ["Linear"], "weights": one, "input_activations": one}},
            "sparsity_config": ck.SPARSE_ONLY,
        }
    packed = {name.removeprefix("."): tensor for name, tensor in ck.packed("", values).items()}
    activations = SCALE if kind == "tensor" else None
    return Sparse24Config.from_config(block), packed | stored, values.float() * scales, activations


def rounded(x: Tensor, scale: float | None) -> Tensor:
    return x if scale is None else (x / scale).round().clamp(-128, 127) * scale


@pytest.mark.parametrize("kind", ["channel", "group", "tensor"])
def test_rows_that_the_model_splits_by_itself(tmp_path: Path, kind: str) -> None:
    """As Mamba-2's ``in_proj`` with one group over two ranks: parts on top of each other, each split."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.linear import ColumnParallelLinear
    from vllm.model_executor.layers.mamba.mamba_mixer2 import mamba_v2_sharded_weight_loader

    torch.manual_seed(0)
    dense = torch.randn(N, K)
    dense *= topk_mask(dense.abs())
    sizes, rank = (32, 16), 1
    config, tensors, weight, scale = scaled(dense, kind)
    rows = torch.cat([part.chunk(2)[rank] for part in weight.split(sizes)])
    x = torch.randn(5, K)
    folder = ck.write_bitmask(ck.pruned_model("llama", False), tmp_path / "s")
    with engine(folder) as llm, set_current_vllm_config(llm.llm_engine.vllm_config):
        layer = ColumnParallelLinear(
            K, N // 2, bias=False, params_dtype=torch.float32, quant_config=config, prefix="model.in_proj"
        )
        for name in ("weight", "weight_scale", "input_scale"):
            parameter = getattr(layer, name, None)
            if parameter is not None:
                parameter.weight_loader = mamba_v2_sharded_weight_loader(
                    [(size, 0, False) for size in sizes], 2, rank
                )
        load(layer, tensors)
        out, _ = layer(x)
    assert (out - rounded(x, scale) @ rows.T).abs().max() <= 1e-4
