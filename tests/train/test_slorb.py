import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from converters.train.ast_trainer import MaskedLinear
from converters.train.compress import compress_model
from converters.train.corpus import load_corpus
from converters.train.evaluate import perplexity
from converters.train.loading import load_model
from converters.train.packing import encode_documents
from converters.train.slorb import BranchLinear, SlorbRecipe, branches_of, make_branch
from vllm_sparse.errors import FormatError
from vllm_sparse.sparse24 import decompress, is_24, topk_mask


def test_a_fresh_branch_leaves_each_blocks_row_mean_as_it_was():
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    mask = topk_mask(weight.abs())
    branch = make_branch(weight, mask, SlorbRecipe(block=16))
    whole = weight * mask + branch.weight @ branch.projection
    assert torch.allclose(whole.reshape(6, 4, 16).mean(-1), weight.reshape(6, 4, 16).mean(-1), atol=1e-6)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    pooled = make_branch(weight, mask, SlorbRecipe(block=16, train_projection=False))
    assert pooled.projection is None
    assert torch.allclose(pooled(x), branch(x), atol=1e-5)
    for init, factor in (("sum", 16.0), ("zero", 0.0)):
        other = make_branch(weight, mask, SlorbRecipe(block=16, init=init))
        assert torch.allclose(other.weight, branch.weight * factor, atol=1e-5)
    for train in (True, False):
        fixed = make_branch(weight, mask, SlorbRecipe(init="xavier", train_projection=train)).projection
        assert fixed is not None
        assert fixed.requires_grad is train
    with pytest.raises(FormatError, match="does not divide"):
        make_branch(weight[:, :20], mask[:, :20], SlorbRecipe(block=16))


@pytest.mark.parametrize("train_projection", [True, False])
def test_the_finished_linear_computes_what_the_trained_one_did(train_projection: bool):
    linear = nn.Linear(32, 8)
    layer = MaskedLinear(linear, SlorbRecipe(block=16, train_projection=train_projection))
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    expected = layer(x)
    finished = layer.sparse_linear(linear)
    assert isinstance(finished, BranchLinear)
    assert is_24(finished.weight.detach())
    assert torch.allclose(finished(x), expected, atol=1e-6)
    names = {name for name, _ in finished.named_parameters()}
    assert names == {"weight", "bias", "low_rank_b"} | ({"low_rank_a"} if train_projection else set())


def test_a_random_projection_depends_on_the_seed_alone(trained_dir: Path, text_file: Path, tmp_path: Path):
    """Also when it is not trained: then it stays what the seed drew."""
    found = []
    for number, seed in enumerate((3, 3, 4)):
        compress_model(
            "ast", trained_dir, tmp_path / str(number), str(text_file), quiet=True, eval_tokens=0,
            optimiser={"steps": 2, "batch_size": 4, "lr": 1e-2}, data_options={"sequence_length": 32},
            slorb={"init": "xavier", "train_projection": False}, save_dtype="float32", run={"seed": seed},
        )  # fmt: skip
        state = load_file(tmp_path / str(number) / "model.safetensors")
        found.append(state["model.layers.1.mlp.down_proj.low_rank_a"])
        assert state["model.layers.1.mlp.down_proj.low_rank_b"].abs().max() > 0
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("train_projection", [True, False])
def test_ast_with_slorb_is_written_in_the_documented_format(
    train_projection: bool, trained_dir: Path, text_file: Path, tmp_path: Path
):
    result = compress_model(
        "ast", trained_dir, tmp_path / "out", str(text_file), quiet=True, eval_tokens=2000,
        data_options={"sequence_length": 32}, slorb={"block": 16, "train_projection": train_projection},
        optimiser={"steps": 20, "batch_size": 8, "warmup": 3, "lr": 5e-4},
    )  # fmt: skip
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    block = config["quantization_config"]
    projection = "dense" if train_projection else "pooled"
    assert block["quant_method"] == "sparse24"
    assert block["linear"]["low_rank"] == {"projection": projection, "columns_per_rank": 16}
    assert block["linear"]["weights"] == "bf16"
    assert block["ignore"] == ["lm_head"]
    state = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    assert is_24(decompress(state[f"{name}.compressed"], state[f"{name}.bitmask"]))
    assert state[f"{name}.shape"].tolist() == [[64], [128]]
    assert state[f"{name}.low_rank_b"].shape == (64, 8)
    assert (f"{name}.low_rank_a" in state) == train_projection
    assert f"{name}.weight" not in state
    assert result.parameters[1] > result.parameters[0]

    # Read by the converter, branch folded in: the perplexity that was reported.
    loaded = load_model(tmp_path / "out")
    assert not branches_of(loaded.model)
    heldout = encode_documents(load_corpus(str(text_file)).heldout, loaded.tokenizer, 2000)
    assert perplexity(loaded.model, heldout, 32).nll == pytest.approx(result.compressed.nll, abs=2e-5)
    # The branch matters: without it the answer is another one.
    bare = {k: v for k, v in state.items() if "low_rank" not in k}
    config["quantization_config"]["linear"].pop("low_rank")
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    save_file(bare, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    without = load_model(tmp_path / "out").model
    tokens = torch.arange(32).unsqueeze(0)
    with torch.no_grad():
        difference = (loaded.model(tokens).logits - without(tokens).logits).abs().max()
    assert difference > 0.05
