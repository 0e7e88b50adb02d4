"""Kill -9 at random points of a conversion: ``python -m tests.reliability.kill_points --points 50``.

Every point forks a process that converts, and kills it with SIGKILL, by turns after a random time and just
before a random file operation. Then it must hold that

- the destination is absent, or whole and equal to that of an undisturbed conversion;
- the source has not changed;
- the conversion ends with the same bytes, with ``--resume`` (at every other point after a second kill) or
  from the start, and leaves no partial folder behind.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from converters.convert import convert
from converters.staging import partial_path

# What a process asks the interpreter before it touches the file system.
_FILE_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate")
HIDDEN, LAYERS, SHARDS = 512, 12, 6


@dataclass
class Outcome:
    """What the points did.

    Attributes:
        points: kills that took place.
        whole: destinations that were complete already when the kill came.
        resumed: conversions that were finished with ``--resume``.
        failures: one sentence per broken promise.
        places: how many kills came by time and before which operation.
    """

    points: int = 0
    whole: int = 0
    resumed: int = 0
    failures: list[str] = field(default_factory=list)
    places: Counter[str] = field(default_factory=Counter)


def make_source(folder: Path) -> Path:
    """A sharded checkpoint of about 35 MB, its linears 2:4."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    index = {}
    for shard in range(SHARDS):
        tensors = {}
        for layer in range(shard * LAYERS // SHARDS, (shard + 1) * LAYERS // SHARDS):
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                weight = torch.randn(HIDDEN, HIDDEN, generator=generator).to(torch.bfloat16)
                weight.view(-1, 4)[:, 1:3] = 0
                tensors[f"model.layers.{layer}.self_attn.{name}.weight"] = weight
        if shard == 0:
            embedding = torch.randn(2048, HIDDEN, generator=generator).to(torch.bfloat16)
            tensors["model.embed_tokens.weight"] = embedding
        file = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        save_file(tensors, folder / file)
        index |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16"}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text("{}")
    return folder


def tree(folder: Path) -> dict[str, str]:
    """The hash of every file of a folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def run_child(work: Callable[[], None]) -> int:
    """Run ``work`` in a forked process; its exit status as :func:`os.waitpid` has it."""
    child = os.fork()
    if child == 0:
        try:
            # PyTorch replaces a forked pool at first use, for which two threads of the conversion may race.
            torch.set_num_threads(1)
            work()
            os._exit(0)
        except BaseException as error:  # noqa: BLE001 - the child must end here, whatever happened
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            os._exit(1)
    return os.waitpid(child, 0)[1]


def killed_after(seconds: float, work: Callable[[], None]) -> None:
    """Kill the process from another one, wherever it is then."""

    def armed() -> None:
        pid = os.getpid()
        if os.fork() == 0:
            time.sleep(seconds)
            # The parent of this process is another one when the conversion has ended.
            if os.getppid() == pid:
                os.kill(pid, signal.SIGKILL)
            os._exit(0)
        work()

    run_child(armed)


def killed_before(operation: int, work: Callable[[], None]) -> None:
    """Kill the process just before its n-th file operation."""

    def armed() -> None:
        left = operation

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            del arguments
            if event in _FILE_EVENTS:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        work()

    run_child(armed)


def count_operations(work: Callable[[], None], record: Path) -> int:
    """File operations of an undisturbed run."""

    def counting() -> None:
        seen = 0

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal seen
            del arguments
            seen += event in _FILE_EVENTS

        sys.addaudithook(hook)
        work()
        record.write_text(str(seen))

    if run_child(counting) != 0:
        raise RuntimeError("the undisturbed conversion failed")
    return int(record.read_text())


class Killer:
    """A source, its undisturbed conversion, and points at which others are killed.

    Args:
        work: an empty folder.
        seed: of the points.
    """

    def __init__(self, work: Path, seed: int) -> None:
        torch.set_num_threads(1)
        self.work, self.random = work, random.Random(seed)
        self.source = make_source(work / "source")
        self.target = work / "target"
        self.before = tree(self.source)
        self.operations = count_operations(lambda: self.convert(), work / "operations")
        # The card and the manifest name the destination, so the reference needs the same name.
        self.reference = tree(self.target)
        shutil.rmtree(self.target)
        start = time.perf_counter()
        run_child(self.convert)
        self.seconds = time.perf_counter() - start
        shutil.rmtree(self.target)

    def convert(self, resume: bool = False) -> None:
        """The conversion under test."""
        convert(self.source, self.target, resume=resume)

    def kill(self, outcome: Outcome, timed: bool, resume: bool) -> None:
        """One conversion that is killed."""
        if timed:
            killed_after(self.random.uniform(0, 1.05 * self.seconds), lambda: self.convert(resume))
        else:
            killed_before(self.random.randrange(self.operations), lambda: self.convert(resume))
        outcome.places["by time" if timed else "before a file operation"] += 1
        outcome.points += 1

    def point(self, number: int, outcome: Outcome) -> None:
        """Kill, look, finish, compare."""
        where = f"point {number}"
        self.kill(outcome, timed=number % 2 == 0, resume=False)
        if number % 4 >= 2 and not self.target.exists():
            self.kill(outcome, timed=number % 8 >= 4, resume=True)
        if tree(self.source) != self.before:
            outcome.failures.append(f"{where}: the source changed")
        if self.target.exists():
            outcome.whole += 1
            if tree(self.target) != self.reference:
                outcome.failures.append(f"{where}: the destination appeared before it was whole")
            shutil.rmtree(self.target)
            shutil.rmtree(partial_path(self.target), ignore_errors=True)
            return
        resume = number % 5 != 4
        outcome.resumed += resume
        if run_child(lambda: self.convert(resume)) != 0:
            outcome.failures.append(f"{where}: the conversion could not be finished")
        elif tree(self.target) != self.reference:
            other = sorted(name for name, _ in tree(self.target).items() ^ self.reference.items())
            outcome.failures.append(f"{where}: the finished conversion differs in {', '.join(other)}")
        elif partial_path(self.target).exists():
            outcome.failures.append(f"{where}: a partial folder was left behind")
        shutil.rmtree(self.target, ignore_errors=True)
        shutil.rmtree(partial_path(self.target), ignore_errors=True)


def run(work: Path, points: int, seed: int) -> Outcome:
    """Kill at ``points`` points or more (a second kill counts).

    Args:
        work: an empty folder.
        points: kills.
        seed: of when they come.
    """
    killer, outcome = Killer(work, seed), Outcome()
    number = 0
    while outcome.points < points:
        killer.point(number, outcome)
        number += 1
    return outcome


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.reliability.kill_points", description=__doc__)
    parser.add_argument("--points", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vllm-sparse-kill-") as folder:
        outcome = run(Path(folder), options.points, options.seed)
    print(
        f"{outcome.points} kills (seed {options.seed}; "
        + ", ".join(f"{count} {where}" for where, count in sorted(outcome.places.items()))
        + f"): {len(outcome.failures)} corrupt results, {outcome.resumed} resumed, "
        f"{outcome.whole} already whole"
    )
    for failure in outcome.failures:
        print(failure)
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    sys.exit(main())
