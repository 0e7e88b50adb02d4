"""Model directories appear whole or not at all, whatever kills the run that writes them."""

import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from converters.train import loop, parallel
from converters.train.compress import compress_model
from converters.train.loop import CHECKPOINT, LoopSettings, run_loop
from converters.train.output import (
    atomic_directory,
    check_free,
    check_room,
    clear_leftovers,
    told_when_full,
    work_folder,
)
from converters.train.packing import PackedBatches
from tests.reliability.kill_points import run_child
from vllm_sparse.errors import UserError


def model(directory: Path, text: str = "old") -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(text)
    return directory


def killed_in(monkeypatch: pytest.MonkeyPatch, target: Path, before_rename: int | None) -> None:
    """Write ``target`` in a process that dies just before its n-th rename, or while files are written."""

    def write() -> None:
        renames = 0

        def replace(source: Path, destination: Path, real=os.replace) -> None:
            nonlocal renames
            renames += 1
            if renames == before_rename:
                os.kill(os.getpid(), signal.SIGKILL)
            real(source, destination)

        monkeypatch.setattr(os, "replace", replace)
        with atomic_directory(target, overwrite=True) as folder:
            (folder / "config.json").write_text("new")
            (folder / "sub").mkdir()
            if before_rename is None:
                os.kill(os.getpid(), signal.SIGKILL)

    assert os.WTERMSIG(run_child(write)) == signal.SIGKILL


@pytest.mark.parametrize("before_rename", [None, 1, 2])
def test_what_a_kill_left_is_undone(
    monkeypatch: pytest.MonkeyPatch, before_rename: int | None, tmp_path: Path
):
    target = model(tmp_path / "m")
    killed_in(monkeypatch, target, before_rename)
    assert work_folder(target).exists()
    clear_leftovers(target)
    assert (target / "config.json").read_text() == "old"
    with pytest.raises(UserError, match="already exists"):
        check_free(target)
    with atomic_directory(target, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
    assert (target / "config.json").read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_a_killed_write_of_a_new_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    killed_in(monkeypatch, tmp_path / "m", None)
    with atomic_directory(tmp_path / "m") as folder:
        assert list(folder.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_compress_clears_before_it_works(
    monkeypatch: pytest.MonkeyPatch, model_dir: Path, text_file: Path, tmp_path: Path
):
    """Killed between the renames, so the model that was there has to come back first."""
    target = model(tmp_path / "m")
    killed_in(monkeypatch, target, 2)
    assert not target.exists()
    with pytest.raises(UserError, match="already exists"):
        compress_model("magnitude", model_dir, target, str(text_file), quiet=True, eval_tokens=0)
    assert list(tmp_path.iterdir()) == [target]
    compress_model("magnitude", model_dir, target, str(text_file), overwrite=True, quiet=True, eval_tokens=0)
    assert list(tmp_path.iterdir()) == [target]
    assert (target / "model.safetensors").is_file()


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path):
    other = work_folder(tmp_path / "m")
    other.mkdir()
    (other / "new").mkdir()
    (other / "thesis.tex").touch()
    for act in (clear_leftovers, lambda target: atomic_directory(target).__enter__()):
        with pytest.raises(UserError, match=r"somebody else's: it holds new, thesis.tex"):
            act(tmp_path / "m")
    assert sorted(path.name for path in other.iterdir()) == ["new", "thesis.tex"]


def test_two_runs_cannot_write_one_model(tmp_path: Path):
    with atomic_directory(tmp_path / "m") as folder:
        (folder / "config.json").touch()
        for act in (clear_leftovers, lambda target: atomic_directory(target).__enter__()):
            with pytest.raises(UserError, match="another process is writing"):
                act(tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_an_error_leaves_all_as_it_was(tmp_path: Path):
    target = model(tmp_path / "m")
    with pytest.raises(ZeroDivisionError), atomic_directory(target, overwrite=True):
        raise ZeroDivisionError
    assert (target / "config.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_full_disk_is_one_paragraph_and_leaves_nothing(tmp_path: Path):
    full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with (
        pytest.raises(UserError, match=r"out could not be written, the disk is full: .* are free there"),
        atomic_directory(tmp_path / "out"),
    ):
        raise full
    assert list(tmp_path.iterdir()) == []


class Counting:
    """An objective of one number."""

    count = 0

    def step(self, index: int, batch: torch.Tensor) -> dict[str, float]:
        self.count += 1
        return {"loss": float(self.count)}

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def test_a_disk_that_fills_up_keeps_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    batches = PackedBatches(torch.zeros(4, 8, dtype=torch.int32), 2, 0)
    settings = LoopSettings(steps=4, checkpoint_every=2, quiet=True)
    saves = 0

    def opened(path: Path, mode: str = "r", *arguments, real=Path.open, **options):
        nonlocal saves
        saves += path.name.endswith(".partial")
        if saves == 2:
            path.symlink_to("/dev/full")
            saves += 1
        return real(path, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(
        UserError, match=r"the disk is full: .*The checkpoint before, if there is one, is kept"
    ):
        run_loop(Counting(), batches, settings, tmp_path, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == [CHECKPOINT, "log.jsonl"]
    objective = Counting()
    assert run_loop(objective, batches, settings, tmp_path, {}, resume=True).last["loss"] == 4.0


class Large(Counting):
    """One whose checkpoint is 1 MB."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"weights": torch.zeros(250_000)}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_file_size_limit_is_not_called_a_full_disk(ranks: int, tmp_path: Path):
    """Torch's archives say ``inline_container`` of both; sharded checkpoints gather the exception."""

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        torch.set_num_threads(1)
        parallel.size = lambda: ranks
        with pytest.raises(UserError, match=r"larger than this process .*ulimit -f.*Raise the limit"):
            loop._save(Large(), tmp_path, 2, {}, 1.0)

    assert run_child(limited) == 0
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_failed_write_keeps_its_own_words(tmp_path: Path):
    """A bug's message that looks like an archive's, and a file that is missing."""
    with pytest.raises(RuntimeError, match="inline_container"), told_when_full(tmp_path, "Kept."):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
    with pytest.raises(FileNotFoundError), told_when_full(tmp_path, "Kept."):
        (tmp_path / "absent").read_bytes()


def test_no_room_and_no_folder_are_refused_before_the_work(tmp_path: Path):
    with pytest.raises(UserError, match=r"no space for .*out: its weights need 1\.00 EB"):
        check_room(tmp_path / "out", 10**18)
    (tmp_path / "file").write_text("text")
    with pytest.raises(UserError, match=r"cannot make .*out: .*file is no folder"):
        check_free(tmp_path / "file" / "sub" / "out")
