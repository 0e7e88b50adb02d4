"""``vllm-sparse bench``: run, compare, kernels, report."""

import typer

app = typer.Typer(help="Load tests and kernel tables.", no_args_is_help=True)
