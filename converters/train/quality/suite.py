"""What a quality suite is: rows, seeds, learning-rate tries and the orderings it tests. Closed YAML."""

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from converters.train.recipes import Strict, read_yaml, validate_recipe
from vllm_sparse.errors import FormatError


class Row(Strict):
    """One line of the table: a recipe, the tries its settings are chosen from, and its input.

    Attributes:
        name: also the folder of its models.
        title: in the table.
        recipe: keys of ``vllm-sparse compress``, on top of the suite's and the group's defaults.
        tries: dotted key -> values. Several keys change together: the n-th try takes the n-th value of each.
        source: a row whose models (same seed) this one starts from; the base without one.
        seeds: how many of the suite's seeds; rows without any randomness need one.
        remark: last column.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.+-]*$")
    title: str
    recipe: dict[str, Any]
    tries: dict[str, tuple[Any, ...]] = Field(default={})
    source: str | None = None
    seeds: int | None = Field(default=None, ge=1)
    remark: str = ""

    @model_validator(mode="after")
    def _check(self) -> "Row":
        lengths = {len(values) for values in self.tries.values()}
        if len(lengths) > 1 or 0 in lengths:
            raise ValueError(f"row {self.name}: every key of `tries` needs the same number of values")
        return self

    def settings(self) -> list[dict[str, Any]]:
        """The tries as ``{dotted key: value}``; one empty try when nothing is chosen."""
        if not self.tries:
            return [{}]
        return [
            dict(zip(self.tries, values, strict=True)) for values in zip(*self.tries.values(), strict=True)
        ]


class Group(Strict):
    """Rows that compare with each other: the same sparsity and, where they train, the same tokens.

    Attributes:
        title: heading.
        reference: the one-shot row whose gap to dense the others close.
        recipe: defaults of its rows.
        rows: in the order they run.
        text: printed under the heading.
    """

    title: str
    reference: str
    recipe: dict[str, Any] = Field(default={})
    rows: tuple[Row, ...] = Field(min_length=1)
    text: str = ""


class Suite(Strict):
    """A whole table.

    Attributes:
        base: recipe of the dense model, trained when ``model`` is not there.
        model: its directory.
        work: where compressed models go.
        results: JSON lines, one a run; committed, and what the table is made from.
        curve: CSV of the base's training.
        table: markdown file whose part between the markers is rewritten.
        seeds: of data order, calibration and gates; the first is the one that settings are chosen on.
        recipe: defaults of all rows.
        groups: parts of the table.
        orderings: claims ``LEFT < RIGHT`` between rows, tested on perplexity.
    """

    base: Path
    model: Path
    work: Path
    results: Path
    curve: Path
    table: Path
    seeds: tuple[int, ...] = Field(min_length=1)
    recipe: dict[str, Any] = Field(default={})
    groups: tuple[Group, ...] = Field(min_length=1)
    orderings: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> "Suite":
        names = [row.name for group in self.groups for row in group.rows]
        if len(set(names)) < len(names):
            raise ValueError(f"row names are not unique: {sorted(n for n in names if names.count(n) > 1)}")
        references = [group.reference for group in self.groups]
        sources = [row.source for group in self.groups for row in group.rows if row.source is not None]
        claimed = [name for claim in self.orderings for name in parse_ordering(claim)]
        unknown = sorted({*references, *sources, *claimed} - set(names))
        if unknown:
            raise ValueError(f"no such rows: {', '.join(unknown)}")
        return self

    def rows(self) -> Iterator[tuple[Group, Row]]:
        """All rows with their group."""
        return ((group, row) for group in self.groups for row in group.rows)

    def row(self, name: str) -> tuple[Group, Row]:
        """A row by name."""
        return next((group, row) for group, row in self.rows() if row.name == name)

    def row_seeds(self, row: Row) -> tuple[int, ...]:
        """The seeds a row runs with."""
        return self.seeds[: row.seeds]


def parse_ordering(claim: str) -> tuple[str, str]:
    """The two rows of ``LEFT < RIGHT``.

    Raises:
        ValueError: anything else.
    """
    left, sign, right = claim.partition("<")
    if not sign or not left.strip() or not right.strip():
        raise ValueError(f"ordering {claim!r}: write LEFT < RIGHT")
    return left.strip(), right.strip()


@dataclass(frozen=True)
class Job:
    """One run: a row, a seed and a try.

    Attributes:
        row: its name.
        seed: one of the suite's.
        settings: the try.
        values: the whole recipe without its paths.
        source: the row its input comes from.
    """

    row: str
    seed: int
    settings: dict[str, Any]
    values: dict[str, Any]
    source: str | None

    @property
    def key(self) -> str:
        """Changes when anything the result depends on changes, the base model apart."""
        text = json.dumps([self.row, self.seed, self.values, self.source], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def job_of(suite: Suite, group: Group, row: Row, seed: int, settings: dict[str, Any]) -> Job:
    """Merge defaults, row and try into one recipe."""
    values = merged(merged(suite.recipe, group.recipe), row.recipe)
    for path, value in settings.items():
        values = merged(values, _nested(path, value))
    values = merged(values, {"run": {"seed": seed}})
    return Job(row.name, seed, settings, values, row.source)


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """``above`` over ``below``, mappings key by key."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def _nested(path: str, value: Any) -> dict[str, Any]:
    for key in reversed(path.split(".")):
        value = {key: value}
    result: dict[str, Any] = value
    return result


def read_suite(path: Path) -> Suite:
    """Read and check a suite.

    Raises:
        FormatError: unreadable, unknown keys, wrong values.
    """
    return validate_recipe(Suite, read_yaml(path))


def tries_per_row(suite: Suite) -> dict[str, int]:
    """How many settings each row that chooses any is given."""
    return {row.name: len(row.settings()) for _, row in suite.rows() if row.tries}


def check_equal_tries(suite: Suite) -> None:
    """Every row that tunes gets the same number of tries inside its group.

    Raises:
        FormatError: a group with unequal numbers.
    """
    for group in suite.groups:
        counts = {row.name: len(row.settings()) for row in group.rows if row.tries}
        if len(set(counts.values())) > 1:
            parts = ", ".join(f"{name} {count}" for name, count in itertools.islice(counts.items(), 20))
            raise FormatError(f"group {group.title!r} gives its rows different numbers of tries: {parts}")
