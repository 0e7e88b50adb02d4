import json
from pathlib import Path

import pytest
import torch

from converters.train import loop
from converters.train.evaluate import perplexity
from converters.train.loading import load_model
from converters.train.loop import CHECKPOINT, LOG, LoopSettings, run_loop
from converters.train.optim import lr_at
from converters.train.packing import PackedBatches
from converters.train.recipes import PRESETS, OptimiserRecipe, TrainRecipe, read_yaml, validate_recipe
from converters.train.trainer import run_directory, train_model
from vllm_sparse.errors import FormatError, NumericsError, UnsupportedError, UserError


@pytest.fixture(scope="module")
def recipe(text_file: Path) -> TrainRecipe:
    values = PRESETS["tiny"].model_dump()
    values["data"] |= {"source": str(text_file), "max_bytes": None, "sequence_length": 32}
    values["optimiser"] |= {"steps": 24, "batch_size": 8, "warmup": 4, "lr": 1e-2}
    values["run"] |= {"checkpoint_every": 8, "log_every": 4, "device": "cpu"}
    return validate_recipe(TrainRecipe, values | {"vocab_size": 300, "eval_tokens": 2048})


@pytest.fixture(scope="module")
def trained(recipe: TrainRecipe, tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("trained") / "model"
    return train_model(recipe, out, quiet=True)


def log_of(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / LOG).read_text().splitlines()]


def test_the_model_learns_and_is_saved_as_measured(trained, recipe: TrainRecipe):
    losses = [row["loss"] for row in log_of(trained.directory)]
    assert len(losses) == recipe.optimiser.steps
    assert losses[-1] < losses[0] - 1.0
    assert trained.evaluation.perplexity < 0.9 * trained.perplexity_unigram
    loaded = load_model(trained.directory)
    assert loaded.dtype == torch.bfloat16
    summary = json.loads((trained.directory / "training.json").read_text())
    assert summary["evaluation"]["perplexity"] == trained.evaluation.perplexity
    assert not list(trained.directory.parent.glob(".*partial*"))


def test_a_resumed_run_repeats_the_loss_curve_bit_for_bit(
    trained, recipe: TrainRecipe, tmp_path: Path, monkeypatch
):
    original = loop._save

    def save_then_stop(objective, directory, done, identity, seconds):
        original(objective, directory, done, identity, seconds)
        if done == 16:
            raise KeyboardInterrupt

    out = tmp_path / "model"
    monkeypatch.setattr(loop, "_save", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        train_model(recipe, out, quiet=True)
    assert not out.exists()
    monkeypatch.setattr(loop, "_save", original)
    with pytest.raises(UserError, match="already holds a run"):
        train_model(recipe, out, quiet=True)
    changed = recipe.model_copy(update={"optimiser": recipe.optimiser.model_copy(update={"lr": 0.5})})
    with pytest.raises(UserError, match=r"recipe\.optimiser\.lr: was 0\.01, now 0\.5"):
        train_model(changed, out, resume=True, quiet=True)
    again = train_model(recipe, out, resume=True, quiet=True)
    assert not run_directory(out).exists()
    assert log_of(out) == log_of(trained.directory)
    assert again.evaluation == trained.evaluation
    weights = (out / "model.safetensors").read_bytes()
    assert weights == (trained.directory / "model.safetensors").read_bytes()


def test_an_existing_output_is_not_touched(trained, recipe: TrainRecipe):
    before = (trained.directory / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="already exists"):
        train_model(recipe, trained.directory, quiet=True)
    assert (trained.directory / "model.safetensors").read_bytes() == before


def test_accumulation_computes_the_same_gradient(recipe: TrainRecipe, trained, tmp_path: Path):
    values = recipe.model_dump()
    values["optimiser"] |= {"accumulation": 4}
    values["run"] |= {"precision": "fp32"}
    split = train_model(validate_recipe(TrainRecipe, values), tmp_path / "split", quiet=True)
    values["optimiser"] |= {"accumulation": 1}
    whole = train_model(validate_recipe(TrainRecipe, values), tmp_path / "whole", quiet=True)
    first = [log_of(r.directory)[:8] for r in (split, whole)]
    assert [row["loss"] for row in first[0]] == pytest.approx([row["loss"] for row in first[1]], abs=2e-4)


class Diverging:
    """Loss becomes NaN at step 13."""

    def __init__(self) -> None:
        self.done = 0

    def step(self, index: int, batch: torch.Tensor) -> dict[str, float]:
        self.done = index + 1
        return {"loss": float("nan") if index == 13 else 1.0}

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]


def test_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path):
    batches = PackedBatches(torch.zeros(8, 4, dtype=torch.long), 2, seed=0)
    settings = LoopSettings(40, log_every=5, checkpoint_every=5, quiet=True)
    with pytest.raises(NumericsError, match=r"nan at step 13; .*checkpoint\.pt \(after 10 steps\)"):
        run_loop(Diverging(), batches, settings, tmp_path, {})
    assert loop.read_checkpoint(tmp_path / CHECKPOINT)["step"] == 10
    assert len(log_of(tmp_path)) == 10


def test_a_damaged_checkpoint_is_named(tmp_path: Path):
    (tmp_path / CHECKPOINT).write_bytes(b"not a checkpoint")
    batches = PackedBatches(torch.zeros(8, 4, dtype=torch.long), 2, seed=0)
    with pytest.raises(FormatError, match=r"checkpoint\.pt is not a readable checkpoint"):
        run_loop(Diverging(), batches, LoopSettings(2, quiet=True), tmp_path, {}, resume=True)


def test_schedule_warms_up_and_decays():
    recipe = OptimiserRecipe(steps=100, warmup=10, lr=1.0, min_lr_ratio=0.1)
    assert lr_at(0, recipe) == pytest.approx(0.1)
    assert lr_at(9, recipe) == pytest.approx(1.0)
    assert lr_at(55, recipe) == pytest.approx(0.55)
    assert lr_at(100, recipe) == pytest.approx(0.1)


def test_recipes_refuse_unknown_keys_and_wrong_values(tmp_path: Path):
    with pytest.raises(FormatError, match=r"optimiser\.learning_rate: unknown key"):
        validate_recipe(TrainRecipe, {"optimiser": {"learning_rate": 1}})
    with pytest.raises(FormatError, match=r"optimiser\.steps: .*found -3"):
        validate_recipe(TrainRecipe, {"optimiser": {"steps": -3}})
    path = tmp_path / "recipe.yaml"
    path.write_text("a: [1\n")
    with pytest.raises(FormatError, match="not YAML"):
        read_yaml(path)
    path.write_text("- 1\n")
    with pytest.raises(FormatError, match="found list"):
        read_yaml(path)


def test_a_gpu_that_is_not_there_is_refused(recipe: TrainRecipe, tmp_path: Path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    run = recipe.run.model_copy(update={"device": "cuda"})
    with pytest.raises(UnsupportedError, match="no CUDA GPU"):
        train_model(recipe.model_copy(update={"run": run}), tmp_path / "x", quiet=True)
    assert not run_directory(tmp_path / "x").exists()


def test_bf16_and_fp32_weights_agree_on_perplexity(trained):
    model = load_model(trained.directory).model
    tokens = torch.randint(0, 300, (512,), generator=torch.Generator().manual_seed(0))
    full = perplexity(model, tokens, 32).nll
    half = perplexity(model.to(torch.bfloat16), tokens, 32).nll
    assert half == pytest.approx(full, rel=0.01)


def test_a_cool_down_branches_off_a_longer_schedule():
    long = OptimiserRecipe(steps=900, lr=1.0, warmup=10)
    short = OptimiserRecipe(steps=500, horizon=900, cooldown=100, lr=1.0, warmup=10)
    assert [lr_at(t, short) for t in range(400)] == [lr_at(t, long) for t in range(400)]
    assert lr_at(450, short) == pytest.approx(lr_at(450, long) / 2)
    assert lr_at(499, short) == pytest.approx(lr_at(499, long) / 100)


def test_held_out_perplexity_joins_the_log(recipe: TrainRecipe, tmp_path: Path):
    changed = recipe.model_copy(update={"run": recipe.run.model_copy(update={"evaluate_every": 10})})
    result = train_model(changed, tmp_path / "m", quiet=True)
    rows = log_of(result.directory)
    assert [row["step"] for row in rows if "heldout_perplexity" in row] == [9, 19]
    assert rows[19]["heldout_perplexity"] < rows[9]["heldout_perplexity"]
    assert result.evaluation.perplexity < rows[19]["heldout_perplexity"]
