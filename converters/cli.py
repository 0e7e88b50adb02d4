"""The ``vllm-sparse`` command: assembles the sub-commands and turns user errors into exit codes."""

import sys
from collections.abc import Sequence
from typing import Any

import typer

from bench.cli import app as bench_app
from converters.commands import add_commands as add_converter_commands
from converters.train.cli import add_commands as add_train_commands
from vllm_sparse.errors import UserError

# typer carries click inside itself in newer releases and uses the separate package in older ones.
_ClickError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def build_app() -> typer.Typer:
    """All sub-commands on one root; heavy imports happen inside the commands."""
    app = typer.Typer(
        name="vllm-sparse",
        help="Compressed LLMs that really run faster: inspect, convert, verify, compress, measure.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    add_converter_commands(app)
    add_train_commands(app)
    app.add_typer(bench_app, name="bench")
    return app


def run(argv: Sequence[str]) -> int:
    """Run the ``vllm-sparse`` command line."""
    return run_app(build_app(), argv)


def run_app(app: typer.Typer, argv: Sequence[str]) -> int:
    """Run an app's command line; 0 ok, 1 the check failed, 2 bad usage or bad input.

    ``--debug`` anywhere on the line shows the traceback behind an error.
    """
    debug = "--debug" in argv
    arguments = [word for word in argv if word != "--debug"]
    try:
        result = app(args=arguments, prog_name=app.info.name, standalone_mode=False)
    except _ClickError as error:
        error.show()
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        sys.stderr.write("interrupted\n")
        return 130
    except UserError as error:
        if debug:
            raise
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except OSError as error:
        if debug:
            raise
        sys.stderr.write(f"error: {error.strerror or error}: {error.filename or ''}\n")
        return 2
    return result if isinstance(result, int) else 0


def main() -> None:
    """Console script."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
