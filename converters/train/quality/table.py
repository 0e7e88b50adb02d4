"""The markdown table and the verdicts on orderings, made from the results alone."""

import csv
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from converters.train.quality.runs import Result, chosen_jobs, read_results
from converters.train.quality.suite import Group, Row, Suite, parse_ordering
from vllm_sparse.errors import FormatError

BEGIN, END = "<!-- begin: generated from the results -->", "<!-- end -->"


@dataclass(frozen=True)
class Figure:
    """A mean over seeds with its standard error (0 for one seed).

    Attributes:
        mean: of the values.
        error: sample deviation over the root of their number.
        count: values.
    """

    mean: float
    error: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Figure":
        """Of at least one value."""
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
        return cls(statistics.fmean(values), error, len(values))

    def text(self, digits: int = 2, scale: float = 1.0, unit: str = "") -> str:
        """``mean ± error``; the bare value of a single run."""
        value = f"{self.mean * scale:.{digits}f}{unit}"
        return value if self.count == 1 else f"{value} ± {self.error * scale:.{digits}f}"


@dataclass(frozen=True)
class Line:
    """One finished row: its chosen runs."""

    row: Row
    runs: tuple[Result, ...]
    wanted: int
    settings: dict[str, object]
    at_edge: bool

    @property
    def perplexity(self) -> Figure:
        """Over seeds."""
        return Figure.of([run["perplexity"] for run in self.runs])


def lines_of(suite: Suite, group: Group, results: dict[str, Result]) -> list[Line]:
    """The rows of a group whose settings are chosen, with the seeds done so far."""
    lines = []
    for row in group.rows:
        jobs = chosen_jobs(suite, group, row, results)
        if jobs:
            tries = row.settings()
            edge = len(tries) > 2 and jobs[0].settings in (tries[0], tries[-1])
            runs = tuple(results[job.key] for job in jobs)
            lines.append(Line(row, runs, len(suite.row_seeds(row)), jobs[0].settings, edge))
    return lines


def dense_perplexity(results: dict[str, Result], suite: Suite) -> float:
    """Of the base: what rows that start from it measured before they began.

    Raises:
        FormatError: no such row, or they disagree because the base changed under the results.
    """
    direct = {row.name for _, row in suite.rows() if row.source is None}
    found = {round(run["input_perplexity"], 6) for run in results.values() if run["row"] in direct}
    if len(found) != 1:
        raise FormatError(
            f"{suite.results} holds runs of {len(found)} base models (dense perplexities {sorted(found)}); "
            "a table needs exactly one. Move the old results away and run again."
        )
    return found.pop()


def gap_closed(line: Line, reference: Figure, dense: float) -> Figure:
    """``(one-shot - method) / (one-shot - dense)`` of each seed against the one-shot row's mean."""
    gap = reference.mean - dense
    return Figure.of([(reference.mean - run["perplexity"]) / gap for run in line.runs])


def group_table(suite: Suite, group: Group, results: dict[str, Result], dense: float) -> str:
    """One group as markdown."""
    lines = lines_of(suite, group, results)
    reference = next((line.perplexity for line in lines if line.row.name == group.reference), None)
    out = [f"### {group.title}", ""]
    if group.text:
        out += [group.text, ""]
    out += [
        "| method | perplexity | gap closed | seeds | tokens | CPU s | blocks removed | chosen | remarks |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        out.append(_table_row(line, reference, group.reference, dense))
    missing = [row.name for row in group.rows if row.name not in {line.row.name for line in lines}]
    if missing:
        out += ["", f"Not run yet: {', '.join(missing)}."]
    return "\n".join(out)


def _table_row(line: Line, reference: Figure | None, reference_name: str, dense: float) -> str:
    closed = "" if reference is None else gap_closed(line, reference, dense).text(0, 100, " %")
    if line.row.name == reference_name:
        closed = "0 %"
    tokens = max(run["figures"].get("training_tokens", 0) for run in line.runs)
    removed = [run["figures"]["block_sparsity"] for run in line.runs if "block_sparsity" in run["figures"]]
    settings = ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in line.settings.items())
    cells = (
        line.row.title,
        line.perplexity.text(2),
        closed,
        f"{len(line.runs)} of {line.wanted}" if len(line.runs) < line.wanted else str(line.wanted),
        f"{tokens / 1e6:.2f}M" if tokens else "",
        f"{statistics.fmean(run['cpu_seconds'] for run in line.runs):.0f}",
        Figure.of(removed).text(1, 100, " %") if removed else "",
        settings + (" (edge)" if line.at_edge else ""),
        line.row.remark,
    )
    return "| " + " | ".join(cells) + " |"


def verdict(left: Figure, right: Figure) -> str:
    """Whether ``left < right`` holds, and by how many standard errors of the difference."""
    difference = right.mean - left.mean
    error = math.hypot(left.error, right.error)
    if error == 0.0:
        return f"{'holds' if difference > 0 else 'does not hold'} (no spread)"
    size = f"{difference:+.2f}, {difference / error:+.1f} standard errors"
    if difference > error:
        return f"holds ({size})"
    return f"does not hold ({size})" if difference < -error else f"undecided ({size})"


def ordering_table(suite: Suite, results: dict[str, Result]) -> str:
    """Claims and what the runs say."""
    figures = {
        line.row.name: line.perplexity for group in suite.groups for line in lines_of(suite, group, results)
    }
    out = ["| claim (perplexity) | verdict |", "|---|---|"]
    for claim in suite.orderings:
        left, right = parse_ordering(claim)
        known = left in figures and right in figures
        text = verdict(figures[left], figures[right]) if known else "not run yet"
        out.append(f"| {left} < {right} | {text} |")
    return "\n".join(out)


def curve_table(path: Path) -> str:
    """The base's training as markdown."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = (
        ("steps", [row["steps"] for row in rows]),
        ("training loss", [f"{float(row['training_loss']):.3f}" for row in rows]),
        ("held-out perplexity", [_short(row["heldout_perplexity"]) for row in rows]),
    )
    head, *body = ("| " + " | ".join([name, *values]) + " |" for name, values in columns)
    return "\n".join([head, "|" + "---|" * (len(rows) + 1), *body])


def _short(number: str) -> str:
    return f"{float(number):.2f}" if number else ""


def render(suite: Suite) -> str:
    """Everything between the markers."""
    results = read_results(suite.results)
    dense = dense_perplexity(results, suite)
    parts = [
        "### Training of the base",
        "",
        curve_table(suite.curve),
        "",
        f"Dense perplexity: **{dense:.2f}**.",
    ]
    for group in suite.groups:
        parts += ["", group_table(suite, group, results, dense)]
    parts += ["", "### Orderings", "", ordering_table(suite, results)]
    return "\n".join(parts)


def insert(page: str, generated: str, name: str) -> str:
    """``page`` with what is between the markers replaced.

    Raises:
        FormatError: the markers are not there.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise FormatError(f"{name} lacks the lines {BEGIN!r} and {END!r} that the table goes between")
    return f"{before}{BEGIN}\n{generated}\n{END}{after}"


def write_table(suite: Suite) -> None:
    """Rewrite the page's generated part."""
    page = suite.table.read_text(encoding="utf-8")
    suite.table.write_text(insert(page, render(suite), str(suite.table)), encoding="utf-8")
