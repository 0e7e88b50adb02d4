"""Command-line face of compress and eval."""

import typer


def add_commands(app: typer.Typer) -> None:
    """Register the training commands on the root ``app``."""
