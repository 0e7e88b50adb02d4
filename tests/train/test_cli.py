import json
import re
from pathlib import Path

import pytest

from converters.cli import run
from converters.manifest import check_manifest
from converters.train.cli import main
from converters.train.estimate import estimate, plan_text
from converters.train.methods import METHODS, recipe_for

COMMON = ["--set", "data.sequence_length=32", "--set", "eval_tokens=500"]


def test_eval_prints_the_contracts_json(model_dir: Path, text_file: Path, capsys: pytest.CaptureFixture[str]):
    arguments = [
        "eval",
        str(model_dir),
        "--data",
        str(text_file),
        "--context-length",
        "32",
        "--max-tokens",
        "999",
    ]
    assert run([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"schema", "perplexity", "context_length", "tokens", "nll"}
    assert report["schema"] == "vllm-sparse/eval/1"
    assert report["context_length"] == 32
    assert report["tokens"] == 999 - 32
    assert run(arguments) == 0
    assert f"perplexity {report['perplexity']:.4f} at context length 32" in capsys.readouterr().out


def test_eval_keeps_its_result_with_a_converted_model(
    model_dir: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Compressed, converted, evaluated: the card has method, sparsity, sizes, figures and command."""
    compressed, packed = tmp_path / "compressed", tmp_path / "packed"
    make = ["compress", "--method", "magnitude", "--model", str(model_dir), "--data", str(text_file), *COMMON]
    assert run([*make, "--out", str(compressed)]) == 0
    convert = ["convert", str(compressed), str(packed), "--weights", "int8"]
    assert run(convert) == 0
    before = (packed / "README.md").read_text()
    capsys.readouterr()
    line = ["eval", str(packed), "--data", str(text_file), "--context-length", "32", "--max-tokens", "999"]
    assert run([*line, "--save", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert json.loads((packed / "eval.json").read_text()).items() >= report.items()
    card = (packed / "README.md").read_text()
    assert "| this checkpoint |" not in before
    assert f"| this checkpoint | {report['perplexity']:.4f} | 32 |" in card
    assert re.search(r"\| before compression \| \d+\.\d{4} \| 32 \|", card)
    assert "Pruned with `magnitude`" in card
    assert re.search(r"\| zeros in linear weights \| [5-6]\d\.\d\d % \|", card)
    assert re.search(r"\| tensors after \| .* of before\) \|", card)
    assert f"vllm-sparse {' '.join(convert[:3])} --to sparse24 --weights int8" in card
    assert card.count("## Evaluation") == 1
    assert check_manifest(packed) == []
    assert run(["eval", str(compressed), "--data", str(text_file), "--context-length", "32", "--save"]) == 0
    assert (compressed / "eval.json").is_file()


def test_compress_with_options_and_with_a_recipe_agree(
    model_dir: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    base = ["compress", "--method", "magnitude", "--model", str(model_dir), "--data", str(text_file), *COMMON]
    assert run([*base, "--out", str(tmp_path / "a"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kind"] == "2:4"
    assert report["compressed"]["schema"] == "vllm-sparse/eval/1"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"method: magnitude\nmodel: {model_dir}\nout: {tmp_path / 'b'}\neval_tokens: 500\n"
        f"data:\n  source: {text_file}\n  sequence_length: 32\n"
    )
    assert run(["compress", str(recipe)]) == 0
    assert "held-out perplexity" in capsys.readouterr().out
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


def test_dry_run_plans_and_writes_nothing(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = ["compress", "--method", "sparsegpt", "--model", str(model_dir), "--out", str(tmp_path / "x")]
    assert run([*arguments, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["estimate"]["tokens"] == 128 * 512
    assert plan["estimate"]["memory_gib"] > 0
    assert plan["estimate"]["seconds"] > 0
    assert plan["recipe"]["damping"] == 0.01
    assert run([*arguments, "--dry-run"]) == 0
    assert "GiB of memory" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compress", "--method", "nope"], "method is 'nope'"),
        (["compress"], "no method is named"),
        (["compress", "--method", "wanda"], "model: missing"),
        (
            ["compress", "--method", "wanda", "--model", "/absent", "--out", "/tmp/never"],
            "no such folder",
        ),
        (["compress", "--method", "wanda", "--model", "m", "--set", "run.sed=1"], "run.sed: unknown key"),
        (["compress", "--method", "wanda", "--model", "m", "--set", "oops"], "write KEY=VALUE"),
        (["compress", "/absent.yaml"], "cannot read recipe"),
        (["eval", "/absent"], "no such folder"),
    ],
)
def test_bad_input_is_one_paragraph_and_exit_2(arguments, message, capsys: pytest.CaptureFixture[str]):
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("method: magnitude\nmodel: m\ndata: notes.txt\n", ["--data", "stdlib"], "data` is 'notes.txt'"),
        ("method: [ast]\nmodel: m\n", [], "method is ['ast']"),
        ("method: ast\nmodel: m\nrun: {seed: 12345678901234567}\n", [], "run.seed: Input should be less"),
        ("method: ast\nmodel: m\nrun: {seed: -1}\n", [], "run.seed: Input should be greater"),
    ],
)
def test_values_of_the_wrong_kind_are_one_paragraph_too(
    recipe: str, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    assert run(["compress", str(path), *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("device", ["meta", "mps", "tpu9"])
def test_a_device_that_nothing_runs_on_is_refused(
    device: str, model_dir: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(["eval", str(model_dir), "--data", str(text_file), "--device", device]) == 2
    assert "use auto, cpu or cuda" in capsys.readouterr().err


def test_train_compress_eval_through_the_module(
    tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        "model: {hidden_size: 64, intermediate_size: 128, num_layers: 2, num_heads: 2, num_kv_heads: 1}\n"
        "vocab_size: 300\neval_tokens: 1000\nsave_dtype: float32\n"
        "data: {sequence_length: 32}\noptimiser: {steps: 30, batch_size: 8, warmup: 5, lr: 0.01}\n"
    )
    out = tmp_path / "model"
    assert (
        main(["train", str(recipe), "--out", str(out), "--data", str(text_file), "--steps", "8", "--json"])
        == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert report["tokens"] == 8 * 8 * 32
    assert report["evaluation"]["perplexity"] < 300
    assert main(["train", str(recipe), "--out", str(out), "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["optimiser"]["steps"] == 30
    assert main(["train", "--preset", "huge", "--out", str(out)]) == 2
    assert "demo-qwen3" in capsys.readouterr().err
    assert main(["compress", "--list"]) == 0
    assert "sparsegpt" in capsys.readouterr().out


def test_several_processes_are_refused(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = ["compress", "--method", "magnitude", "--model", str(model_dir), "--out", str(tmp_path / "x")]
    assert run(arguments) == 2
    assert "one of 2 processes" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_plan_counts_the_passes_of_the_path_integral(model_dir: Path, tmp_path: Path):
    def plan(method: str, **options):
        values = {"method": method, "model": str(model_dir), "out": str(tmp_path / "x"), "samples": 16}
        return estimate(recipe_for(values | options))

    once = plan("llm-pruner")
    whole = plan("requant", points=8, detach_steps=2)
    assert whole.tokens == 24 * once.tokens
    assert plan("requant", points=8, significant=0).tokens == 8 * once.tokens
    assert whole.memory_gib > once.memory_gib


def test_a_family_with_other_names_can_be_planned(tmp_path: Path):
    """GPT-2 calls the hidden size n_embd."""
    import transformers

    config = transformers.GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "m")
    recipe = recipe_for({"method": "magnitude", "model": str(tmp_path / "m"), "out": str(tmp_path / "x")})
    assert estimate(recipe).parameters > 300 * 32


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_can_be_planned(method: str, model_dir: Path, tmp_path: Path):
    recipe = recipe_for({"method": method, "model": str(model_dir), "out": str(tmp_path / "x")})
    figures = estimate(recipe)
    assert figures.seconds > 0
    assert figures.memory_gib >= 4 * figures.parameters / 2**30
    assert (figures.tokens > 0) == (hasattr(recipe, "samples") or hasattr(recipe, "optimiser"))
    assert method in plan_text(recipe, figures)


def test_ctrl_c_is_said_and_has_its_exit_code(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("converters.train.compress.load_model", interrupt)
    arguments = ["compress", "--method", "magnitude", "--model", str(model_dir), "--out", str(tmp_path / "x")]
    assert run(arguments) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")
    assert not list(tmp_path.iterdir())
