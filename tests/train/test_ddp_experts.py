"""DDP on a small Qwen3-MoE: gates multiply where they should, fold exactly, and meet their budget."""

import json
from pathlib import Path

import pytest
import torch

from converters.train.compress import compress_model
from converters.train.ddp_experts import KIND, GatedExperts
from converters.train.expert_channels import ranked
from converters.train.loading import load_model
from converters.train.loop import LOG
from converters.train.moe import keep_channels, moe_layers
from vllm_sparse.errors import FormatError

from .conftest import EXPERTS as MOE_EXPERTS
from .conftest import WIDTH as MOE_WIDTH
from .conftest import heldout_perplexity, make_moe

TOTAL = 2 * MOE_EXPERTS * MOE_WIDTH


@pytest.fixture(scope="module")
def moe_dir(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_moe(tmp_path_factory.mktemp("moe") / "m", tokenizer)


def opened(directory: Path):
    loaded = load_model(directory)
    return loaded.model, moe_layers(loaded.model, loaded.config)


def test_gated_equals_folded_and_sliced(moe_dir: Path):
    model, layers = opened(moe_dir)
    gated = GatedExperts(model, layers)
    assert gated.units.total == TOTAL
    generator = torch.Generator().manual_seed(0)
    # Half of each expert's channels have gates, above and below 1.
    alive = torch.stack(
        [torch.randperm(MOE_WIDTH, generator=generator) < MOE_WIDTH // 2 for _ in range(2 * MOE_EXPERTS)]
    )
    gates = (torch.rand(TOTAL, generator=generator) * 2 + 0.1) * alive.flatten()
    ids = torch.randint(0, 300, (2, 24), generator=generator)
    with torch.no_grad():
        plain = model(ids).logits
        with gated.gated({KIND: gates}):
            expected = model(ids).logits
        assert (expected - plain).abs().max() > 1e-2
        assert torch.equal(model(ids).logits, plain)
        with gated.gated({KIND: torch.ones(TOTAL)}):
            assert torch.allclose(model(ids).logits, plain, atol=1e-5)
        gated.fold(gates)
        assert torch.allclose(model(ids).logits, expected, atol=1e-5)
        for layer, part in zip(layers, gated.units.split(gates), strict=True):
            kept = (part.reshape(MOE_EXPERTS, MOE_WIDTH) > 0).nonzero()[:, 1].reshape(MOE_EXPERTS, -1)
            keep_channels(layer, kept, torch.ones_like(kept, dtype=torch.bool))
        assert torch.allclose(model(ids).logits, expected, atol=1e-5)


def test_only_experts_that_a_token_reaches_have_gradients(moe_dir: Path):
    model, layers = opened(moe_dir)
    model.requires_grad_(False)
    gated = GatedExperts(model, layers)
    gates = torch.ones(TOTAL, requires_grad=True)
    chosen: dict[int, set[int]] = {}
    for layer in layers:
        layer.experts.register_forward_pre_hook(
            lambda _, args, index=layer.index: chosen.__setitem__(index, set(args[1].unique().tolist()))
        )
    with gated.gated({KIND: gates}):
        model(torch.tensor([[5, 6]])).logits.square().sum().backward()
    for layer, part in zip(layers, gated.units.split(gates.grad), strict=True):
        moved = part.reshape(MOE_EXPERTS, MOE_WIDTH).abs().sum(1) > 0
        assert set(moved.nonzero().flatten().tolist()) == chosen[layer.index]


def prune(moe_dir: Path, text_file: Path, out: Path, **options):
    optimiser = {"steps": 60, "batch_size": 4, "lr": 5e-2, "warmup": 5, "min_lr_ratio": 0.1,
                 "betas": (0.9, 0.999), "weight_decay": 0.0}  # fmt: skip
    options = {"sparsity": 0.5, "channel_multiple": 8} | options
    return compress_model(
        "ddp", moe_dir, out, str(text_file), quiet=True, eval_tokens=1000,
        data_options={"sequence_length": 32}, optimiser=optimiser, multiplier_lr=0.2, quadratic_lr=4.0,
        run={"device": "cpu", "precision": "fp32", "log_every": 10}, **options,
    )  # fmt: skip


@pytest.mark.parametrize("budget", ["global", "expert"])
def test_a_run_cuts_the_experts_to_the_target(budget: str, moe_dir: Path, text_file: Path, tmp_path: Path):
    result = prune(moe_dir, text_file, tmp_path / "out", budget=budget)
    widths = result.figures["expert_widths"]
    assert set(widths) == {"0", "2"}
    assert sum(widths.values()) == MOE_WIDTH
    assert all(width % 8 == 0 for width in widths.values())
    if budget == "expert":
        assert set(widths.values()) == {MOE_WIDTH // 2}
    rows = [json.loads(line) for line in (tmp_path / "out" / LOG).read_text().splitlines()]
    assert rows[0][f"{KIND}.soft_sparsity"] < 0.05
    # So few steps do not let gates settle; the final selection is what meets the target.
    assert rows[-1][f"{KIND}.hard_sparsity"] > 0.2
    saved = heldout_perplexity(tmp_path / "out", text_file, 32, 1000)
    assert saved == pytest.approx(result.compressed.perplexity)


def test_a_budget_for_experts_needs_experts(trained_dir: Path, text_file: Path, tmp_path: Path):
    with pytest.raises(FormatError, match="llama has none"):
        prune(trained_dir, text_file, tmp_path / "out", budget="expert")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("multiple", [64, 32])
def test_a_multiple_as_wide_as_the_experts_is_refused(
    multiple: int, moe_dir: Path, text_file: Path, tmp_path: Path
):
    message = f"the experts have {MOE_WIDTH} channels.* channel_multiple {multiple} or all; .* to 16 or less"
    with pytest.raises(FormatError, match=message):
        prune(moe_dir, text_file, tmp_path / "out", channel_multiple=multiple)
    assert not (tmp_path / "out").exists()


def test_ranking_is_what_the_gates_say():
    scores = [torch.tensor([[0.9, 0.1], [0.2, 0.0]]), torch.tensor([[1.0, 0.8], [0.0, 0.0]])]
    kept = ranked(scores, 0.5, "all")
    assert [mask.tolist() for mask in kept] == [
        [[True, False], [True, False]],
        [[True, True], [False, False]],
    ]
