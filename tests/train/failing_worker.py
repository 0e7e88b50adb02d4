"""What test_failure starts for each process of a launch: it fails, works on, or is stuck in a call."""

import sys
import time
from datetime import timedelta

import typer

from converters.cli import run_app
from converters.train import failure
from vllm_sparse.errors import FormatError

failure.GRACE_S = 1.0
app = typer.Typer(name="worker")


@app.command()
def work(does: str) -> None:
    failure.watch()
    if does == "fails":
        raise FormatError("the model is bad")
    if does == "loops":
        for _ in range(3000):
            time.sleep(0.1)
    if does == "stuck":
        failure._connect().wait(["never"], timedelta(seconds=300))


sys.exit(run_app(app, sys.argv[1:]))
