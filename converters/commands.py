"""Command-line face of inspect, convert, verify and doctor."""

import typer


def add_commands(app: typer.Typer) -> None:
    """Register the converter commands on the root ``app``."""
