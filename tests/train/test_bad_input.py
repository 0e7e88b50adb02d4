"""What a user can get wrong: one paragraph that says so, and nothing lost or half-written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from converters.train import loop
from converters.train.cli import main
from converters.train.models import build_model
from converters.train.saving import save_model
from converters.train.trainer import run_directory

from .conftest import SENTENCES, TINY

SHORT = {"steps": 12, "batch_size": 4, "lr": 1e-2, "warmup": 2}


@pytest.fixture(scope="module")
def dense_dir(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dense") / "model"
    save_model(build_model(TINY["llama"], 300, 0, seed=1), directory, torch.float32, tokenizer)
    return directory


def compress(folder: Path, method: str, model: Path, text: Path, *arguments: str, **options) -> int:
    """Run the command line on a recipe that differs from a sound one in ``options``; None drops a key."""
    values = {
        "method": method,
        "model": str(model),
        "out": str(folder / "out"),
        "data": {"source": str(text), "sequence_length": 32},
        "run": {"device": "cpu", "checkpoint_every": 6, "log_every": 3},
        "eval_tokens": 500,
        "optimiser": SHORT,
        **options,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in values.items() if value is not None}))
    return main(["compress", str(path), *arguments])


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    """What the last command said; it is a paragraph and no traceback."""
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return " ".join(said.split())


@pytest.mark.parametrize("method", ["finetune", "gradual", "ast", "cast", "ddp", "hard-concrete", "maskllm"])
def test_a_data_set_shorter_than_one_sequence(
    method: str, dense_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    text = tmp_path / "short.txt"
    text.write_text(SENTENCES * 3)
    options = {"data": {"source": str(text), "sequence_length": 256, "heldout_fraction": 0.45}}
    options |= {"prior": "magnitude"} if method == "maskllm" else {}
    assert compress(tmp_path, method, dense_dir, text, **options, eval_tokens=0) == 2
    assert "shorter than one sequence of 256" in refused(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["eval", "wanda", "finetune"])
def test_a_tokenizer_of_another_model(
    command: str, tokenizer, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model = tmp_path / "model"
    save_model(build_model(TINY["llama"], 280, 0, seed=1), model, torch.float32, tokenizer)
    if command == "eval":
        assert main(["eval", str(model), "--data", str(text_file), "--context-length", "32"]) == 2
    else:
        trains = {} if command == "finetune" else {"optimiser": None}
        assert compress(tmp_path, command, model, text_file, eval_tokens=0, **trains) == 2
    assert "the model's embedding has 280 rows: the tokenizer files" in refused(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("ddp", {"prune": ["heads"], "sparsity": 0.4}, "each layer keeps at least one"),
        ("hard-concrete", {"sparsity": 0.95}, "sparsity 0.95 would leave 0 of 256 FFN channels"),
        ("magnitude-sp", {"sparsity": 0.95}, "sparsity 0.95 would leave 0 of a layer's 128 FFN channels"),
        ("llm-pruner", {"sparsity": 0.9, "protect_first": 0.5}, "1 + 0 of 2 layers are protected"),
        ("shortgpt", {"sparsity": 0.99}, "layers"),
        ("ddp", {"sparsity": 1.5}, "sparsity: Input should be less than 1"),
        ("ddp", {"budget": "expert"}, "budget: expert is for mixtures of experts; "),
    ],
)
def test_a_sparsity_that_cannot_be_met(
    method: str,
    options: dict,
    message: str,
    dense_dir: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    trains = {} if method in {"ddp", "hard-concrete"} else {"optimiser": None}
    assert compress(tmp_path, method, dense_dir, text_file, **options, **trains) == 2
    assert message in refused(capsys)
    assert not (tmp_path / "out").exists()
    assert not run_directory(tmp_path / "out").exists()


def test_a_loss_that_is_nan_stops_a_run_and_leaves_its_checkpoint(
    dense_dir: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    original = loop._save

    def save_then_break(objective, directory, done, identity, seconds):
        original(objective, directory, done, identity, seconds)
        next(objective.model.parameters()).data.fill_(float("nan"))

    monkeypatch.setattr(loop, "_save", save_then_break)
    assert compress(tmp_path, "finetune", dense_dir, text_file) == 2
    said = refused(capsys)
    assert "the loss is nan at step 6; stopped." in said
    assert "(after 6 steps)" in said
    checkpoint = run_directory(tmp_path / "out") / loop.CHECKPOINT
    assert loop.read_checkpoint(checkpoint)["step"] == 6
    assert not (tmp_path / "out").exists()
    # From there on with a whole model.
    monkeypatch.setattr(loop, "_save", original)
    assert compress(tmp_path, "finetune", dense_dir, text_file, "--resume") == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / loop.LOG).read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(12))


@pytest.mark.parametrize("method", ["ddp", "cast"])
def test_a_resume_with_another_recipe_is_refused_with_the_difference(
    method: str,
    dense_dir: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    original = loop._save

    def save_then_stop(objective, directory, done, identity, seconds):
        original(objective, directory, done, identity, seconds)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_save", save_then_stop)
    assert compress(tmp_path, method, dense_dir, text_file) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")
    assert "checkpoint.pt (after 6 steps). --resume goes on from it." in caplog.text
    monkeypatch.setattr(loop, "_save", original)
    checkpoint = run_directory(tmp_path / "out") / loop.CHECKPOINT
    before = checkpoint.read_bytes()
    other = {"optimiser": SHORT | {"lr": 2e-2}}
    assert compress(tmp_path, method, dense_dir, text_file, "--resume", **other) == 2
    assert "the recipe changed (recipe.optimiser.lr: was 0.01, now 0.02)" in refused(capsys)
    assert checkpoint.read_bytes() == before
    assert compress(tmp_path, method, dense_dir, text_file, "--resume") == 0


def test_overwrite_replaces_a_model_and_nothing_else(
    dense_dir: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    trains = {"optimiser": None}
    assert compress(tmp_path, "magnitude", dense_dir, text_file, **trains) == 0
    first = (out / "compression.json").stat().st_ino
    assert compress(tmp_path, "magnitude", dense_dir, text_file, "--overwrite", **trains) == 0
    assert (out / "compression.json").stat().st_ino != first
    # A folder of other things, and a file.
    for target in (tmp_path / "home", tmp_path / "a.txt"):
        if target.suffix:
            target.write_text("precious")
        else:
            target.mkdir()
            (target / "precious.txt").write_text("precious")
        arguments = ("--overwrite", "--out", str(target))
        assert compress(tmp_path, "magnitude", dense_dir, text_file, *arguments, **trains) == 2
        assert "is no model directory (it has no config.json)" in refused(capsys)
    assert (tmp_path / "home" / "precious.txt").read_text() == "precious"
    assert (tmp_path / "a.txt").read_text() == "precious"
    # The model to compress itself, also under another name.
    (tmp_path / "link").symlink_to(out)
    for model in (out, tmp_path / "link"):
        assert compress(tmp_path, "magnitude", model, text_file, "--overwrite", **trains) == 2
        assert "is the model to be compressed" in refused(capsys)
    # A model that has the one to compress inside.
    shutil.copytree(dense_dir, out / "checkpoint-500")
    assert compress(tmp_path, "magnitude", out / "checkpoint-500", text_file, "--overwrite", **trains) == 2
    assert "which --overwrite would delete with it" in refused(capsys)
    assert (out / "checkpoint-500" / "model.safetensors").is_file()
    assert not list(tmp_path.glob(".*"))


def test_a_link_as_output_stays_a_link(dense_dir: Path, text_file: Path, tmp_path: Path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    for arguments in ((), ("--overwrite",)):
        assert compress(tmp_path, "magnitude", dense_dir, text_file, *arguments, optimiser=None) == 0
        assert (tmp_path / "out").is_symlink()
        assert (tmp_path / "disk" / "model.safetensors").is_file()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("method", ["ddp", "hard-concrete"])
def test_a_family_without_gates(
    method: str, text_file: Path, tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    import transformers

    config = transformers.GPTNeoXConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    model = tmp_path / "neox"
    transformers.GPTNeoXForCausalLM(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    assert compress(tmp_path, method, model, text_file) == 2
    assert "models of type 'gpt_neox' cannot be pruned structurally here; known: llama" in refused(capsys)
    assert not (tmp_path / "out").exists()


def test_a_pattern_that_keeps_nothing_dense_is_refused(
    dense_dir: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    options = {"ignore": ["*.layer.0.*"], "optimiser": None}
    assert compress(tmp_path, "magnitude", dense_dir, text_file, **options) == 2
    assert "ignore has '*.layer.0.*', which matches no module of the model" in refused(capsys)
    # What stays dense anyway may be named.
    options["ignore"] = ["lm_head", "*.layers.0.*"]
    assert compress(tmp_path, "magnitude", dense_dir, text_file, **options) == 0


def test_a_text_that_is_empty_or_one_line(
    dense_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    text = tmp_path / "text.txt"
    for content, said in (("\n", "text.txt is empty"), ("word " * 300, "give a text of several lines")):
        text.write_text(content)
        assert compress(tmp_path, "wanda", dense_dir, text, optimiser=None) == 2
        assert said in refused(capsys)


def test_a_warm_up_longer_than_the_run_is_said(
    dense_dir: Path, text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    assert compress(tmp_path, "finetune", dense_dir, text_file, optimiser={"steps": 2}) == 0
    assert "finetune: optimiser.warmup is 50 of 2 steps, so the learning rate never reaches" in caplog.text


def test_resume_of_a_method_that_does_not_train_is_refused(
    dense_dir: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for extra in ([], ["--dry-run"]):
        assert compress(tmp_path, "wanda", dense_dir, text_file, "--resume", *extra, optimiser=None) == 2
        said = refused(capsys)
        assert "wanda does not train" in said
        assert "gradual, ast, cast, maskllm, pretrain24, ddp, hard-concrete, finetune" in said
        assert "without --resume" in said
    assert not (tmp_path / "out").exists()


def test_resume_without_a_checkpoint_says_that_it_starts_anew(
    dense_dir: Path, text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level("INFO"):
        assert compress(tmp_path, "finetune", dense_dir, text_file, "--resume") == 0
    assert "holds no checkpoint to resume" in caplog.text


def test_a_window_that_is_too_long_says_what_to_pass(
    dense_dir: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
):
    """The default does not fit every model."""
    assert main(["eval", str(dense_dir), "--data", str(text_file)]) == 2
    assert "exceeds the model's 256 positions; pass --context-length 256 or less" in refused(capsys)


def test_int4_of_odd_widths_names_a_linear_and_the_way_out(
    tokenizer, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shape = TINY["llama"].model_copy(update={"intermediate_size": 112})
    save_model(build_model(shape, 300, 0, seed=1), tmp_path / "model", torch.float32, tokenizer)
    assert compress(tmp_path, "requant", tmp_path / "model", text_file, optimiser=None) == 2
    said = refused(capsys)
    assert "mlp.down_proj has 112 input features; requant's int4 needs multiples of 32" in said
    assert "ignore (2 of 14 are)" in said
