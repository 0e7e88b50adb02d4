"""``python -m converters.train.quality SUITE``: run what is missing, rewrite the table."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from converters.train.threads import wait_passively

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def quality(
    suite: Annotated[Path, typer.Argument(help="Suite in YAML.")] = Path("docs/quality/suite.yaml"),
    only: Annotated[list[str] | None, typer.Option(help="Row names or patterns; all without one.")] = None,
    table: Annotated[bool, typer.Option("--table", help="Only rewrite the table from the results.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Print what is missing; run nothing.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress display.")] = False,
) -> None:
    """Train the base, run every missing row, and rewrite the table; an interrupted run continues.

    Example: python -m converters.train.quality docs/quality/suite.yaml --only 'ast*'
    """
    wait_passively()
    import logging

    from converters.train.quality.runs import jobs_of, read_results, run_suite
    from converters.train.quality.suite import check_equal_tries, read_suite
    from converters.train.quality.table import write_table

    checked = read_suite(suite)
    check_equal_tries(checked)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if plan:
        results = read_results(checked.results)
        for group, row in checked.rows():
            jobs = jobs_of(checked, group, row, results)
            done = sum(job.key in results for job in jobs)
            wanted = len(row.settings()) + len(checked.row_seeds(row)) - 1
            typer.echo(f"{row.name:28} {done} of {wanted} runs")
        return
    if not table:
        run_suite(checked, tuple(only or ("*",)), quiet)
    write_table(checked)


def main() -> int:
    """Run with errors as one paragraph."""
    from converters.cli import run_app

    return run_app(app, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
