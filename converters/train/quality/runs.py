"""Run what a suite still lacks, row by row; several processes may share the work."""

import fcntl
import fnmatch
import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from converters.train.compress import CompressResult, run_recipe
from converters.train.loop import LOG
from converters.train.methods import METHODS, recipe_for
from converters.train.quality.suite import Group, Job, Row, Suite, job_of
from converters.train.recipes import TrainRecipe, read_yaml, validate_recipe
from converters.train.trainer import train_model

logger = logging.getLogger(__name__)

Result = dict[str, Any]
# Of a method's figures, those that say how a run went; logs hold the rest.
_FIGURES = (
    "training_tokens", "block_sparsity", "flip_rate", "masked_mean_before_prune", "decay_budget", "pull",
    "achieved", "gate_range", "layers", "loss",
)  # fmt: skip


def read_results(path: Path) -> dict[str, Result]:
    """Results by job key; none when the file is not there."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return {row["key"]: row for row in rows}


def append_result(path: Path, result: Result) -> None:
    """Add one line; other processes may do so at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(result, sort_keys=True) + "\n")


def jobs_of(suite: Suite, group: Group, row: Row, results: dict[str, Result]) -> list[Job]:
    """The runs of a row that are known by now: all tries on the first seed, then the best on the others."""
    first, *others = suite.row_seeds(row)
    tries = [job_of(suite, group, row, first, settings) for settings in row.settings()]
    best = best_try(tries, results)
    if best is None:
        return tries
    return tries + [job_of(suite, group, row, seed, best.settings) for seed in others]


def best_try(tries: Sequence[Job], results: dict[str, Result]) -> Job | None:
    """The try of lowest perplexity; None while one is missing."""
    if any(job.key not in results for job in tries):
        return None
    return min(tries, key=lambda job: float(results[job.key]["perplexity"]))


def chosen_jobs(suite: Suite, group: Group, row: Row, results: dict[str, Result]) -> list[Job]:
    """The finished runs that a row's figures are made from: one a seed, all with the chosen settings."""
    first, *others = suite.row_seeds(row)
    tries = [job_of(suite, group, row, first, settings) for settings in row.settings()]
    best = best_try(tries, results)
    if best is None:
        return []
    jobs = [best] + [job_of(suite, group, row, seed, best.settings) for seed in others]
    return [job for job in jobs if job.key in results]


def directory_of(suite: Suite, job: Job) -> Path:
    """Where a run's model goes."""
    return suite.work / job.row / f"seed{job.seed}-{job.key}"


def run_suite(suite: Suite, only: Sequence[str] = ("*",), quiet: bool = False) -> None:
    """Train the base if need be, then every missing run of the rows that match ``only``.

    A row that another process is at is left to it. Each finished run is one line of ``suite.results``; an
    interrupted run continues from its checkpoint.
    """
    with _claimed(suite.work, "base", wait=True):
        if not suite.model.exists():
            recipe = validate_recipe(TrainRecipe, read_yaml(suite.base))
            train_model(recipe, suite.model, resume=True, quiet=quiet)
    write_curve(suite)
    for group, row in suite.rows():
        if any(fnmatch.fnmatch(row.name, pattern) for pattern in only):
            run_row(suite, group, row, quiet)


def run_row(suite: Suite, group: Group, row: Row, quiet: bool, wait: bool = False) -> None:
    """Every missing run of one row, and first of the row it starts from."""
    if row.source is not None:
        run_row(suite, *suite.row(row.source), quiet, wait=True)
    with _claimed(suite.work, row.name, wait) as free:
        if not free:
            logger.info("%s: another process is at it", row.name)
            return
        while True:
            results = read_results(suite.results)
            missing = [job for job in jobs_of(suite, group, row, results) if job.key not in results]
            if not missing:
                return
            append_result(suite.results, run_job(suite, missing[0], results, quiet))


def run_job(suite: Suite, job: Job, results: dict[str, Result], quiet: bool) -> Result:
    """One run; its model stays in the work folder."""
    model = suite.model
    if job.source is not None:
        group, row = suite.row(job.source)
        jobs = chosen_jobs(suite, group, row, results)
        # A source that needs fewer seeds serves the others with its first.
        model = directory_of(suite, next((j for j in jobs if j.seed == job.seed), jobs[0]))
    out = directory_of(suite, job)
    shutil.rmtree(out, ignore_errors=True)
    logger.info("%s: seed %d %s", job.row, job.seed, job.settings)
    recipe = recipe_for({**job.values, "model": str(model), "out": str(out)})
    began = time.process_time()
    result = run_recipe(recipe, resume=METHODS[recipe.method].trains, quiet=quiet)
    return _record(job, result, time.process_time() - began)


def _record(job: Job, result: CompressResult, whole: float) -> Result:
    if result.compressed is None or result.dense is None:
        raise AssertionError("suite recipes measure perplexity")
    return {
        "key": job.key,
        "row": job.row,
        "seed": job.seed,
        "settings": job.settings,
        "perplexity": result.compressed.perplexity,
        "nll": result.compressed.nll,
        "input_perplexity": result.dense.perplexity,
        "evaluated_tokens": result.compressed.tokens,
        "context_length": result.compressed.context_length,
        "parameters": result.parameters[1],
        "cpu_seconds": round(result.cpu_seconds, 2),
        "cpu_seconds_with_evaluation": round(whole, 2),
        "figures": {name: result.figures[name] for name in _FIGURES if name in result.figures},
    }


@contextmanager
def _claimed(work: Path, name: str, wait: bool = False) -> Iterator[bool]:
    """Hold a row's lock; yields False when another process has it. The lock dies with its process."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / f".{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def write_curve(suite: Suite, every: int = 500) -> None:
    """The base's training as CSV: mean training loss of each span and held-out perplexity at its end."""
    log = suite.model / LOG
    if not log.exists():
        return
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    lines = ["steps,training_loss,heldout_perplexity"]
    for start in range(0, len(rows), every):
        span = rows[start : start + every]
        heldout = next((f"{r['heldout_perplexity']:.3f}" for r in span if "heldout_perplexity" in r), "")
        lines.append(f"{start + len(span)},{sum(r['loss'] for r in span) / len(span):.4f},{heldout}")
    suite.curve.parent.mkdir(parents=True, exist_ok=True)
    suite.curve.write_text("\n".join(lines) + "\n", encoding="utf-8")
