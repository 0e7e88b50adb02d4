"""One case: break a copy of a checkpoint, then read, inspect, plan and convert it.

What must hold:

- it ends in a ``UserError`` or it loads; any other exception is a *crash*;
- within :data:`SECONDS`; otherwise it is a *hang*. Memory is bounded too, so that an absurd size is a crash;
- if it loads, an independent reader (``reference.py``) must read the same numbers from the changed bytes,
  or it is a *wrong load*: also when that reader refuses them. For the two Marlin layouts, unknown to it,
  weights whose tensors have not changed must keep their numbers;
- if it converts, the result read back must have the same numbers.
"""

import random
import resource
import shutil
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from converters.checkpoint import open_checkpoint
from converters.convert import convert
from converters.inspect import inspect
from converters.readers import make_reader
from converters.readers.base import dense_numbers
from tests.fuzz import reference
from tests.fuzz.corpus import make_corpus
from tests.fuzz.mutations import mutate
from vllm_sparse.errors import UserError

SEED = 20260926
SECONDS = 10
# Of address space above what the process has when it starts.
MEMORY = 8 << 30
# Pickles are opened in processes of their own, which takes seconds.
PICKLE_SHARE = 0.003
CONVERT_SHARE = 0.25
_MARLIN = ("marlin-24", "gptq-marlin-24")


class Hang(BaseException):
    """Time is up; not an Exception, so that nothing under test takes it for its own."""


@dataclass
class Result:
    """Counts, and a paragraph for each case that broke a promise."""

    cases: int = 0
    refused: int = 0
    loaded: int = 0
    same: int = 0
    converted: int = 0
    crashes: int = 0
    hangs: int = 0
    wrong: int = 0
    problems: list[str] = field(default_factory=list)


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise :class:`Hang` in the main thread when the block takes longer."""

    def ring(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def memory_limit(extra: int) -> Iterator[None]:
    """Bound the address space while the block runs."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + extra, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def loaded_numbers(folder: Path, form: str = "auto") -> tuple[str, dict[str, np.ndarray]]:
    """``(format, {weight: numbers})`` as the converters read a folder; every entry is loaded."""
    reader = make_reader(open_checkpoint(folder), form)
    numbers = {}
    for entry in reader.entries():
        loaded = reader.load(entry)
        if entry.name.endswith(".weight"):
            numbers[entry.name] = dense_numbers(entry, loaded).to(torch.float64).numpy()
    return reader.format, numbers


def difference(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> str | None:
    """What differs between two readings; None if nothing does."""
    if set(ours) != set(theirs):
        return f"names {sorted(set(ours) ^ set(theirs))[:4]}"
    for name, value in ours.items():
        if value.shape != theirs[name].shape:
            return f"{name} has shape {value.shape}, not {theirs[name].shape}"
        # Products with scales are rounded to float32 on one side.
        if not np.allclose(value, theirs[name], rtol=1e-6, atol=1e-30, equal_nan=True):
            return f"values of {name}"
    return None


class Fuzzer:
    """Runs numbered cases; a number and a seed always make the same case.

    Args:
        work: an empty folder.
        seed: of all cases.
    """

    def __init__(self, work: Path, seed: int = SEED) -> None:
        torch.set_num_threads(1)
        self.seed, self.result = seed, Result()
        self.folder, self.out = work / "case", work / "out"
        corpus = make_corpus(work / "corpus")
        self.pickle = next(path for path in corpus if path.name == "pickle")
        self.corpus = [path for path in corpus if path != self.pickle]
        self.original = {path: loaded_numbers(path) for path in self.corpus}
        self.raw = {path: reference.raw_tensors(path) for path in self.corpus}

    def case(self, number: int) -> str:
        """Run one case; what happened, in a few words."""
        rng = random.Random(f"{self.seed}-{number}")
        base = self.pickle if rng.random() < PICKLE_SHARE else rng.choice(self.corpus)
        for path in (self.folder, self.out):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(base, self.folder)
        said = mutate(rng, self.folder)
        self.result.cases += 1
        what = f"case {number}: {base.name}: {said}"
        try:
            with memory_limit(MEMORY), time_limit(SECONDS * (10 if base == self.pickle else 1)):
                return f"{what}: {self._run(rng, base)}"
        except UserError as error:
            self.result.refused += 1
            return f"{what}: refused: {error}"
        except Hang:
            self.result.hangs += 1
            problem = "took too long"
        except (AssertionError, reference.Refused) as error:
            self.result.wrong += 1
            problem = f"wrong load: {error}"
        except Exception as error:  # noqa: BLE001 - finding these is what it is for
            self.result.crashes += 1
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(last.filename).name}:{last.lineno}"
            problem = f"{type(error).__name__} at {where}: {error}"[:300]
        self.result.problems.append(f"{what}: {problem}")
        return self.result.problems[-1]

    def _run(self, rng: random.Random, base: Path) -> str:
        if base == self.pickle:
            convert(self.folder, self.out, "dense", allow_pickle=True)
            loaded_numbers(self.out)
            self.result.loaded += 1
            return "loaded"
        inspect(self.folder)
        form, numbers = loaded_numbers(self.folder)
        self._compare(base, form, numbers)
        self.result.loaded += 1
        self.result.same += difference(numbers, self.original[base][1]) is None
        if rng.random() < CONVERT_SHARE:
            target = rng.choice(("sparse24", "sparse24", "dense"))
            convert(self.folder, self.out, target)
            again = loaded_numbers(self.out)[1]
            if target == "dense":
                # Written in the model's dtype, so only float32 models keep every bit.
                numbers = {name: value.astype(np.float32) for name, value in numbers.items()}
            if self._dtype_kept():
                problem = difference(again, numbers)
                if problem is not None:
                    raise AssertionError(f"converted to {target}, it differs in {problem}")
            self.result.converted += 1
        return "loaded"

    def _dtype_kept(self) -> bool:
        from converters.config_json import load_json
        from converters.writers.dense import model_dtype

        return model_dtype(load_json(self.folder / "config.json")) is torch.float32

    def _compare(self, base: Path, form: str, numbers: dict[str, np.ndarray]) -> None:
        if form not in _MARLIN:
            try:
                theirs = reference.read(self.folder, form)
            except reference.Refused as error:
                raise AssertionError(f"loaded as {form}, but the second reader refuses: {error}") from error
            problem = difference(numbers, theirs)
            if problem is not None:
                raise AssertionError(f"loaded as {form}, it differs from the second reader in {problem}")
            return
        now, before = reference.raw_tensors(self.folder), self.raw[base]
        kept_config = (self.folder / "config.json").read_bytes() == (base / "config.json").read_bytes()
        for name, value in numbers.items():
            module = name.removesuffix(".weight")
            parts = [key for key in before if key.startswith(module + ".")]
            unchanged = all(key in now and torch.equal(now[key], before[key]) for key in parts)
            old = self.original[base][1].get(name)
            if kept_config and unchanged and old is not None and not np.array_equal(value, old):
                raise AssertionError(f"{name} changed although its tensors did not")
