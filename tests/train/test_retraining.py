"""Gradual magnitude, AST and CAST: their updates against scalar references, their runs end to end."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from converters.train import loop
from converters.train.ast_trainer import AstRecipe, MaskedLinear, Moments, ast_update, masked_decay_at
from converters.train.calibration import decoder_layers, linears_of
from converters.train.cast import CastRecipe, ScaledLinear, adams_update, check_budget, decay_budget
from converters.train.compress import compress_model
from converters.train.distill import forward_kl
from converters.train.gradual import GradualRecipe, grow_pruned, pruned_share
from converters.train.loading import load_model
from converters.train.recipes import OptimiserRecipe
from vllm_sparse.sparse24 import group_nonzeros, is_24, topk_mask

BETAS = (0.9, 0.95)
SETTINGS = OptimiserRecipe(betas=BETAS, weight_decay=0.1)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments_like(weight: torch.Tensor) -> Moments:
    return Moments(torch.zeros_like(weight), torch.zeros_like(weight))


def test_ast_update_equals_a_scalar_reference():
    weight, steps, lr = random(4, 8) * 0.1, 6, 1e-2
    mask = topk_mask(weight.abs())
    expected = weight.double().clone()
    first, second = torch.zeros(4, 8).double(), torch.zeros(4, 8).double()
    moments = moments_like(weight)
    for t in range(1, steps + 1):
        grad, decay = random(4, 8, seed=t) * 0.01, 0.02 * t
        ast_update(weight, grad, mask, moments, t, lr, decay, SETTINGS)
        for i in range(4):
            for j in range(8):
                w, g = float(expected[i, j]), float(grad[i, j])
                first[i, j] = 0.9 * first[i, j] + 0.1 * g
                u = float(first[i, j]) + (0.0 if mask[i, j] else decay * w)
                second[i, j] = 0.95 * second[i, j] + 0.05 * u * u
                root = math.sqrt(float(second[i, j])) / math.sqrt(1 - 0.95**t) + 1e-8
                expected[i, j] = (1 - lr * 0.1) * w - lr / (1 - 0.9**t) * u / root
    assert torch.allclose(weight.double(), expected, atol=1e-6)
    assert torch.allclose(moments.first.double(), first, atol=1e-8)


def test_ast_decay_moves_pruned_weights_only():
    weight = random(16, 32)
    before, mask, moments = weight.clone(), topk_mask(weight.abs()), moments_like(weight)
    settings = OptimiserRecipe(weight_decay=0.0)
    for t in range(1, 20):
        ast_update(weight, torch.zeros_like(weight), mask, moments, t, 1e-3, 0.1, settings)
    assert torch.equal(weight[mask], before[mask])
    assert torch.all(weight[~mask].abs() < before[~mask].abs())
    assert torch.all(moments.first == 0)


def test_ast_decay_is_annealed():
    recipe = AstRecipe(model="m", masked_decay=2e-4, ramp=0.25, optimiser=OptimiserRecipe(steps=400))
    assert [masked_decay_at(t, recipe) for t in (0, 50, 100, 399)] == pytest.approx([0, 1e-4, 2e-4, 2e-4])


def test_masked_linear_uses_the_mask_and_hands_the_gradient_to_all_weights():
    linear = nn.Linear(8, 4)
    layer = MaskedLinear(linear)
    x = random(5, 8)
    y = layer(x)
    masked = (linear.weight * layer.mask).detach().requires_grad_()
    expected = F.linear(x, masked, linear.bias)
    assert torch.equal(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert torch.allclose(linear.weight.grad, masked.grad)
    assert torch.all(linear.weight.grad[~layer.mask] != 0)
    linear.weight.data[0, :4] = torch.tensor([0.0, 9.0, 0.0, 9.0])
    assert int(layer.refresh()) == int((layer.mask != topk_mask(masked.abs())).sum())
    assert layer.mask[0, :4].tolist() == [False, True, False, True]


def test_adams_update_equals_a_scalar_reference():
    weight, total, lr, pull = random(4, 8) * 0.1, 8, 1e-2, 0.02
    mask = topk_mask(weight.abs())
    expected = weight.double().clone()
    mu, v = torch.zeros(4, 8).double(), torch.zeros(4, 8).double()
    moments = moments_like(weight)
    for t in range(total):
        grad = random(4, 8, seed=t) * 0.01
        adams_update(weight, grad, mask, moments, t, total, lr, pull, BETAS, 1e-8)
        alpha = t / total
        for i in range(4):
            for j in range(8):
                w, g = float(expected[i, j]), float(grad[i, j])
                mu[i, j] = 0.9 * mu[i, j] + 0.1 * g
                tilde = float(mu[i, j])
                if not mask[i, j]:
                    tilde = (1 - alpha) * tilde + alpha * pull * math.copysign(1.0, w)
                v[i, j] = 0.95 * v[i, j] + 0.05 * tilde**2
                step = (tilde / (1 - 0.9 ** (t + 1))) / (
                    math.sqrt(float(v[i, j]) / (1 - 0.95 ** (t + 1))) + 1e-8
                )
                expected[i, j] = w - lr * step
    assert torch.allclose(weight.double(), expected, atol=1e-6)


def test_with_no_gradient_adams_moves_masked_weights_only():
    weight = random(16, 32)
    before, mask, moments = weight.clone(), topk_mask(weight.abs()), moments_like(weight)
    for t in range(1, 20):
        adams_update(weight, torch.zeros_like(weight), mask, moments, t, 20, 1e-3, 0.1, BETAS, 1e-8)
    assert torch.equal(weight[mask], before[mask])
    # The pull covers under 0.06 in all; smaller weights overshoot zero and are pulled back.
    large = ~mask & (before.abs() > 0.06)
    assert torch.all(weight[large].abs() < before[large].abs() - 0.03)
    assert torch.all(weight[~mask & ~large].abs() < 0.06)


@pytest.mark.parametrize(
    ("steps", "budget", "reached"), [(7500, 0.075, True), (1000, 0.010, False)], ids=["enough", "short"]
)
def test_the_decay_budget_predicts_whether_masked_weights_vanish(steps: int, budget: float, reached: bool):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 128, generator=generator) * 0.02
    moments = moments_like(weight)
    settings = OptimiserRecipe(steps=steps, lr=2e-5, warmup=0, min_lr_ratio=1.0)
    assert decay_budget(settings) == pytest.approx(budget, rel=0.01)
    mask = topk_mask(weight.abs())
    largest = float(weight[~mask].abs().max())
    for t in range(steps):
        if t % 10 == 0:
            mask = topk_mask(weight.abs())
        grad = torch.randn(weight.shape, generator=generator) * 1e-6
        adams_update(weight, grad, mask, moments, t, steps, 2e-5, 4e-7, (0.9, 0.999), 1e-8)
    masked = weight[~mask].abs()
    assert (float((masked < 1e-4).float().mean()) > 0.999) == reached
    warning = check_budget(settings, largest)
    assert (warning is not None and "cannot be driven to zero" in warning) == (not reached)
    if reached:
        assert float(masked.mean()) < 4e-5  # the residue is of the order of the final lr


def test_scales_are_merged_after_pruning():
    linear = nn.Linear(8, 4)
    layer = ScaledLinear(linear, 2)
    layer.scale.data.copy_(random(4, 2))
    x = random(3, 8)
    blocks = torch.cat(
        [linear.weight[:, :4] * layer.scale[:, :1], linear.weight[:, 4:] * layer.scale[:, 1:]], 1
    )
    assert torch.allclose(layer(x), F.linear(x, blocks, linear.bias))
    expected = blocks * layer.mask
    assert torch.allclose(layer.sparse_linear(linear).weight, expected)


def test_forward_kl_equals_its_definition():
    student, teacher, temperature = random(2, 3, 5), random(2, 3, 5, seed=1), 2.0
    p = F.softmax(teacher.double() / temperature, -1)
    q = F.softmax(student.double() / temperature, -1)
    expected = (p * (p / q).log()).sum() / 6 * 4
    assert float(forward_kl(student, teacher, temperature)) == pytest.approx(float(expected), rel=1e-5)


def test_groups_are_pruned_gradually_in_the_order_of_their_loss():
    recipe = GradualRecipe(model="m", prune_until=0.5, optimiser=OptimiserRecipe(steps=200))
    assert pruned_share(0, recipe) == 0
    assert pruned_share(50, recipe) == pytest.approx(1 - 0.5**3)
    assert pruned_share(100, recipe) == pruned_share(200, recipe) == 1
    weight = random(8, 32)
    mask = torch.ones_like(weight, dtype=torch.bool)
    half = grow_pruned(weight, mask, 0.5)
    pruned = ~half.reshape(-1, 4).all(-1)
    assert int(pruned.sum()) == 32
    loss = weight.abs().reshape(-1, 4).sort(-1).values[:, :2].sum(-1)
    assert loss[pruned].max() <= loss[~pruned].min()
    full = grow_pruned(weight * half, half, 1.0)
    assert torch.all(full.reshape(-1, 4).sum(-1) == 2)
    assert torch.equal(full.reshape(-1, 4)[pruned], half.reshape(-1, 4)[pruned])


RUN = {"checkpoint_every": 20, "log_every": 5, "device": "cpu"}
# AST and CAST divide by the root of the averaged *first* moment, so they take smaller rates than AdamW.
OPTIMISERS = {
    "gradual": {"steps": 60, "batch_size": 8, "warmup": 3, "lr": 3e-3},
    "ast": {"steps": 60, "batch_size": 8, "warmup": 3, "lr": 5e-4},
    "cast": {"steps": 70, "batch_size": 8, "warmup": 3, "lr": 3e-3},
}


def retrain(method: str, model_dir: Path, text_file: Path, out: Path, **options):
    return compress_model(
        method, model_dir, out, str(text_file), quiet=True, eval_tokens=2000,
        data_options={"sequence_length": 32}, run=RUN, optimiser=OPTIMISERS[method], **options,
    )  # fmt: skip


@pytest.mark.parametrize("method", ["gradual", "ast", "cast"])
def test_retraining_ends_24_and_better_than_one_shot(
    method: str, trained_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    result = retrain(method, trained_dir, text_file, tmp_path / "out")
    loaded = load_model(tmp_path / "out").model
    for layer in decoder_layers(loaded):
        for linear in linears_of(layer).values():
            assert is_24(linear.weight.detach())
            assert float((group_nonzeros(linear.weight.detach()) == 2).float().mean()) > 0.99
    once = compress_model(
        "magnitude", trained_dir, tmp_path / "once", str(text_file), quiet=True, eval_tokens=2000,
        data_options={"sequence_length": 32},
    )  # fmt: skip
    assert result.compressed.nll < once.compressed.nll
    rows = [json.loads(line) for line in (tmp_path / "out" / loop.LOG).read_text().splitlines()]
    assert len(rows) == OPTIMISERS[method]["steps"]
    if method != "gradual":
        assert any(row.get("flip_rate", 0) > 0 for row in rows)

    # Stop after 40 steps, resume: the same curve and the same bytes.
    original = loop._save

    def save_then_stop(objective, directory, done, identity, seconds):
        original(objective, directory, done, identity, seconds)
        if done == 40:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_save", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        retrain(method, trained_dir, text_file, tmp_path / "again")
    monkeypatch.setattr(loop, "_save", original)
    retrain(method, trained_dir, text_file, tmp_path / "again", resume=True)
    logs = [(tmp_path / name / loop.LOG).read_text() for name in ("out", "again")]
    assert logs[0] == logs[1]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert weights[0] == weights[1]


def test_cast_warns_before_a_run_that_cannot_work(
    trained_dir: Path, text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    few = OPTIMISERS["cast"] | {"steps": 5}
    compress_model(
        "cast", trained_dir, tmp_path / "out", str(text_file), quiet=True, eval_tokens=0,
        data_options={"sequence_length": 32}, optimiser=few,
    )  # fmt: skip
    assert "cast: decay budget sum(lr * alpha)" in caplog.text
    recipe = CastRecipe(model="m", optimiser=OptimiserRecipe(steps=5000, lr=1e-2, weight_decay=0.0))
    assert check_budget(recipe.optimiser, 0.1) is None


def test_finetuning_a_pruned_model_keeps_its_zeros(trained_dir: Path, text_file: Path, tmp_path: Path):
    common = {"quiet": True, "eval_tokens": 2000, "data_options": {"sequence_length": 32}}
    pruned = compress_model("magnitude", trained_dir, tmp_path / "m", str(text_file), **common)
    tuned = compress_model(
        "finetune",
        tmp_path / "m",
        tmp_path / "f",
        str(text_file),
        run=RUN,
        optimiser=OPTIMISERS["gradual"],
        **common,
    )
    assert tuned.kind == "2:4"
    assert tuned.compressed.nll < pruned.compressed.nll
    before, after = load_model(tmp_path / "m").model, load_model(tmp_path / "f").model
    for (name, old), (_, new) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        if name.endswith("_proj.weight"):
            assert torch.all(new[old == 0] == 0), name
    assert (
        compress_model("magnitude", tmp_path / "f", tmp_path / "g", str(text_file), **common).compressed
        == tuned.compressed
    )
