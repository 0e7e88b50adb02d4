"""Progress of a run: a live bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_LINE_SECONDS = 10.0


class RunProgress:
    """Counts steps of a run with an estimate of the time left.

    Args:
        title: what runs.
        total: steps in all.
        start: steps already done, for a resumed run.
        quiet: show nothing.
    """

    def __init__(self, title: str, total: int, start: int = 0, quiet: bool = False) -> None:
        self.title = title
        self.total = total
        self._first = start
        self._console = Console(stderr=True, quiet=quiet)
        self._live = self._console.is_terminal and not quiet
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
            disable=not self._live,
        )
        self._task = self._bar.add_task(title, total=total, completed=start, figures="")
        self._began = time.monotonic()
        self._printed = self._began

    def __enter__(self) -> "RunProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, done: int, figures: Mapping[str, float] | None = None) -> None:
        """Report ``done`` steps, with figures to show beside them."""
        text = "  ".join(f"{name} {value:.4g}" for name, value in (figures or {}).items())
        if self._live:
            self._bar.update(self._task, completed=done, figures=text)
            return
        now = time.monotonic()
        if now - self._printed < _LINE_SECONDS and done < self.total:
            return
        self._printed = now
        pace = (now - self._began) / max(1, done - self._first)
        left = pace * (self.total - done)
        self._console.print(f"{self.title} {done}/{self.total}  {left:.0f} s left  {text}", highlight=False)
