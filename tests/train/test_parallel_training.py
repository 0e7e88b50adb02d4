"""torchrun with two gloo ranks: FSDP2 gives the single-process run, bit for bit.

The single process computes each batch in two parts, as the two ranks do. Halves are then summed in the same
order and scaled by powers of two, so nothing rounds differently; more ranks would differ in the last bits.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from converters.train import parallel, sharded_checkpoint
from converters.train.cli import main
from converters.train.loading import load_model
from converters.train.loop import LOG, LoopSettings, run_loop
from converters.train.packing import PackedBatches
from converters.train.recipes import OptimiserRecipe
from converters.train.sharded_checkpoint import POINTER, read_pointer
from converters.train.trainer import run_directory
from vllm_sparse.errors import FormatError

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("parallel_worker.py")
STEPS = 12
OPTIONS = {
    "ast": {"slorb": {"block": 16}},
    "cast": {},
    "gradual": {},
    "finetune": {},
    "ddp": {"channel_multiple": 8, "sparsity": 0.5},
    "hard-concrete": {"channel_multiple": 8, "sparsity": 0.5},
}


def recipe_file(folder: Path, method: str, model: Path, text: Path, accumulation: int) -> Path:
    path = folder / f"{method}-{accumulation}.yaml"
    optimiser = {"steps": STEPS, "batch_size": 4, "lr": 2e-3, "warmup": 2, "accumulation": accumulation}
    values = {
        "method": method,
        "model": str(model),
        "data": {"source": str(text), "sequence_length": 32},
        "optimiser": optimiser,
        "run": {"device": "cpu", "precision": "fp32", "checkpoint_every": 6, "log_every": 3},
        "eval_tokens": 1000,
        "save_dtype": "float32",
        **OPTIONS[method],
    }
    path.write_text(yaml.safe_dump(values))
    return path


def torchrun(arguments: list[str], stop: int = 0) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "STOP_AFTER_STEP": str(stop),
    }
    return subprocess.run(
        [*launch, str(WORKER), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def alone(arguments: list[str]) -> None:
    """The same command in one process with one thread, as each rank has."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-m", "converters.train", *arguments],
        env=environment,
        capture_output=True,
        timeout=600,
        check=True,
    )


def assert_same(one: Path, two: Path) -> None:
    rows = [json.loads(line) for line in (one / LOG).read_text().splitlines()]
    assert len(rows) == STEPS
    assert (one / LOG).read_text() == (two / LOG).read_text()
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    reports = [json.loads((folder / "compression.json").read_text()) for folder in (one, two)]
    assert reports[0]["compressed"] == reports[1]["compressed"]


@pytest.mark.slow
def test_two_ranks_stop_resume_and_equal_one_process(trained_dir: Path, text_file: Path, tmp_path: Path):
    """AST with SLoRB: losses, flip rates, masks, weights; the checkpoint is sharded and complete."""
    one, two = tmp_path / "one", tmp_path / "two"
    alone(["compress", str(recipe_file(tmp_path, "ast", trained_dir, text_file, 2)), "--out", str(one)])
    halves = recipe_file(tmp_path, "ast", trained_dir, text_file, 1)
    arguments = ["compress", str(halves), "--out", str(two)]
    stopped = torchrun(arguments, stop=6)
    assert stopped.returncode != 0
    run = run_directory(two)
    pointer = read_pointer(run)
    assert pointer is not None
    assert pointer["step"] == 6
    shards = sorted(path.name for path in (run / pointer["folder"]).glob("*.distcp"))
    assert shards == ["__0_0.distcp", "__1_0.distcp"]
    assert not two.exists()
    resumed = torchrun([*arguments, "--resume"])
    assert resumed.returncode == 0, resumed.stderr
    assert_same(one, two)
    assert not run.exists()


@pytest.mark.slow
def test_an_error_of_two_ranks_is_printed_once(tmp_path: Path):
    done = torchrun(
        ["compress", "--method", "finetune", "--model", str(tmp_path / "no"), "--out", str(tmp_path / "x")]
    )
    assert done.stderr.count("error: no such folder") == 1
    assert done.stderr.count("exitcode  : 2 ") == 2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cast", "gradual", "finetune", "ddp", "hard-concrete"])
def test_two_ranks_equal_one_process(method: str, trained_dir: Path, text_file: Path, tmp_path: Path):
    model = trained_dir
    if method == "finetune":
        # Its masks are the zeros of a pruned model.
        model = tmp_path / "pruned"
        assert main(["compress", "--method", "magnitude", "--model", str(trained_dir), "--data",
                     str(text_file), "--out", str(model), "--set", "eval_tokens=0"]) == 0  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    alone(["compress", str(recipe_file(tmp_path, method, model, text_file, 2)), "--out", str(one)])
    done = torchrun(["compress", str(recipe_file(tmp_path, method, model, text_file, 1)), "--out", str(two)])
    assert done.returncode == 0, done.stderr
    assert_same(one, two)


@pytest.mark.slow
def test_dropout_on_two_ranks_goes_on_after_a_stop(trained_dir: Path, text_file: Path, tmp_path: Path):
    model = tmp_path / "model"
    shutil.copytree(trained_dir, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.2}))
    recipe = str(recipe_file(tmp_path, "finetune", model, text_file, 1))
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    done = torchrun(["compress", recipe, "--out", str(unbroken)])
    assert done.returncode == 0, done.stderr
    assert torchrun(["compress", recipe, "--out", str(broken)], stop=6).returncode != 0
    resumed = torchrun(["compress", recipe, "--out", str(broken), "--resume"])
    assert resumed.returncode == 0, resumed.stderr
    assert_same(unbroken, broken)


@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_is_resumed_by_one(trained_dir: Path, text_file: Path, tmp_path: Path):
    one, two = tmp_path / "one", tmp_path / "two"
    halves = str(recipe_file(tmp_path, "cast", trained_dir, text_file, 2))
    alone(["compress", halves, "--out", str(one)])
    assert torchrun(["compress", halves, "--out", str(two)], stop=6).returncode != 0
    assert (run_directory(two) / POINTER).exists()
    alone(["compress", halves, "--out", str(two), "--resume"])
    rows = [[json.loads(line)["loss"] for line in (d / LOG).read_text().splitlines()] for d in (one, two)]
    # The first half was summed over four parts, two on each rank.
    assert rows[0] == pytest.approx(rows[1], rel=1e-5)
    for (name, a), (_, b) in zip(
        load_model(one).model.named_parameters(), load_model(two).model.named_parameters(), strict=True
    ):
        assert (a != 0).equal(b != 0), name
        # Adam turns rounding into a step where a gradient is all but zero; this is a twentieth of one step.
        assert a.sub(b).abs().max() < 1e-4, name


@pytest.mark.slow
def test_pre_training_on_two_ranks_equals_one_process(text_file: Path, tmp_path: Path):
    values = {
        "model": {"hidden_size": 64, "intermediate_size": 128, "num_layers": 2, "num_heads": 2,
                  "num_kv_heads": 1, "max_positions": 64},
        "vocab_size": 300,
        "data": {"source": str(text_file), "sequence_length": 32},
        "run": {"device": "cpu", "precision": "fp32", "checkpoint_every": 6, "log_every": 3,
                "evaluate_every": 6},
        "eval_tokens": 1000,
        "save_dtype": "float32",
    }  # fmt: skip
    logs = []
    for accumulation in (2, 1):
        optimiser = {"steps": STEPS, "batch_size": 4, "lr": 5e-3, "warmup": 2, "accumulation": accumulation}
        path, out = tmp_path / f"{accumulation}.yaml", tmp_path / f"out{accumulation}"
        path.write_text(yaml.safe_dump({**values, "optimiser": optimiser}))
        if accumulation == 2:
            alone(["train", str(path), "--out", str(out)])
        else:
            done = torchrun(["train", str(path), "--out", str(out)])
            assert done.returncode == 0, done.stderr
        logs.append((out / LOG).read_text())
    assert logs[0] == logs[1]
    assert json.loads(logs[0].splitlines()[5])["heldout_perplexity"] > 1


class Counting:
    """An objective whose state is the steps it has done."""

    def __init__(self) -> None:
        self.done = torch.zeros(1)
        self.seen: list[int] = []

    def step(self, index: int, batch: torch.Tensor) -> dict[str, float]:
        self.seen.append(index)
        self.done += 1
        return {"loss": 1.0}

    def optimisers(self) -> list[torch.optim.Optimizer]:
        return []

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.done = state["done"]


def test_what_one_process_goes_on_to_do_counts_over_the_ranks_older_checkpoint(tmp_path: Path):
    """A run of two ranks, resumed by one process, interrupted, and resumed again."""
    batches = PackedBatches(torch.zeros(8, 4, dtype=torch.long), 2, seed=0)
    ranks = Counting()
    ranks.done += 4
    about = {"format_version": 1, "step": 4, "seconds": 1.0, "identity": "{}"}
    sharded_checkpoint.save(ranks, tmp_path, about)
    runs = []
    for steps in (8, 12):
        runs.append(Counting())
        settings = LoopSettings(steps, log_every=2, checkpoint_every=4, quiet=True)
        run_loop(runs[-1], batches, settings, tmp_path, {}, resume=True)
    assert [run.seen for run in runs] == [[4, 5, 6, 7], [8, 9, 10, 11]]
    assert runs[-1].done == 12


class Rolling(Counting):
    """An objective that draws from torch's own generator, as dropout does."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[float] = []

    def step(self, index: int, batch: torch.Tensor) -> dict[str, float]:
        self.drawn.append(float(torch.rand(())))
        return super().step(index, batch)


@pytest.mark.parametrize("resuming", [2, 1])
def test_random_states_go_with_the_checkpoint_of_as_many_ranks(
    resuming: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Two ranks as each of them sees it: rank 1's draws go on, and one process is told that they cannot."""
    monkeypatch.setattr(parallel, "rank", lambda: 1)
    monkeypatch.setattr(parallel, "is_main", lambda: True)
    batches = PackedBatches(torch.zeros(8, 4, dtype=torch.long), 2, seed=0)
    settings = LoopSettings(4, log_every=2, checkpoint_every=4, quiet=True)
    monkeypatch.setattr(parallel, "size", lambda: 2)
    monkeypatch.setattr(parallel, "averaged", lambda values: values)
    monkeypatch.setattr(parallel, "own_part", lambda batch: batch)
    run_loop(Rolling(), batches, settings, tmp_path, {})
    expected = [float(torch.rand(())) for _ in range(4)]
    torch.manual_seed(99)
    monkeypatch.setattr(parallel, "size", lambda: resuming)
    resumed = Rolling()
    run_loop(resumed, batches, dataclasses.replace(settings, steps=8), tmp_path, {}, resume=True)
    assert resumed.seen == [4, 5, 6, 7]
    assert (resumed.drawn == expected) is (resuming == 2)
    assert ("random states of 2 processes, and 1 resume it" in caplog.text) is (resuming == 1)


def test_a_batch_that_ranks_cannot_share_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parallel, "size", lambda: 4)
    parallel.check_batch(OptimiserRecipe(batch_size=8, accumulation=2))
    with pytest.raises(FormatError, match="4 processes times accumulation 2; choose 16"):
        parallel.check_batch(OptimiserRecipe(batch_size=12, accumulation=2))


@pytest.mark.parametrize(
    "text", ["{", '{"folder": "../x", "step": 3}', '{"folder": "checkpoint-3", "step": 3}']
)
def test_a_damaged_pointer_is_refused(text: str, tmp_path: Path):
    (tmp_path / POINTER).write_text(text)
    with pytest.raises(FormatError, match=r"checkpoint\.json"):
        read_pointer(tmp_path)
