"""Small charts as inline SVG: lines, distributions, ratios with intervals, request timelines.

Colours come from CSS classes (``s0`` to ``s5`` for series), so that one page serves light and dark screens.
All functions return complete ``<svg>`` elements; all text is escaped.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

_LEFT, _RIGHT, _TOP, _BOTTOM = 62.0, 22.0, 12.0, 40.0
_MAX_POINTS = 240
# Longest label of a ratio in characters, and the mean width of one at 13 pixels.
_LABEL_LENGTH = 52
_LABEL_PIXELS = 7.2


@dataclass(frozen=True, slots=True)
class Series:
    """A line: ``style`` is the CSS class (``s0`` ...), ``step`` draws stairs (distributions)."""

    label: str
    points: Sequence[Point]
    style: str = "s0"
    dashed: bool = False
    step: bool = False
    markers: bool = False


@dataclass(frozen=True, slots=True)
class RatioRow:
    """One ratio with its interval; None for an interval that could not be estimated."""

    label: str
    value: float
    low: float | None
    high: float | None
    group: str = ""


@dataclass(frozen=True, slots=True)
class Span:
    """One request of a timeline, milliseconds; None for moments that never came."""

    scheduled: float
    dispatched: float | None
    first_token: float | None
    end: float | None
    failed: bool = False


def distribution(values: Sequence[float], label: str, style: str, *, dashed: bool = False) -> Series:
    """Empirical distribution function of ``values`` as a series of (value, share in percent)."""
    ordered = sorted(values)
    n = len(ordered)
    keep = (
        range(n)
        if n <= _MAX_POINTS
        else sorted({round(i * (n - 1) / _MAX_POINTS) for i in range(_MAX_POINTS + 1)})
    )
    points = [(ordered[i], 100 * (i + 1) / n) for i in keep]
    if points:
        points.insert(0, (ordered[0], 0.0))
    return Series(label, points, style, dashed=dashed, step=True)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover [low, high] in about ``count`` steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / max(1, count)
    magnitude = 10 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def number(value: float) -> str:
    """A short number for axes and labels."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 10_000:
        return f"{value / 1000:.4g}k"
    return f"{value:.4g}" if size >= 1 else f"{value:.3g}"


class _Canvas:
    """Maps data to pixels and collects elements."""

    def __init__(
        self, width: float, height: float, x: Sequence[float], y: Sequence[float], left: float
    ) -> None:
        self.width, self.height, self.left = width, height, left
        self._x, self._y = (x[0], x[-1]), (y[0], y[-1])
        self.parts: list[str] = []

    def x(self, value: float) -> float:
        share = (value - self._x[0]) / (self._x[1] - self._x[0])
        return self.left + share * (self.width - self.left - _RIGHT)

    def y(self, value: float) -> float:
        share = (value - self._y[0]) / (self._y[1] - self._y[0])
        return self.height - _BOTTOM - share * (self.height - _BOTTOM - _TOP)

    def text(self, x: float, y: float, text: str, anchor: str = "middle", style: str = "tick") -> None:
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{style}">{escape(text)}</text>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, style: str) -> None:
        self.parts.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{style}"/>')

    def x_axis(self, ticks: Sequence[float], label: str) -> None:
        bottom = self.height - _BOTTOM
        for tick in ticks:
            self.line(self.x(tick), _TOP, self.x(tick), bottom, "grid")
            self.text(self.x(tick), bottom + 15, number(tick))
        self.text((self.left + self.width - _RIGHT) / 2, self.height - 6, label, style="axis")

    def y_axis(self, ticks: Sequence[float], label: str) -> None:
        for tick in ticks:
            self.line(self.left, self.y(tick), self.width - _RIGHT, self.y(tick), "grid")
            self.text(self.left - 6, self.y(tick) + 4, number(tick), "end")
        middle = (_TOP + self.height - _BOTTOM) / 2
        self.parts.append(
            f'<text transform="translate(13 {middle:.1f}) rotate(-90)" text-anchor="middle" '
            f'class="axis">{escape(label)}</text>'
        )

    def svg(self, title: str) -> str:
        return (
            f'<svg viewBox="0 0 {self.width:.0f} {self.height:.0f}" role="img" '
            f'aria-label="{escape(title, quote=True)}">{"".join(self.parts)}</svg>'
        )


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    width: float = 560,
    height: float = 300,
    y_range: tuple[float, float] | None = None,
) -> str:
    """Lines over a common pair of linear axes; the x axis starts at 0 unless the data is far from it."""
    drawn = [s for s in series if s.points]
    xs = [x for s in drawn for x, _ in s.points] or [0.0, 1.0]
    ys = [y for s in drawn for _, y in s.points] or [0.0, 1.0]
    low = 0.0 if min(xs) < 0.6 * max(xs) else min(xs)
    x_ticks = nice_ticks(low, max(xs))
    y_ticks = nice_ticks(*(y_range or (min(0.0, *ys) if len(ys) > 1 else 0.0, max(ys))))
    canvas = _Canvas(width, height, x_ticks, y_ticks, _LEFT)
    canvas.x_axis(x_ticks, x_label)
    canvas.y_axis(y_ticks, y_label)
    for one in drawn:
        canvas.parts.append(_path(canvas, one))
        if one.markers:
            canvas.parts += [
                f'<circle cx="{canvas.x(x):.1f}" cy="{canvas.y(y):.1f}" r="3.5" class="dot {one.style}"/>'
                for x, y in one.points
            ]
    return canvas.svg(title)


def _path(canvas: _Canvas, series: Series) -> str:
    commands: list[str] = []
    for position, (x, y) in enumerate(series.points):
        px, py = canvas.x(x), canvas.y(y)
        if position == 0:
            commands.append(f"M{px:.1f} {py:.1f}")
        elif series.step:
            commands.append(f"H{px:.1f}V{py:.1f}")
        else:
            commands.append(f"L{px:.1f} {py:.1f}")
    dashes = " dashed" if series.dashed else ""
    return f'<path d="{"".join(commands)}" class="line {series.style}{dashes}"/>'


def legend(series: Sequence[Series]) -> str:
    """HTML legend for :func:`line_chart`."""
    items = [
        f'<span class="key {s.style}{" dashed" if s.dashed else ""}">{escape(s.label)}</span>'
        for s in series
        if s.points
    ]
    return f'<p class="legend">{"".join(items)}</p>'


def ratio_chart(rows: Sequence[RatioRow], *, title: str, width: float = 860) -> str:
    """Ratios with 95 % intervals on a logarithmic axis; right of the line at 1 the compressed model wins."""
    ends = [v for row in rows for v in (row.value, row.low, row.high) if v is not None and v > 0] or [1.0]
    low, high = math.log(min(0.9, *ends)), math.log(max(1.1, *ends))
    margin = 0.06 * (high - low)
    labels = [_shortened(row.label) for row in rows]
    left, row_height = max(150.0, 26.0 + _LABEL_PIXELS * max(map(len, labels), default=0)), 26.0
    height = _TOP + row_height * len(rows) + _BOTTOM
    canvas = _Canvas(width, height, (low - margin, high + margin), (0.0, 1.0), left)
    bottom = height - _BOTTOM
    for tick in _ratio_ticks(math.exp(low), math.exp(high)):
        x = canvas.x(math.log(tick))
        canvas.line(x, _TOP, x, bottom, "one" if tick == 1 else "grid")
        canvas.text(x, bottom + 15, f"{tick:g}×")
    canvas.text((left + width) / 2, height - 6, "ratio to dense (log scale, right is better)", style="axis")
    group = None
    for position, row in enumerate(rows):
        y = _TOP + (position + 0.5) * row_height
        if row.group != group and position:
            canvas.line(0, y - row_height / 2, width, y - row_height / 2, "grid")
        group = row.group
        canvas.text(left - 12, y + 4, labels[position], "end", "label")
        style = _verdict(row)
        if row.low is not None and row.high is not None:
            canvas.line(canvas.x(math.log(row.low)), y, canvas.x(math.log(row.high)), y, f"ci {style}")
        canvas.parts.append(
            f'<circle cx="{canvas.x(math.log(row.value)):.1f}" cy="{y:.1f}" r="5" class="dot {style}"/>'
        )
    return canvas.svg(title)


def _shortened(label: str) -> str:
    """A label that leaves the chart room: its end says which figure it is, so the beginning is cut."""
    return label if len(label) <= _LABEL_LENGTH else "…" + label[1 - _LABEL_LENGTH :]


def _verdict(row: RatioRow) -> str:
    if row.low is not None and row.low > 1:
        return "better"
    if row.high is not None and row.high < 1:
        return "worse"
    return "same"


def _ratio_ticks(low: float, high: float) -> list[float]:
    fine = (0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.75, 2, 2.5, 3)
    middle = (0.25, 0.35, 0.5, 0.7, 1, 1.4, 2, 3, 4, 6)
    coarse = (0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64)
    for choice in (fine, middle, coarse):
        ticks = [float(tick) for tick in choice if low <= tick <= high]
        if len(ticks) <= 9:
            break
    return ticks or [1.0]


def timeline(spans: Sequence[Span], *, title: str, width: float = 860, most: int = 300) -> str:
    """One bar per request: waiting in the client, waiting for the first token, generating."""
    shown = sorted(spans, key=lambda span: span.scheduled)
    if len(shown) > most:
        shown = [shown[round(i * (len(shown) - 1) / (most - 1))] for i in range(most)]
    end = max((m for s in shown for m in (s.scheduled, s.dispatched, s.end) if m is not None), default=1.0)
    pitch = max(1.2, min(12.0, 360 / max(1, len(shown))))
    height = _TOP + pitch * len(shown) + _BOTTOM
    ticks = nice_ticks(0, end / 1000, 8)
    canvas = _Canvas(width, height, ticks, (0.0, 1.0), 20.0)
    canvas.x_axis(ticks, "seconds since the start of the run")
    for position, span in enumerate(shown):
        top = _TOP + position * pitch
        dispatched = span.dispatched if span.dispatched is not None else span.scheduled
        stop = span.end if span.end is not None else end
        first = span.first_token if span.first_token is not None else stop
        _bar(canvas, span.scheduled, dispatched, top, pitch, "wait")
        _bar(canvas, dispatched, first, top, pitch, "failed" if span.failed else "prefill")
        _bar(canvas, first, stop, top, pitch, "failed" if span.failed else "decode")
    return canvas.svg(title)


def _bar(canvas: _Canvas, begin: float, end: float, top: float, pitch: float, style: str) -> None:
    x, right = canvas.x(begin / 1000), canvas.x(end / 1000)
    if right - x < 0.05:
        return
    height = max(0.8, pitch * 0.8)
    canvas.parts.append(
        f'<rect x="{x:.1f}" y="{top:.1f}" width="{right - x:.1f}" height="{height:.1f}" class="{style}"/>'
    )
