"""What a comparison has measured so far, on disk, so that an interrupted one goes on from there.

A *turn* is what is measured side by side: one repeat of a scenario on all models (of all scenarios where
servers are started one at a time). It is written when it is complete. A turn that was cut short is measured
again as a whole, because a pair must not consist of halves from different hours.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from bench import environment, output
from bench.fleet import Contestant
from bench.observer import Reports
from bench.parity import Scores
from bench.scenarios import Scenario
from vllm_sparse.errors import FormatError

TURN_SCHEMA = "vllm-sparse/bench-compare-turn/1"
QUALITY_SCHEMA = "vllm-sparse/bench-compare-quality/1"
_QUALITY = "quality"
_SCORE_TYPES: dict[str, Any] = {
    "logprobs": np.float64,
    "top1": np.int64,
    "lengths": np.int64,
    "tokens": np.int64,
}


class Store:
    """Turns in a folder, told apart by everything that their figures depend on.

    Args:
        directory: The folder, made when the first turn is kept; None keeps nothing and finds nothing.
        settings: Of the comparison, JSON-ready: flags, environment, how servers run.
        models: The contestants; a changed checkpoint is another contestant.
    """

    def __init__(
        self, directory: Path | None, settings: Mapping[str, Any], models: Sequence[Contestant]
    ) -> None:
        self._directory = directory
        self._models = list(models)
        described = environment.describe()
        self._identity = {
            "settings": dict(settings),
            "models": [_identity(model) for model in models],
            "machine": [described["cpu"], described["cores_usable"], described["packages"]],
        }

    def turn(self, batch: Sequence[Scenario], seed: int) -> dict[str, dict[str, Any]] | None:
        """The kept reports of a turn by scenario and model, None when it is still to be measured.

        What was learnt about the models then is added to what is known now.

        Raises:
            FormatError: The file is there and is not a kept turn.
        """
        kept = self._read(self._turn_path(batch, seed), TURN_SCHEMA)
        return None if kept is None else dict(kept["reports"])

    def keep_turn(self, batch: Sequence[Scenario], seed: int, reports: Reports) -> None:
        """Write the newest report of every scenario of ``batch`` and every model."""
        newest = {
            scenario.name: {model.name: reports[scenario.name, model.name][-1] for model in self._models}
            for scenario in batch
        }
        self._write(self._turn_path(batch, seed), {"schema": TURN_SCHEMA, "reports": newest})

    def scores(self) -> dict[str, Scores] | None:
        """The kept answers of all models, None when they are still to be asked."""
        kept = self._read(self._path(_QUALITY, {}), QUALITY_SCHEMA)
        if kept is None:
            return None
        return {
            name: Scores(**{field: np.asarray(values[field], kind) for field, kind in _SCORE_TYPES.items()})
            for name, values in kept["scores"].items()
        }

    def keep_scores(self, scores: Mapping[str, Scores]) -> None:
        """Write the answers of all models."""
        plain = {
            name: {field: getattr(found, field) for field in _SCORE_TYPES} for name, found in scores.items()
        }
        self._write(self._path(_QUALITY, {}), {"schema": QUALITY_SCHEMA, "scores": plain})

    def left(self, batches: Iterable[Sequence[Scenario]], seeds: Sequence[int]) -> list[Scenario]:
        """Scenarios that are still to be measured, one entry for every repeat."""
        turns = [(batch, seed) for batch in batches for seed in seeds]
        return [scenario for batch, seed in turns if not self._has(batch, seed) for scenario in batch]

    def _has(self, batch: Sequence[Scenario], seed: int) -> bool:
        path = self._turn_path(batch, seed)
        return path is not None and path.is_file()

    def _turn_path(self, batch: Sequence[Scenario], seed: int) -> Path | None:
        name = batch[0].name if len(batch) == 1 else "all"
        return self._path(f"{name}-seed{seed}", {"batch": [scenario.as_json() for scenario in batch]})

    def _path(self, name: str, facts: Mapping[str, Any]) -> Path | None:
        if self._directory is None:
            return None
        text = orjson.dumps({**self._identity, **facts}, option=orjson.OPT_SORT_KEYS)
        return self._directory / f"{name}-{hashlib.sha256(text).hexdigest()[:16]}.json"

    def _read(self, path: Path | None, schema: str) -> dict[str, Any] | None:
        if path is None or not path.is_file():
            return None
        kept = output.read_report(path)
        if kept["schema"] != schema:
            raise FormatError(f"{path}: schema is {kept['schema']!r}, not {schema!r}; remove the file.")
        for model in self._models:
            model.facts = {**kept["facts"].get(model.name, {}), **model.facts}
        return kept

    def _write(self, path: Path | None, kept: Mapping[str, Any]) -> None:
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        output.write_json({**kept, "facts": {model.name: model.facts for model in self._models}}, path)


def _identity(model: Contestant) -> dict[str, Any]:
    """What tells a contestant from another one: where it is, and its files' sizes and times."""
    files = [] if model.files is None else sorted(model.files.glob("*"))
    return {
        "name": model.name,
        "place": model.url if model.directory is None else str(model.directory.resolve()),
        "served": model.served,
        "flags": list(model.flags),
        "files": [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files if p.is_file()],
    }
