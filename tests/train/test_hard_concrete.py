"""Hard-concrete gates: their distribution, the Lagrangian, and a run end to end."""

import json
import math
from pathlib import Path

import pytest
import torch

from converters.train import loop
from converters.train.compress import compress_model
from converters.train.gate_training import GateOptimiser
from converters.train.gates import Units, keep_best
from converters.train.hard_concrete import (
    HardConcreteRecipe,
    StochasticBudget,
    draw_gates,
    final_gates,
    keep_at,
    kept_probability,
)
from converters.train.structured import read_layer_shapes

from .conftest import heldout_perplexity


@pytest.mark.parametrize("beta", [1 / 3, 2 / 3])
@pytest.mark.parametrize("log_alpha", [-3.0, -1.0, 0.0, 2.0])
def test_the_closed_form_is_how_often_draws_are_not_zero(beta: float, log_alpha: float):
    uniform = (torch.arange(200_000) + 0.5) / 200_000
    gates = draw_gates(torch.full_like(uniform, log_alpha), uniform, beta)
    assert float(gates.min()) >= 0
    assert float(gates.max()) <= 1
    closed = kept_probability(torch.tensor(log_alpha), beta)
    assert (gates > 0).float().mean().item() == pytest.approx(closed.item(), abs=1e-4)
    # The paper's form: 1 - sigmoid(beta * logit(1/12) - log_alpha).
    text = 1 - 1 / (1 + math.exp(-(beta * math.log((1 / 12) / (11 / 12)) - log_alpha)))
    assert closed.item() == pytest.approx(text, abs=1e-6)
    # The distribution is symmetric: gates are exactly 1 as often as -log_alpha's are exactly 0.
    mirrored = 1 - kept_probability(torch.tensor(-log_alpha), beta)
    assert (gates == 1).float().mean().item() == pytest.approx(mirrored.item(), abs=1e-4)


def test_gates_at_the_median_and_at_the_end():
    half = torch.tensor([0.5])
    for log_alpha, beta in ((0.0, 2 / 3), (0.5, 2 / 3), (-0.2, 1 / 3)):
        value = torch.tensor([log_alpha])
        expected = 1.2 / (1 + math.exp(-log_alpha / beta)) - 0.1
        assert draw_gates(value, half, beta).item() == pytest.approx(min(1.0, max(0.0, expected)), abs=1e-6)
        final = 1 / (1 + math.exp(-0.8 * log_alpha / beta))
        assert final_gates(value, beta).item() == pytest.approx(final, abs=1e-6)


def test_the_target_ramps_and_the_budget_may_hold_in_every_layer():
    recipe = HardConcreteRecipe(model="m")
    assert [keep_at(step, 0.6, recipe) for step in (0, 100, 200, 900)] == pytest.approx([1.0, 0.8, 0.6, 0.6])
    layered = HardConcreteRecipe(model="m", budget="layer", ramp=0.0)
    budget = StochasticBudget(Units((3, 1)), 0.5, layered, torch.device("cpu"), 0)
    with torch.no_grad():
        budget.z.copy_(torch.tensor([1.0, -1.0, 0.0, -3.0]))
        budget.linear.fill_(1.0)
        budget.quadratic.fill_(6.0)
    p = kept_probability(budget.z, layered.beta)
    gaps = [p[:3].mean() - 0.5, p[3] - 0.5]
    assert budget.loss(0).item() == pytest.approx(sum((g + 6 * g * g).item() for g in gaps) / 2)


@pytest.mark.parametrize("sparsity", [0.2, 0.5])
def test_expected_sparsity_meets_the_target_and_the_unimportant_go(sparsity: float):
    recipe = HardConcreteRecipe(model="m", sparsity=sparsity)
    units = Units((512, 512))
    budget = StochasticBudget(units, 1 - sparsity, recipe, torch.device("cpu"), 0)
    optimiser = GateOptimiser({"channels": budget}, recipe)
    importance = torch.randn(units.total, generator=torch.Generator().manual_seed(1)).exp()
    for step in range(recipe.optimiser.steps):
        budget.draw(step)
        task = (importance * (budget.gate() - 1).square()).mean()
        (task + budget.loss(step)).backward()
        optimiser.step(step)
    assert budget.figures()["soft_sparsity"].item() == pytest.approx(sparsity, abs=0.02)
    assert budget.figures()["lambda2"].item() > 1
    pruned = ~keep_best(budget.z.detach(), units, 1 - sparsity, 1)
    oracle = importance.argsort()[: int(pruned.sum())]
    assert pruned[oracle].float().mean().item() > 0.9


def test_draws_depend_on_seed_kind_and_step_alone():
    recipe = HardConcreteRecipe(model="m", log_alpha=0.0)
    budgets = [StochasticBudget(Units((64,)), 0.5, recipe, torch.device("cpu"), kind) for kind in (0, 0, 1)]
    for budget in budgets:
        budget.draw(3)
    first = budgets[0].gate()
    assert torch.equal(first, budgets[1].gate())
    assert not torch.equal(first, budgets[2].gate())
    budgets[0].draw(4)
    assert not torch.equal(first, budgets[0].gate())


def prune(trained_dir: Path, text_file: Path, out: Path, **options):
    values = {
        "sparsity": 0.5,
        "channel_multiple": 8,
        "prune": ["channels"],
        "optimiser": {
            "steps": 120, "batch_size": 8, "lr": 1e-1, "warmup": 10, "min_lr_ratio": 0.0,
            "betas": [0.9, 0.999], "weight_decay": 0.0,
        },
        "multiplier_lr": 0.1,
        "quadratic_lr": 2.0,
        "run": {"checkpoint_every": 40, "log_every": 10, "device": "cpu"},
    }  # fmt: skip
    return compress_model(
        "hard-concrete", trained_dir, out, str(text_file), quiet=True, eval_tokens=2000,
        data_options={"sequence_length": 32}, **values | options,
    )  # fmt: skip


def test_a_run_prunes_to_the_target_resumes_and_exports_what_it_measured(
    trained_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    result = prune(trained_dir, text_file, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    kept = [shape.intermediate_size for shape in read_layer_shapes(config)]
    assert sum(kept) == 128
    assert all(count % 8 == 0 for count in kept)
    rows = [json.loads(line) for line in (tmp_path / "out" / loop.LOG).read_text().splitlines()]
    assert rows[-1]["channels.soft_sparsity"] == pytest.approx(0.5, abs=0.06)
    assert rows[-1]["channels.lambda2"] > 0
    magnitude = compress_model(
        "structured-ffn", trained_dir, tmp_path / "m", str(text_file), quiet=True, eval_tokens=2000,
        data_options={"sequence_length": 32}, keep_ratio=0.5,
    )  # fmt: skip
    assert result.compressed.tokens == magnitude.compressed.tokens
    assert result.compressed.nll < magnitude.compressed.nll
    again = heldout_perplexity(tmp_path / "out", text_file, 32, 2000)
    assert again == pytest.approx(result.compressed.perplexity, rel=1e-5)

    original = loop._save

    def save_then_stop(objective, directory, done, identity, seconds):
        original(objective, directory, done, identity, seconds)
        if done == 80:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_save", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        prune(trained_dir, text_file, tmp_path / "again")
    monkeypatch.setattr(loop, "_save", original)
    resumed = prune(trained_dir, text_file, tmp_path / "again", resume=True)
    assert resumed.compressed == result.compressed
