"""The training loop every algorithm here shares: batches, logs, checkpoints, resume, NaN stop.

An algorithm is an :class:`Objective`; this file knows nothing of models. Step *i* sees batch *i*, which
depends on the seed and *i* alone, and everything else that changes is in ``state_dict``, so a resumed run
continues the same loss curve bit for bit (same machine, thread count and library versions).
"""

import contextlib
import json
import logging
import math
import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from converters.train import parallel, random_state, sharded_checkpoint
from converters.train.output import told_when_full
from converters.train.packing import Batches, StatefulBatches
from converters.train.progress import RunProgress
from vllm_sparse.errors import FormatError, NumericsError, UserError

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"
_FORMAT_VERSION = 1


class Objective(Protocol):
    """What one algorithm does in one step."""

    def step(self, index: int, batch: Tensor) -> dict[str, Tensor | float]:
        """Forward, backward and update on tokens ``[batch, sequence]``; returns figures, with ``loss``."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that steps change."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo of :meth:`state_dict`."""


@dataclass(frozen=True)
class LoopSettings:
    """How long to run and how often to look.

    Attributes:
        steps: in all.
        log_every: steps between looks at the device.
        checkpoint_every: steps between checkpoints.
        title: what the progress display calls the run.
        quiet: no display.
        tensorboard: log there too.
        evaluate_every: steps between calls of ``evaluate``; None never calls it.
        evaluate: figures that join the log line of the step just done, such as held-out perplexity.
        seed: of what steps draw from torch's own generators, such as dropout; None leaves those as they are.
    """

    steps: int
    log_every: int = 10
    checkpoint_every: int = 200
    title: str = "training"
    quiet: bool = False
    tensorboard: bool = False
    evaluate_every: int | None = None
    evaluate: Callable[[], dict[str, float]] | None = None
    seed: int | None = None


@dataclass
class LoopResult:
    """What a run did; seconds of earlier parts of a resumed run count."""

    steps: int
    seconds: float
    tokens: int
    last: dict[str, float] = field(default_factory=dict)


def run_loop(
    objective: Objective,
    batches: Batches,
    settings: LoopSettings,
    directory: Path,
    identity: dict[str, Any],
    resume: bool = False,
) -> LoopResult:
    """Run an objective to its last step.

    Args:
        objective: the algorithm.
        batches: data by step number.
        settings: length, cadence of log lines and checkpoints.
        directory: receives ``log.jsonl`` and ``checkpoint.pt``.
        identity: the JSON-able recipe; a resume with another one is refused.
        resume: continue from the checkpoint in ``directory``, or start afresh when there is none.

    Raises:
        NumericsError: the loss became NaN or infinite; the last good checkpoint is kept.
        UserError: the recipe changed, or a run is already there and ``resume`` is false.
    """
    main = parallel.is_main()
    if settings.seed is not None:
        random_state.start(settings.seed, parallel.rank())
    if isinstance(batches, StatefulBatches):
        objective = _WithData(objective, batches)
    directory.mkdir(parents=True, exist_ok=True)
    start, spent = _restore(objective, directory, identity, resume)
    if main:
        _trim_log(directory / LOG, start)
    began = time.monotonic()
    writer = _tensorboard(directory) if settings.tensorboard and main else None
    pending: list[tuple[int, dict[str, Tensor | float]]] = []
    last: dict[str, float] = {}
    with (
        _told_how_to_go_on(directory, main),
        (directory / LOG if main else Path(os.devnull)).open("a", encoding="utf-8") as log,
        RunProgress(settings.title, settings.steps, start, settings.quiet or not main) as progress,
    ):
        for index in range(start, settings.steps):
            pending.append((index, objective.step(index, parallel.own_part(batches.batch(index)))))
            done = index + 1
            saving = done % settings.checkpoint_every == 0 or done == settings.steps
            evaluating = settings.evaluate_every is not None and done % settings.evaluate_every == 0
            if saving or evaluating or done % settings.log_every == 0:
                # One look at the device for many steps: figures stay there until now.
                rows = _settle(pending, directory)
                pending.clear()
                if evaluating and settings.evaluate is not None:
                    rows[-1] |= settings.evaluate()
                last = rows[-1]
                elapsed = time.monotonic() - began
                rate = (done - start) * batches.tokens_per_batch / elapsed
                for row in rows:
                    log.write(json.dumps(row) + "\n")
                    if writer is not None:
                        for name, value in row.items():
                            writer.add_scalar(name, value, int(row["step"]))
                log.flush()
                progress.update(done, {"loss": last["loss"], "tokens/s": rate})
            if saving:
                _save(objective, directory, done, identity, spent + time.monotonic() - began)
    if writer is not None:
        writer.close()
    seconds = spent + time.monotonic() - began
    return LoopResult(settings.steps, seconds, settings.steps * batches.tokens_per_batch, last)


@contextlib.contextmanager
def _told_how_to_go_on(directory: Path, main: bool) -> Iterator[None]:
    """After Ctrl-C, say what is kept."""
    try:
        yield
    except KeyboardInterrupt:
        if main:
            checkpointed = (directory / CHECKPOINT).exists() or sharded_checkpoint.read_pointer(directory)
            logger.warning("%s%s", _kept(directory), " --resume goes on from it." if checkpointed else "")
        raise


class _WithData:
    """An objective whose checkpoints also hold the position in its data."""

    def __init__(self, objective: Objective, batches: StatefulBatches) -> None:
        self.inner = objective
        self.batches = batches
        self.step = objective.step

    def optimisers(self) -> list[torch.optim.Optimizer]:
        """For sharded checkpoints."""
        found: list[torch.optim.Optimizer] = getattr(self.inner, "optimisers", list)()
        return found

    def state_dict(self) -> dict[str, Any]:
        """Both; the position as JSON, for it has no fixed shape."""
        return {"objective": self.inner.state_dict(), "data": json.dumps(self.batches.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo of :meth:`state_dict`."""
        self.inner.load_state_dict(state["objective"])
        self.batches.load_state_dict(json.loads(state["data"]))


def start_run(directory: Path, overwrite: bool, resume: bool) -> None:
    """With ``overwrite`` and without ``resume``, forget an earlier run in ``directory``."""
    if overwrite and not resume and parallel.is_main():
        (directory / CHECKPOINT).unlink(missing_ok=True)
        sharded_checkpoint.remove(directory)
    parallel.barrier()


def finish_run(directory: Path, out: Path) -> None:
    """After the model is safe in ``out``: move the log there, drop the checkpoint."""
    if (directory / LOG).exists():
        shutil.move(directory / LOG, out / LOG)  # `out` may be a link to another file system
    (directory / CHECKPOINT).unlink(missing_ok=True)
    sharded_checkpoint.remove(directory)
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()


def _settle(pending: list[tuple[int, dict[str, Tensor | float]]], directory: Path) -> list[dict[str, float]]:
    rows = []
    for index, figures in pending:
        tensors = {name: value for name, value in figures.items() if isinstance(value, Tensor)}
        if tensors:
            means = parallel.averaged(torch.stack([value.float() for value in tensors.values()]))
            figures = figures | dict(zip(tensors, means.tolist(), strict=True))
        row = {"step": index, **{name: float(value) for name, value in figures.items()}}
        rows.append(row)
        if not math.isfinite(row["loss"]):
            raise NumericsError(
                f"the loss is {row['loss']} at step {int(row['step'])}; stopped. {_kept(directory)} "
                "Lower the learning rate or use precision fp32, then resume or start again."
            )
    return rows


def _kept(directory: Path) -> str:
    sharded = sharded_checkpoint.read_pointer(directory)
    if sharded is not None:
        folder = directory / sharded["folder"]
        return f"The last good checkpoint is kept: {folder} (after {sharded['step']} steps)."
    path = directory / CHECKPOINT
    if not path.exists():
        return "No checkpoint had been written yet."
    return f"The last good checkpoint is kept: {path} (after {read_checkpoint(path)['step']} steps)."


def _save(objective: Objective, directory: Path, done: int, identity: dict[str, Any], seconds: float) -> None:
    about = {
        "format_version": _FORMAT_VERSION,
        "step": done,
        "seconds": seconds,
        "identity": json.dumps(identity, sort_keys=True),
    }
    with told_when_full(directory, "The checkpoint before, if there is one, is kept."):
        if parallel.size() > 1:
            sharded_checkpoint.save(objective, directory, about)
            return
        partial = directory / (CHECKPOINT + ".partial")
        state = {**about, "objective": objective.state_dict(), "rng": random_state.read()}
        try:
            # Torch's own files lose the reason why a write failed; Python's keep it.
            with partial.open("wb") as file:
                torch.save(state, file)
            os.replace(partial, directory / CHECKPOINT)
        finally:
            partial.unlink(missing_ok=True)
    # Several processes may have begun this run: theirs is now the older one, and would be read first.
    sharded_checkpoint.remove(directory)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint without executing anything in it.

    Raises:
        FormatError: not a checkpoint of this project.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise FormatError(f"{path} is not a readable checkpoint: {error}") from error
    if not isinstance(state, dict) or state.get("format_version") != _FORMAT_VERSION:
        raise FormatError(f"{path} is not a checkpoint of format version {_FORMAT_VERSION}")
    return state


def _restore(
    objective: Objective, directory: Path, identity: dict[str, Any], resume: bool
) -> tuple[int, float]:
    path = directory / CHECKPOINT
    pointer = sharded_checkpoint.read_pointer(directory)
    if pointer is None and not path.exists():
        if resume:
            logger.info("%s holds no checkpoint to resume; starting at the first step", directory)
        return 0, 0.0
    if pointer is None and parallel.size() > 1:
        raise UserError(
            f"{path} was written by one process; resume it without torchrun, "
            "or start afresh in another folder"
        )
    state = read_checkpoint(path) if pointer is None else pointer
    if not resume:
        raise UserError(
            f"{directory} already holds a run ({state['step']} steps done); pass --resume to continue it, "
            "or delete the folder or choose another output to start afresh"
        )
    changes = _differences(json.loads(state["identity"]), json.loads(json.dumps(identity)))
    if changes:
        raise UserError(
            f"cannot resume {path}: the recipe changed ({'; '.join(changes)}). "
            "Restore the recipe, or start afresh in another folder."
        )
    if pointer is None:
        objective.load_state_dict(state["objective"])
        random_state.write(state["rng"])
    else:
        sharded_checkpoint.load(objective, directory, pointer)
    logger.info("resumed %s after %d steps", path, state["step"])
    return int(state["step"]), float(state["seconds"])


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        found: list[str] = []
        for key in sorted(old.keys() | new.keys()):
            found += _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
        return found
    return [] if old == new else [f"{name}: was {old!r}, now {new!r}"]


def _trim_log(path: Path, start: int) -> None:
    """Drop lines that a resumed run will write again."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < start]
    path.write_text("".join(kept), encoding="utf-8")


def _tensorboard(directory: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("tensorboard logs need: pip install 'vllm-sparse[train]'") from error
    return SummaryWriter(str(directory / "tensorboard"))
