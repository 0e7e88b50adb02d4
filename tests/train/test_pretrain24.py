"""2:4 pre-training: transposable masks, unbiased gradients, S-STE, the search of lambda, and runs."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from converters.train import loop
from converters.train.calibration import decoder_layers, linears_of
from converters.train.compress import compress_model
from converters.train.gated import GatedFfn, gated_reference
from converters.train.loading import load_model
from converters.train.models import build_model
from converters.train.mvue import inclusion_probabilities, mvue24, padded
from converters.train.pretrain24 import (
    Pretrain24Recipe,
    PretrainLinear,
    add_masked_decay,
    choose_decay,
    flip_rate,
    rescale,
    soft_threshold,
)
from converters.train.saving import save_model
from converters.train.sparse_products import SparseProduct, SparseProducts
from converters.train.transposable import patterns, transposable_mask
from vllm_sparse.errors import FormatError
from vllm_sparse.sparse24 import group_nonzeros, is_24

from .conftest import TINY, heldout_perplexity


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_there_are_ninety_patterns_two_ones_in_every_row_and_column():
    blocks = patterns()
    assert len(blocks) == 90
    assert len({tuple(block.flatten().tolist()) for block in blocks}) == 90
    assert torch.all(blocks.sum(1) == 2)
    assert torch.all(blocks.sum(2) == 2)


def test_transposable_masks_are_optimal_by_brute_force(monkeypatch: pytest.MonkeyPatch):
    # Strips of 4 rows, so that their borders are tested.
    monkeypatch.setattr("converters.train.transposable._SCRATCH_SCORES", 1)
    weight = torch.randn(12, 20, generator=generator())
    mask = transposable_mask(weight)
    assert torch.all(group_nonzeros(mask.float()) == 2)
    assert torch.all(group_nonzeros(mask.T.contiguous().float()) == 2)
    rows = [bits for bits in itertools.product((0, 1), repeat=4) if sum(bits) == 2]
    for i, j in itertools.product(range(0, 12, 4), range(0, 20, 4)):
        block = weight[i : i + 4, j : j + 4].abs().double()
        best = 0.0
        for choice in itertools.product(rows, repeat=4):
            picked = torch.tensor(choice)
            if torch.all(picked.sum(0) == 2):
                best = max(best, float((block * picked).sum()))
        assert float(block[mask[i : i + 4, j : j + 4]].sum()) == pytest.approx(best, rel=1e-6)
    assert torch.equal(mask.T, transposable_mask(weight.T))
    with pytest.raises(FormatError, match="multiples of 4; found \\[6, 8\\]"):
        transposable_mask(torch.ones(6, 8))
    with pytest.raises(FormatError, match="holds NaN"):
        transposable_mask(torch.full((4, 4), float("nan")))


def test_gradient_pruning_is_unbiased_and_two_of_four():
    values = torch.tensor([[1.0, -2.0, 0.5, 3.0, 0.01, -0.02, 5.0, 0.0]])
    draws = 40_000
    pruned = mvue24(values.expand(draws, 8), generator(1))
    assert int(group_nonzeros(pruned).max()) == 2
    # A drawn zero stays a zero: the last group shows one number at times.
    assert torch.all(group_nonzeros(pruned)[:, 0] == 2)
    p = inclusion_probabilities(values.reshape(1, 2, 4))
    assert p.sum(-1).flatten().tolist() == pytest.approx([2.0, 2.0], rel=1e-5)
    assert float(p.max()) <= 1 + 1e-6
    frequency = (pruned != 0).double().mean(0)
    error = pruned.double().mean(0) - values[0].double()
    # x/p with probability p has variance x^2 (1 - p) / p; four standard errors.
    variance = values.double().square().flatten() * (1 - p.double().flatten()) / p.double().flatten()
    bound = 4 * (variance / draws).sqrt() + 1e-5
    assert torch.all(error.abs() < bound), (error, bound)
    assert frequency[:7].tolist() == pytest.approx(p.flatten()[:7].tolist(), abs=0.012)
    # Size matters: what is large is nearly always kept.
    assert frequency[6] > 0.98


def test_zeros_and_huge_ranges_stay_finite():
    values = torch.tensor([[0.0, 0.0, 0.0, 0.0, 1e30, 1.0, 1e-30, 0.0, 3e4, 3e4, 3e4, 3e4]])
    pruned = mvue24(values, generator(2))
    assert torch.isfinite(pruned).all()
    assert int(group_nonzeros(pruned).max()) <= 2
    assert pruned[0, 4].item() == pytest.approx(1e30, rel=1e-5)
    half = mvue24(values[:, 8:].half(), generator(3))
    assert half.dtype == torch.float16
    assert sorted(half[0].tolist()) == [0.0, 0.0, 60_000.0, 60_000.0]
    assert padded(torch.ones(2, 6), 4).shape == (2, 8)


def test_a_sparse_step_multiplies_as_the_paper_says():
    weight = torch.randn(8, 12, generator=generator(4))
    mask = transposable_mask(weight)
    sparse = weight * mask
    inputs = torch.randn(6, 12, generator=generator(5))
    grad = torch.randn(6, 8, generator=generator(6))
    for prune in (False, True):
        x, latent = inputs.clone().requires_grad_(), weight.clone().requires_grad_()
        products = SparseProducts.of(sparse, True, prune, False)
        y = SparseProduct.apply(x, latent, products, 9)
        assert torch.allclose(y, inputs @ sparse.T, atol=1e-6)
        y.backward(grad)
        assert torch.allclose(x.grad, grad @ sparse, atol=1e-6)
        if not prune:
            # Straight through: dW reaches every weight, kept or not.
            assert torch.allclose(latent.grad, grad.T @ inputs, atol=1e-6)
    total = torch.zeros(8, 12, dtype=torch.float64)
    products = SparseProducts.of(sparse, True, True, False)
    samples = torch.stack(
        [products.weight_gradient(grad, inputs, generator(seed)).double() for seed in range(1500)]
    )
    total = samples.mean(0) - (grad.T @ inputs).double()
    assert torch.all(total.abs() < 5 * samples.std(0) / 1500**0.5 + 1e-6)
    pruned = SparseProducts.of(sparse, False, True, True)
    inner = torch.stack([pruned.input_gradient(grad, generator(seed)).double() for seed in range(1500)])
    gap = inner.mean(0) - (grad @ sparse).double()
    assert torch.all(gap.abs() < 5 * inner.std(0) / 1500**0.5 + 1e-6)


def test_masked_decay_and_flips_are_their_formulas():
    grad, weight = torch.ones(2, 4), torch.tensor([[1.0, -2.0, 3.0, -4.0], [4.0, 3.0, 2.0, 1.0]])
    mask = torch.tensor([[False, True, True, False], [True, True, False, False]])
    add_masked_decay(grad, weight, mask, 0.5)
    assert grad.tolist() == [[1.5, 1.0, 1.0, -1.0], [1.0, 1.0, 2.0, 1.5]]
    other = mask.clone()
    other[0] = ~other[0]
    assert flip_rate(mask, other).item() == pytest.approx(0.5)


def test_lambda_is_the_smallest_accepted_or_the_nearest(caplog: pytest.LogCaptureFixture):
    assert choose_decay({1e-5: 1.0, 1e-4: 0.9, 1e-3: 0.7, 1e-2: 0.1}) == 1e-4
    assert not caplog.records
    assert choose_decay({1e-5: 1.2, 1e-4: 1.0, 1e-3: 0.2}) == 1e-4
    assert "no lambda of the grid" in caplog.text


def test_s_ste_is_continuous_and_two_of_four():
    weight = torch.tensor([[1.0, -2.0, 0.5, 3.0], [-1.0, 1.0, 1.0, -1.0]])
    assert soft_threshold(weight).tolist() == [[0.0, -1.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0]]
    big = torch.randn(64, 64, generator=generator(7))
    shrunk = soft_threshold(big)
    second = big.abs().reshape(-1, 4).sort(-1).values[:, 1:2]
    expected = big.reshape(-1, 4).sign() * (big.reshape(-1, 4).abs() - second).clamp(min=0)
    assert torch.allclose(shrunk, expected.reshape(64, 64))
    assert torch.all(group_nonzeros(shrunk) == 2)
    beta = rescale(big)
    # Least squares: the residual is orthogonal to S(w).
    assert ((big - beta * shrunk) * shrunk).sum().abs() < 1e-3
    # A small move of the weight moves S(w) by at most twice as much, also where the mask flips.
    moved = soft_threshold(big + 1e-3 * torch.randn(64, 64, generator=generator(8)).clamp(-1, 1))
    assert (moved - shrunk).abs().max() <= 2e-3 + 1e-6


def test_a_sparse_linear_is_dense_in_the_tail_and_repacks_every_step():
    linear = nn.Linear(16, 8)
    layer = PretrainLinear(linear, "transposable", prune_gradients=False)
    inputs = torch.randn(3, 16, generator=generator(9))
    layer.begin_step(1)
    first = layer(inputs)
    with torch.no_grad():
        assert torch.allclose(first, layer(inputs), atol=1e-6)
        assert torch.allclose(
            first, nn.functional.linear(inputs, layer.sparse_weight(), linear.bias), atol=1e-6
        )
        layer.weight.mul_(2.0)
    assert torch.equal(layer(inputs), first)
    layer.begin_step(2)
    assert not torch.equal(layer(inputs), first)
    layer.dense = True
    assert torch.equal(layer(inputs), linear(inputs))


def test_the_gated_ffn_is_the_families_own(model_dir: Path):
    model = load_model(model_dir).model
    mlp = model.model.layers[0].mlp
    inputs = torch.randn(2, 5, 64, generator=generator(10))
    with torch.no_grad():
        assert torch.equal(GatedFfn(mlp, "silu")(inputs), mlp(inputs))
    gate, up = torch.randn(2, 7, 8, generator=generator(11))
    expected = nn.functional.gelu(gate, approximate="tanh") * up
    assert torch.equal(gated_reference(gate, up, "gelu_tanh"), expected)


@pytest.fixture(scope="module")
def small_dir(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained Llama of two layers."""
    directory = tmp_path_factory.mktemp("small") / "model"
    save_model(
        build_model(TINY["llama"], 300, tokenizer.eos_token_id, seed=1), directory, torch.float32, tokenizer
    )
    return directory


def pretrain(model: Path, text_file: Path, out: Path, **options):
    values = {
        "optimiser": {"steps": 60, "batch_size": 16, "lr": 1e-2, "warmup": 10},
        "masked_decay": 1e-3,
        "refresh": 5,
        "eval_tokens": 2000,
        "run": {"checkpoint_every": 20, "log_every": 5, "device": "cpu", "precision": "fp32"},
    }
    return compress_model(
        "pretrain24", model, out, str(text_file), quiet=True,
        data_options={"sequence_length": 32}, **values | options,
    )  # fmt: skip


def test_a_run_learns_ends_dense_and_resumes(
    small_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    search = {"masked_decay": None, "decay_grid": [1e-3, 1e-1], "search_steps": 11}
    result = pretrain(small_dir, text_file, tmp_path / "out", **search)
    assert result.compressed.perplexity < 60 < result.dense.perplexity
    saved = load_model(tmp_path / "out").model
    assert not any(is_24(m.weight.detach()) for m in linears_of(decoder_layers(saved)[0]).values())
    again = heldout_perplexity(tmp_path / "out", text_file, 32, 2000)
    assert again == pytest.approx(result.compressed.perplexity, rel=1e-5)
    assert result.figures["masked_decay"] in (1e-3, 1e-1)
    assert set(result.figures["flip_rate_ratios"]) == {"0.001", "0.1"}
    rows = [json.loads(line) for line in (tmp_path / "out" / loop.LOG).read_text().splitlines()]
    flips = {row["step"]: row["flip_rate"] for row in rows if "flip_rate" in row}
    assert sorted(flips) == list(range(0, 50, 5))
    assert flips[0] == 0 < flips[45] < flips[5]
    assert [row["dense"] for row in rows] == [0.0] * 50 + [1.0] * 10

    original = loop._save

    def save_then_stop(objective, directory, done, identity, seconds):
        original(objective, directory, done, identity, seconds)
        if done == 40:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_save", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        pretrain(small_dir, text_file, tmp_path / "again", **search)
    monkeypatch.setattr(loop, "_save", original)
    resumed = pretrain(small_dir, text_file, tmp_path / "again", resume=True, **search)
    assert resumed.compressed == result.compressed
    assert resumed.figures["masked_decay"] == result.figures["masked_decay"]


def test_stronger_decay_flips_less(small_dir: Path, text_file: Path, tmp_path: Path):
    last = {}
    for decay in (0.0, 1.0):
        pretrain(small_dir, text_file, tmp_path / f"{decay}", masked_decay=decay, eval_tokens=0)
        rows = [json.loads(line) for line in (tmp_path / f"{decay}" / loop.LOG).read_text().splitlines()]
        last[decay] = sum(row.get("flip_rate", 0.0) for row in rows)
    assert last[1.0] < 0.5 * last[0.0]


@pytest.mark.parametrize("options", [{"rule": "s-ste", "masked_decay": None}, {"dense_tail": 0.0}])
def test_without_a_tail_the_served_ffn_is_two_of_four(
    options: dict[str, object], small_dir: Path, text_file: Path, tmp_path: Path
):
    few = {"steps": 30, "batch_size": 16, "lr": 1e-2, "warmup": 5}
    result = pretrain(small_dir, text_file, tmp_path / "out", start="model", optimiser=few, **options)
    assert result.kind == "2:4"
    saved = load_model(tmp_path / "out").model
    for layer in decoder_layers(saved):
        for name, linear in linears_of(layer).items():
            assert is_24(linear.weight.detach()) == name.startswith("mlp")
    again = heldout_perplexity(tmp_path / "out", text_file, 32, 2000)
    assert again == pytest.approx(result.compressed.perplexity, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "s-ste"}, "s-ste has no masked_decay"),
        ({"masked_decay": None, "search_steps": 5}, "must exceed refresh"),
        ({"masked_decay": None, "search_steps": 55}, "exceeds the 50 sparse steps"),
        ({"masked_decay": None, "decay_grid": [0.0]}, "all above 0"),
        ({"dense_tail": 1.0}, "dense_tail"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(
    options: dict[str, object], message: str, small_dir: Path, text_file: Path, tmp_path: Path
):
    with pytest.raises(FormatError, match=message):
        pretrain(small_dir, text_file, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_the_default_recipe_trains_ffns_and_ends_dense():
    recipe = Pretrain24Recipe(model="m")
    assert recipe.ignore == ("*.self_attn.*",)
    assert recipe.tail_start == 1000 - 167
    assert Pretrain24Recipe(model="m", rule="s-ste").tail_start == 1000
