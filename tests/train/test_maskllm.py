"""MaskLLM: patterns, prior, the Gumbel softmax, and runs end to end."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from converters.train import loop
from converters.train.calibration import decoder_layers, linears_of
from converters.train.compress import compress_model
from converters.train.loading import load_model
from converters.train.maskllm import (
    PATTERNS,
    MaskLinear,
    between,
    chosen_mask,
    gumbel_noise,
    initial_logits,
    soft_mask,
)
from vllm_sparse.errors import FormatError
from vllm_sparse.sparse24 import group_nonzeros, topk_mask

from .conftest import heldout_perplexity


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_patterns_are_all_ways_to_keep_two_of_four():
    assert PATTERNS.sum(1).tolist() == [2] * 6
    assert len({tuple(row) for row in PATTERNS.tolist()}) == 6


def test_the_prior_lifts_masks_by_their_overlap():
    prior = torch.tensor([[True, True, False, False, False, True, False, True]])
    plain = initial_logits(None, (1, 8), 0.01, 3.0, generator())
    lifted = initial_logits(prior, (1, 8), 0.01, 3.0, generator())
    steps = ((lifted - plain) / (3.0 * plain.std())).round(decimals=4)
    for group, mask in enumerate(prior.float().reshape(2, 4)):
        assert steps[0, group].tolist() == pytest.approx((PATTERNS @ mask - 1).tolist())
    # Three deviations above half-overlapping masks: the start is nearly always the prior itself.
    wide = topk_mask(torch.randn(64, 256, generator=generator(1)))
    start = chosen_mask(initial_logits(wide, (64, 256), 0.01, 3.0, generator(2)))
    assert (start == wide).float().mean() > 0.95


def test_samples_follow_the_categorical_and_harden_as_the_temperature_falls():
    logits = torch.tensor([0.02, -0.01, 0.0, 0.01, -0.02, 0.005]).expand(1, 60_000, 6)
    noise = gumbel_noise(logits.shape, generator(3), torch.device("cpu"))
    hard = soft_mask(logits, noise, 100.0, 0.05, hard=True).reshape(-1, 4)
    assert torch.all(hard.sum(1) == 2)
    index = (hard @ PATTERNS.T).argmax(1)
    expected = torch.softmax(logits[0, 0] * 100.0, -1)
    found = torch.bincount(index, minlength=6) / len(index)
    assert found.tolist() == pytest.approx(expected.tolist(), abs=0.01)
    distances = []
    for temperature in (4.0, 1.0, 0.05):
        soft = soft_mask(logits, noise, 100.0, temperature, hard=False).reshape(-1, 4)
        assert torch.allclose(soft.sum(1), torch.tensor(2.0), atol=1e-5)
        distances.append((soft - hard).abs().mean().item())
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 0.02
    assert [between((4.0, 0.05), t) for t in (0.0, 0.5, 1.0)] == pytest.approx([4.0, 2.025, 0.05])


def test_a_layer_samples_in_training_and_chooses_in_evaluation():
    linear = nn.Linear(8, 3)
    layer = MaskLinear(linear, initial_logits(None, (3, 8), 1.0, 0.0, generator()), hard=True)
    layer.scale, layer.temperature, layer.seed = 1.0, 1.0, 5
    inputs = torch.randn(2, 8, generator=generator(1))
    first = layer(inputs)
    assert torch.equal(first, layer(inputs))
    first.square().sum().backward()
    assert torch.isfinite(layer.logits.grad).all()
    assert float(layer.logits.grad.abs().sum()) > 0
    layer.seed = 6
    assert not torch.equal(first, layer(inputs))
    layer.eval()
    masked = torch.where(chosen_mask(layer.logits), linear.weight, 0)
    assert torch.allclose(layer(inputs), inputs @ masked.T + linear.bias, atol=1e-6)
    assert torch.all(group_nonzeros(layer.sparse_linear(nn.Linear(8, 3)).weight.detach()) == 2)


@pytest.mark.parametrize("hard", [False, True])
def test_learned_masks_find_the_best_of_six(hard: bool):
    """Independent inputs of different sizes: the least output error keeps the two largest |w| * size."""
    weight = torch.randn(16, 32, generator=generator(4))
    sizes = torch.rand(32, generator=generator(5)) * 3 + 0.2
    linear = nn.Linear(32, 16, bias=False)
    linear.weight.data.copy_(weight)
    layer = MaskLinear(linear, initial_logits(None, (16, 32), 0.01, 0.0, generator(6)), hard)
    linear.weight.requires_grad_(False)
    optimiser = torch.optim.Adam([layer.logits], lr=5e-3)
    for step in range(300):
        layer.scale = between((100.0, 500.0), step / 300)
        layer.temperature, layer.seed = between((4.0, 0.05), step / 300), step
        # The expected squared error over inputs with these sizes, in closed form.
        error = (weight * (1 - layer.mask()) * sizes).square().sum()
        error.backward()
        optimiser.step()
        optimiser.zero_grad()
    best = topk_mask(weight.abs() * sizes)
    # Straight-through gradients are those of one sample, and noisier.
    assert (chosen_mask(layer.logits) == best).float().mean() > (0.93 if hard else 0.97)
    assert (topk_mask(weight.abs()) == best).float().mean() < 0.9


def learn(trained_dir: Path, text_file: Path, out: Path, **options):
    values = {
        "prior": "magnitude",
        "optimiser": {"steps": 60, "batch_size": 8, "lr": 2e-3, "warmup": 0},
        "run": {"checkpoint_every": 20, "log_every": 5, "device": "cpu"},
    }
    return compress_model(
        "maskllm", trained_dir, out, str(text_file), quiet=True, eval_tokens=2000,
        data_options={"sequence_length": 32}, **values | options,
    )  # fmt: skip


def test_a_run_beats_its_prior_resumes_and_keeps_weights_as_they_were(
    trained_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    result = learn(trained_dir, text_file, tmp_path / "out")
    magnitude = compress_model(
        "magnitude", trained_dir, tmp_path / "m", str(text_file), quiet=True, eval_tokens=2000,
        data_options={"sequence_length": 32},
    )  # fmt: skip
    assert result.compressed.tokens == magnitude.compressed.tokens
    assert result.compressed.nll < magnitude.compressed.nll
    again = heldout_perplexity(tmp_path / "out", text_file, 32, 2000)
    assert again == pytest.approx(result.compressed.perplexity, rel=1e-5)
    source, saved = load_model(trained_dir).model, load_model(tmp_path / "out").model
    for before, after in zip(decoder_layers(source), decoder_layers(saved), strict=True):
        for name, linear in linears_of(after).items():
            dense = linears_of(before)[name].weight
            assert torch.all(group_nonzeros(linear.weight.detach()) == 2)
            assert torch.equal(linear.weight, torch.where(linear.weight != 0, dense, 0))
    assert torch.equal(saved.model.embed_tokens.weight, source.model.embed_tokens.weight)
    rows = [json.loads(line) for line in (tmp_path / "out" / loop.LOG).read_text().splitlines()]
    assert rows[0]["scale"] == 100
    assert rows[0]["temperature"] == 4
    assert 0 < rows[-1]["changed_since_start"] < 1
    assert rows[-1]["confidence"] > rows[4]["confidence"]

    original = loop._save

    def save_then_stop(objective, directory, done, identity, seconds):
        original(objective, directory, done, identity, seconds)
        if done == 40:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_save", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        learn(trained_dir, text_file, tmp_path / "again")
    monkeypatch.setattr(loop, "_save", original)
    resumed = learn(trained_dir, text_file, tmp_path / "again", resume=True)
    assert resumed.compressed == result.compressed


@pytest.mark.parametrize("prior", ["sparsegpt", "wanda", "none"])
def test_priors_leave_the_weights_alone(prior: str, model_dir: Path, text_file: Path, tmp_path: Path):
    few = {"steps": 2, "batch_size": 2, "warmup": 0}
    ignore = ["*.layers.0.self_attn.*"]
    result = learn(
        model_dir, text_file, tmp_path / "out", prior=prior, samples=8, optimiser=few, ignore=ignore
    )
    source, saved = load_model(model_dir).model, load_model(tmp_path / "out").model
    dense, pruned = source.model.layers[1].mlp.up_proj.weight, saved.model.layers[1].mlp.up_proj.weight
    assert torch.equal(pruned, torch.where(pruned != 0, dense, 0))
    assert torch.equal(
        saved.model.layers[0].self_attn.q_proj.weight, source.model.layers[0].self_attn.q_proj.weight
    )
    if prior != "none":
        compress_model(
            prior, model_dir, tmp_path / "prior", str(text_file), quiet=True, eval_tokens=0, samples=8,
            data_options={"sequence_length": 32}, ignore=ignore,
        )  # fmt: skip
        one_shot = load_model(tmp_path / "prior").model.model.layers[1].mlp.up_proj.weight
        assert ((one_shot != 0) == (pruned != 0)).float().mean() > 0.9
    assert result.kind == "2:4"


def test_bad_recipes_are_refused(model_dir: Path, text_file: Path, tmp_path: Path):
    for options, message in (
        ({"prior": "random"}, "prior: Input should be 'sparsegpt', 'wanda'"),
        ({"temperature": [4.0]}, "temperature"),
        ({"ignore": ["*"]}, "leaves no linear"),
    ):
        with pytest.raises(FormatError, match=message):
            learn(model_dir, text_file, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())
