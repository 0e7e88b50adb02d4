"""The ``vllm-sparse`` command: assembles the sub-commands and turns user errors into exit codes."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import typer

from bench.cli import app as bench_app
from converters.commands import add_commands as add_converter_commands
from converters.launch import launched_rank, rendezvous
from converters.train.cli import add_commands as add_train_commands
from vllm_sparse.errors import UserError

_INTERRUPTED = 130
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
        return _end(error.show, error.exit_code)
    except UserError as error:
        if debug:
            raise
        return _end(_writing(f"error: {error}\n"), error.exit_code)
    except OSError as error:
        if debug:
            raise
        return _end(_writing(f"error: {error.strerror or error}: {error.filename or ''}\n"), 2)
    except SystemExit:
        raise
    except (typer.Abort, KeyboardInterrupt):
        return _interrupted()
    except BaseException:
        code = _ended_elsewhere()
        if code is None:
            raise
        return code
    # Newer typer turns Ctrl-C into this exit code.
    return _interrupted() if result == _INTERRUPTED else result if isinstance(result, int) else 0


def _writing(text: str) -> Callable[[], None]:
    def write() -> None:
        sys.stderr.write(text)
        sys.stderr.flush()

    return write


def _end(say: Callable[[], None], code: int) -> int:
    """Print an error, under torchrun once for all processes; returns the exit code."""
    if rendezvous() is None:
        say()
        return code
    from converters.train import failure

    return failure.end(say, code)


def _interrupted() -> int:
    code = _ended_elsewhere()
    if code is not None:
        return code
    if launched_rank() == 0:
        sys.stderr.write("interrupted\n")
    return _INTERRUPTED


def _ended_elsewhere() -> int | None:
    """The exit code of another process's error under torchrun, if that is what ended this one."""
    if rendezvous() is None:
        return None
    from converters.train import failure

    return failure.ended_elsewhere()


def main() -> None:
    """Console script."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
