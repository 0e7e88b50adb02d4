"""The parts of a report page, and the one template that turns them into a self-contained file.

A page needs no network: styles are inline, charts are inline SVG (:mod:`bench.svg`).
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True, slots=True)
class Tile:
    """A figure at the top; ``style`` may be ``better``, ``worse`` or ``bad``."""

    label: str
    value: str
    detail: str = ""
    style: str = ""


@dataclass(frozen=True, slots=True)
class Note:
    """A line the reader must not miss; ``kind`` ``bad`` for failures."""

    head: str
    text: str
    kind: str = "warn"


@dataclass(frozen=True, slots=True)
class Row:
    """Cells of a row; ``style`` ``better``/``worse`` colours the last cell, ``plain`` is name and text."""

    cells: Sequence[str]
    style: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Column heads and rows."""

    head: Sequence[str]
    rows: Sequence[Row]


@dataclass(frozen=True, slots=True)
class Chart:
    """An SVG of :mod:`bench.svg` with its HTML legend."""

    svg: str
    caption: str = ""
    legend: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    """A titled block: text, a table, charts (one per row if ``wide``), code, a footnote."""

    title: str
    text: str = ""
    table: Table | None = None
    charts: Sequence[Chart] = ()
    wide: bool = False
    code: Sequence[str] = ()
    foot: str = ""


@dataclass(frozen=True, slots=True)
class Page:
    """A whole report."""

    title: str
    subtitle: str = ""
    tiles: Sequence[Tile] = ()
    notes: Sequence[Note] = ()
    sections: Sequence[Section] = field(default_factory=list)

    def render(self) -> str:
        """The HTML file."""
        import jinja2
        from markupsafe import Markup

        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(_TEMPLATES),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        sections = [
            {
                "title": section.title,
                "text": section.text,
                "table": section.table,
                # Charts escape their own text.
                "charts": [
                    {"svg": Markup(chart.svg), "caption": chart.caption, "legend": Markup(chart.legend)}  # noqa: S704
                    for chart in section.charts
                ],
                "wide": section.wide,
                "code": section.code,
                "foot": section.foot,
            }
            for section in self.sections
        ]
        return environment.get_template("page.html.j2").render(
            title=self.title, subtitle=self.subtitle, tiles=self.tiles, notes=self.notes, sections=sections
        )


def facts_table(facts: Mapping[str, Any]) -> Table:
    """Two columns, name and value; empty values are left out."""
    rows = [
        Row([name, str(value)], "plain") for name, value in facts.items() if value not in (None, "", [], {})
    ]
    return Table(["", ""], rows)


def environment_section(environment: Mapping[str, Any]) -> Section:
    """What the report was measured on."""
    packages = ", ".join(f"{name} {version}" for name, version in environment.get("packages", {}).items())
    settings = ", ".join(f"{name}={value}" for name, value in environment.get("settings", {}).items())
    memory = environment.get("memory_bytes")
    gpus = "; ".join(", ".join(gpu.values()) for gpu in environment.get("gpus", []))
    facts = {
        "time": environment.get("time"),
        "machine": f"{environment.get('cpu')}, {environment.get('cores_usable')} usable cores",
        "memory": f"{memory / 2**30:.1f} GiB" if memory else "",
        "vector units": ", ".join(environment.get("cpu_flags", [])),
        "GPU": gpus,
        "system": environment.get("system"),
        "Python": environment.get("python"),
        "packages": packages,
        "settings": settings,
        "load average at the end": ", ".join(f"{x:.2f}" for x in environment.get("load_average", [])),
    }
    return Section("Environment", table=facts_table(facts))


def command_section(commands: Sequence[Sequence[str]]) -> Section:
    """The exact commands, ready to be pasted."""
    return Section("Commands", code=[shlex.join(command) for command in commands if command])


def number(value: float | None, digits: int = 2) -> str:
    """A figure for a table; a dash for what was not measured."""
    return "–" if value is None else f"{value:,.{digits}f}"


def megabytes(value: float | None) -> str:
    """Bytes as MB (10^6)."""
    return "–" if value is None else f"{value / 1e6:,.1f} MB"
