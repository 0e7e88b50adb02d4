"""Our own ``sparse24`` format through a real vLLM engine: int4 groups and low-rank branches."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.convert import convert
from tests.serving import checkpoints as ck
from tests.serving.engine import MANY_PROMPTS, engine, packed_layers, score, serve_and_score
from tests.serving.test_formats import assert_bf16_parity, assert_parity
from vllm_sparse.errors import FormatError

pytestmark = pytest.mark.e2e


def test_int4_groups_answer_as_the_dequantised_twin(tmp_path: Path) -> None:
    dense = ck.write_dense(ck.pruned_model("llama", False).float(), tmp_path / "d")
    sparse, twin = tmp_path / "s", tmp_path / "t"
    convert(dense, sparse, weights="int4")
    convert(sparse, twin, to="dense")
    with engine(sparse) as llm:
        assert len(packed_layers(llm)) == 8
        ours = score(llm, ck.VOCAB, MANY_PROMPTS)
    expected = serve_and_score(twin, ck.VOCAB, count=MANY_PROMPTS)
    assert_parity(ours, expected, "int4 groups")


@pytest.mark.parametrize("projection", ["pooled", "dense"])
def test_low_rank_branches_answer_as_the_merged_twin(tmp_path: Path, projection: str) -> None:
    model = ck.pruned_model("llama", False).float()
    folder = ck.write_bitmask(model, tmp_path / "s")
    add_low_rank(model, folder, projection)
    ours = serve_and_score(folder, ck.VOCAB, count=MANY_PROMPTS)
    twin = serve_and_score(ck.write_dense(model, tmp_path / "t"), ck.VOCAB, count=MANY_PROMPTS)
    assert_parity(ours, twin, f"low rank, {projection}")


@pytest.mark.parametrize("low_rank", [False, True])
def test_outliers_answer_as_the_merged_twin(tmp_path: Path, low_rank: bool) -> None:
    """Beside a low-rank branch, or alone and on the head too; fused layers, a layer without any outlier."""
    head = not low_rank
    model = ck.pruned_model("llama", False, head=head).float()
    folder = ck.write_bitmask(model, tmp_path / "s", skip=() if head else ("lm_head",))
    if low_rank:
        add_low_rank(model, folder, "dense")
    add_outliers(model, folder, head)
    with engine(folder) as llm:
        assert len(packed_layers(llm)) == 8 + head
        ours = score(llm, ck.VOCAB, MANY_PROMPTS)
        served = llm.llm_engine.model_executor.driver_worker.worker.get_model()
        assert not served.model.layers[0].mlp.down_proj.outliers
        assert served.model.layers[1].self_attn.qkv_proj.outlier_row_offsets.shape == (
            4 * 32 + 2 * 2 * 32 + 1,
        )
    twin = serve_and_score(ck.write_dense(model, tmp_path / "t"), ck.VOCAB, count=MANY_PROMPTS)
    assert_parity(ours, twin, f"outliers, low rank {low_rank}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int4", "low-rank-pooled", "low-rank-dense", "outliers"])
def test_bf16_is_as_close_to_float32_as_the_dense_twin(tmp_path: Path, kind: str) -> None:
    """Branches stored in bf16, the twin merged in float32."""
    model, folder, twin = ck.pruned_model("llama", False), tmp_path / "s", tmp_path / "t"
    if kind == "int4":
        convert(ck.write_dense(model.float(), tmp_path / "d"), folder, weights="int4")
        convert(folder, twin, to="dense")
    elif kind == "outliers":
        ck.write_bitmask(model.float(), folder)
        add_outliers(model, folder)
        ck.write_dense(model, twin)
    else:
        ck.write_bitmask(model, folder)
        add_low_rank(model.float(), folder, kind.rpartition("-")[2], dtype=torch.bfloat16)
        ck.write_dense(model, twin)
    exact = serve_and_score(twin, ck.VOCAB, count=MANY_PROMPTS)
    sparse, dense = (serve_and_score(f, ck.VOCAB, "bfloat16", MANY_PROMPTS) for f in (folder, twin))
    assert_bf16_parity(sparse, dense, exact, kind)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t, name: t.pop(f"{name}.outlier_columns"), r"down_proj: .*does not have all of outlier_"),
        (lambda t, name: t[f"{name}.outlier_columns"].fill_(3), r"down_proj: .*strictly ascend"),
    ],
)
def test_damaged_outliers_name_the_layer(tmp_path: Path, damage: Any, message: str) -> None:
    model = ck.pruned_model("llama", False).float()
    folder = ck.write_bitmask(model, tmp_path / "s")
    add_outliers(model, folder)
    tensors = load_file(folder / "model.safetensors")
    damage(tensors, "model.layers.1.mlp.down_proj")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=message), engine(folder):
        pass


def add_outliers(model: Any, folder: Path, head: bool = False, fraction: float = 0.02) -> None:
    """Give every linear but one of a bitmask checkpoint sparse outliers, written out without the package."""
    torch.manual_seed(6)
    tensors = load_file(folder / "model.safetensors")
    with torch.no_grad():
        for name in ck.linear_names(model, head):
            weight = model.get_submodule(name).weight
            kept = torch.rand(weight.shape) < (0 if name == "model.layers.0.mlp.down_proj" else fraction)
            outliers = torch.where(kept, torch.randn(weight.shape), torch.zeros(()))
            csr = outliers.to_sparse_csr()
            tensors[f"{name}.outlier_values"] = csr.values()
            tensors[f"{name}.outlier_columns"] = csr.col_indices().to(torch.int32)
            tensors[f"{name}.outlier_row_offsets"] = csr.crow_indices().to(torch.int64)
            weight.add_(outliers)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    block = json.loads((folder / "config.json").read_text())["quantization_config"]
    linear = block.get("linear", {"pattern": "2:4", "weights": "fp32"})
    ck.set_quantization(
        folder,
        {
            "quant_method": "sparse24",
            "format_version": 2,
            "linear": {**linear, "outliers": {"layout": "csr"}},
            "ignore": [] if head else ["lm_head"],
        },
    )


def add_low_rank(
    model: Any,
    folder: Path,
    projection: str,
    columns_per_rank: int = 16,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Give every linear of a bitmask checkpoint a random branch, and add it to the model's weights."""
    torch.manual_seed(5)
    tensors = load_file(folder / "model.safetensors")
    with torch.no_grad():
        for name in ck.linear_names(model):
            weight = model.get_submodule(name).weight
            rank = weight.shape[1] // columns_per_rank
            b = (0.1 * torch.randn(weight.shape[0], rank)).to(dtype)
            a = torch.eye(rank).repeat_interleave(columns_per_rank, dim=1)
            if projection == "dense":
                a = (0.1 * torch.randn(rank, weight.shape[1])).to(dtype)
                tensors[f"{name}.low_rank_a"] = a
            tensors[f"{name}.low_rank_b"] = b
            weight.add_(b.float() @ a.float())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    linear = {
        "pattern": "2:4",
        "weights": "fp32" if dtype == torch.float32 else "bf16",
        "low_rank": {"projection": projection, "columns_per_rank": columns_per_rank},
    }
    ck.set_quantization(
        folder, {"quant_method": "sparse24", "format_version": 1, "linear": linear, "ignore": ["lm_head"]}
    )
