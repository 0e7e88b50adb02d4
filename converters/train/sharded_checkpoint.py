"""Checkpoints of several processes, by torch.distributed.checkpoint: each writes its own shards.

A run's folder holds ``checkpoint-STEP/`` and ``checkpoint.json``, which names the folder that counts. The
pointer is replaced atomically after all shards are on disk, so an interruption leaves the earlier
checkpoint in force. Tensors are stored under their names with their full shapes: a run may be resumed by
another number of processes, also by one. Each process's random state is stored under its rank, for dropout;
only the same number of processes can take it up.
"""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from converters.train import parallel, random_state
from converters.train.write_errors import errno_of
from vllm_sparse.errors import FormatError, UnsupportedError

if TYPE_CHECKING:
    from converters.train.loop import Objective

logger = logging.getLogger(__name__)

POINTER = "checkpoint.json"
_RANDOM = "random_state"
_FOLDER = "checkpoint-"


class _Writer(FileSystemWriter):
    """A writer whose failures name the system's error, which other processes would not see otherwise."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this process's part.

        Raises:
            OSError: a write failed, and the system said why.
        """
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            number = errno_of(error)
            if number is None:
                raise
            raise OSError(number, os.strerror(number), str(self.path)) from error


def save(objective: "Objective", directory: Path, about: dict[str, Any]) -> None:
    """Write a checkpoint and make it the one that counts.

    Args:
        objective: whose ``state_dict`` is stored; called on every process.
        directory: the run's folder.
        about: JSON-able facts, with ``step``.
    """
    folder = f"{_FOLDER}{about['step']}"
    try:
        random = random_state.read()
        state = {**objective.state_dict(), _RANDOM: {str(parallel.rank()): random}}
        state_dict_saver.save(state, storage_writer=_Writer(directory / folder))
    except BaseException:  # a full disk raises no Exception; half a checkpoint would go on filling it
        shutil.rmtree(directory / folder, ignore_errors=True)
        raise
    if parallel.is_main():
        partial = directory / (POINTER + ".partial")
        pointer = {**about, "folder": folder, _RANDOM: {"processes": parallel.size(), "of": [*random]}}
        partial.write_text(json.dumps(pointer), encoding="utf-8")
        os.replace(partial, directory / POINTER)
        for other in directory.glob(f"{_FOLDER}*"):
            if other.is_dir() and other.name != folder:
                shutil.rmtree(other)
    parallel.barrier()


def read_pointer(directory: Path) -> dict[str, Any] | None:
    """What ``checkpoint.json`` says; None without one.

    Raises:
        FormatError: it is damaged, or the folder it names is gone.
    """
    path = directory / POINTER
    if not path.exists():
        return None
    try:
        pointer = json.loads(path.read_text(encoding="utf-8"))
        folder, step = str(pointer["folder"]), int(pointer["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{path} is not a readable checkpoint pointer: {error}") from error
    if folder != f"{_FOLDER}{step}" or not (directory / folder).is_dir():
        raise FormatError(f"{path} names {folder!r}, which is not in {directory}")
    result: dict[str, Any] = pointer
    return result


def load(objective: "Objective", directory: Path, pointer: dict[str, Any]) -> None:
    """Put a checkpoint's tensors into an objective, cut as this launch cuts them.

    Of another number of processes the random state is left out, with a warning.

    Raises:
        UnsupportedError: the objective cannot run in several processes, so it has no such checkpoints.
    """
    optimisers = getattr(objective, "optimisers", None)
    if optimisers is None:
        raise UnsupportedError(f"{type(objective).__name__} has no sharded checkpoints")
    for optimiser in optimisers():
        _prime(optimiser)
    state = objective.state_dict()
    random = _random_to_fill(pointer, directory)
    if random:
        state = {**state, _RANDOM: {str(parallel.rank()): random}}
    state_dict_loader.load(state, checkpoint_id=str(directory / pointer["folder"]))
    state.pop(_RANDOM, None)
    objective.load_state_dict(state)
    if random:
        random_state.write(random)


def _random_to_fill(pointer: dict[str, Any], directory: Path) -> dict[str, Tensor]:
    """This process's random state, for the stored one to be read into; empty where there is none for it."""
    kept = pointer.get(_RANDOM) or {"processes": 0, "of": []}
    if kept["processes"] == parallel.size():
        return {name: state for name, state in random_state.read().items() if name in kept["of"]}
    if parallel.is_main():
        logger.warning(
            "%s: the checkpoint has the random states of %d processes, and %d resume it, so they are not "
            "taken over; dropout, if the model has any, draws anew, and the run differs from an unbroken one",
            directory / pointer["folder"],
            kept["processes"],
            parallel.size(),
        )
    return {}


def _prime(optimiser: torch.optim.Optimizer) -> None:
    """Make the optimiser allocate its moments, changing no parameter, so that there is something to fill."""
    rates = [group["lr"] for group in optimiser.param_groups]
    for group in optimiser.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    for group, rate in zip(optimiser.param_groups, rates, strict=True):
        group["lr"] = rate


def remove(directory: Path) -> None:
    """Delete the pointer and all checkpoint folders."""
    (directory / POINTER).unlink(missing_ok=True)
    for folder in directory.glob(f"{_FOLDER}*"):
        shutil.rmtree(folder)
