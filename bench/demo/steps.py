"""Progress of the demo on the terminal: numbered steps with their times."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console


class Steps:
    """Announces what is being done and how long it took; plain lines when not on a terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.started = time.monotonic()
        self.number = 0

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Run one step."""
        self.number += 1
        self.console.print(f"[bold cyan]{self._clock()}  step {self.number}: {what}[/]")
        begun = time.monotonic()
        yield
        self.console.print(f"{self._clock()}    done in {time.monotonic() - begun:.1f} s")

    def say(self, text: str) -> None:
        """A result worth a line."""
        self.console.print(f"{self._clock()}    {text}", markup=False)

    def _clock(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self.started), 60)
        return f"{minutes:02d}:{seconds:02d}"
