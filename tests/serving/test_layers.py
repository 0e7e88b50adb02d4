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
