"""Our own ``sparse24`` format through a real vLLM engine: int4 groups and low-rank branches."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.convert import convert
from tests.serving import checkpoints as ck
from tests.serving.engine import engine, packed_layers, score, serve_and_score

pytestmark = pytest.mark.e2e


def test_int4_groups_answer_as_the_dequantised_twin(tmp_path: Path) -> None:
    dense = ck.write_dense(ck.pruned_model("llama", False).float(), tmp_path / "d")
    sparse, twin = tmp_path / "s", tmp_path / "t"
    convert(dense, sparse, weights="int4")
    convert(sparse, twin, to="dense")
    with engine(sparse) as llm:
        assert len(packed_layers(llm)) == 8
        ours = score(llm, ck.VOCAB)
    expected = serve_and_score(twin, ck.VOCAB)
    assert (ours.logprobs - expected.logprobs).abs().mean() <= 1e-4


@pytest.mark.parametrize("projection", ["pooled", "dense"])
def test_low_rank_branches_answer_as_the_merged_twin(tmp_path: Path, projection: str) -> None:
    model = ck.pruned_model("llama", False).float()
    folder = ck.write_bitmask(model, tmp_path / "s")
    add_low_rank(model, folder, projection)
    ours = serve_and_score(folder, ck.VOCAB)
    twin = serve_and_score(ck.write_dense(model, tmp_path / "t"), ck.VOCAB)
    assert (ours.logprobs - twin.logprobs).abs().mean() <= 1e-4


def add_low_rank(model: Any, folder: Path, projection: str, columns_per_rank: int = 16) -> None:
    """Give every linear of a bitmask checkpoint a random branch, and add it to the model's weights."""
    torch.manual_seed(5)
    tensors = load_file(folder / "model.safetensors")
    with torch.no_grad():
        for name in ck.linear_names(model):
            weight = model.get_submodule(name).weight
            rank = weight.shape[1] // columns_per_rank
            b = 0.1 * torch.randn(weight.shape[0], rank)
            a = torch.eye(rank).repeat_interleave(columns_per_rank, dim=1)
            if projection == "dense":
                a = 0.1 * torch.randn(rank, weight.shape[1])
                tensors[f"{name}.low_rank_a"] = a
            tensors[f"{name}.low_rank_b"] = b
            weight.add_(b @ a)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    linear = {
        "pattern": "2:4",
        "weights": "fp32",
        "low_rank": {"projection": projection, "columns_per_rank": columns_per_rank},
    }
    ck.set_quantization(
        folder, {"quant_method": "sparse24", "format_version": 1, "linear": linear, "ignore": ["lm_head"]}
    )
