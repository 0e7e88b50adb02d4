"""Who hears about a comparison while it runs."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.fleet import Contestant
    from bench.scenarios import Scenario

Reports = dict[tuple[str, str], list[dict[str, Any]]]
"""Run reports of all repeats by (scenario name, contestant name)."""


class Observer:
    """Hears what a comparison does; does nothing itself. The terminal's live table is one."""

    def say(self, text: str) -> None:
        """Something is going on that takes a while."""

    def planned(self, runs: int) -> None:
        """How many load tests there will be."""

    def measured(self, scenario: "Scenario", model: "Contestant", reports: Reports) -> None:
        """One more load test is done; ``reports`` holds all so far."""
