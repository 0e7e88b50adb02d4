"""Progress of a comparison as plain text: a line for each server that starts and each finished load test."""

from collections.abc import Callable
from typing import Any

from bench.compare import Observer
from bench.scenarios import Scenario


class OneLineEach(Observer):
    """Tells ``say`` one line for each step.

    Args:
        say: called with the line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._planned = self._done = 0

    def say(self, text: str) -> None:
        """A step's line; a starting server's own log ("starting NAME: ...") is left to its file."""
        if ": " not in text:
            self._say(text)

    def planned(self, runs: int) -> None:
        """How many load tests there will be."""
        self._planned = runs

    def measured(self, scenario: Scenario, model: Any, reports: Any) -> None:
        """A load test is done: its headline."""
        self._done += 1
        headline = reports[scenario.name, model.name][-1]["metrics"][scenario.headline]
        shown = headline["p50"] if isinstance(headline, dict) else headline
        self._say(
            f"[{self._done}/{self._planned}] {scenario.title}, {model.name}: {scenario.headline} {shown:.1f}"
        )
