"""Command line of ``python -m bench.rivals``."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from bench import output
from bench.rivals import llama, serving
from bench.rivals.checkpoints import SHAPES, write_set
from vllm_sparse.errors import UserError


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.rivals", description="2:4 against what a CPU user would run instead."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write", help="write the checkpoints of one shape")
    write.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.2-1b")
    serve = commands.add_parser("vllm", help="serve dense and 2:4 by vLLM and compare")
    serve.add_argument("--pair", choices=sorted(serving.PAIRS), action="append")
    serve.add_argument("--env", action="append", default=[], help="NAME=VALUE for every server")
    serve.add_argument("--scenario", choices=[s.name for s in serving.SCENARIOS], action="append")
    other = commands.add_parser("llama-cpp", help="compare 2:4 in vLLM with llama.cpp")
    other.add_argument("--python", required=True, help="interpreter with llama-cpp-python and gguf")
    other.add_argument("--kind", choices=sorted(llama.PAIRS), action="append")
    other.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    for command in (serve, other):
        command.add_argument("--serve-args", default="", help="more words for `vllm serve`, given as --x=y")
        command.add_argument("--repeats", type=int, default=3)
        command.add_argument("--json", type=Path, help="write the reports here")
    for command in (write, serve, other):
        command.add_argument("out", type=Path, help="folder of the checkpoints")
    return parser


def _run(args: argparse.Namespace) -> None:
    if args.command == "write":
        write_set(args.out, SHAPES[args.shape], _say)
        return
    output.check_writable(args.json)
    reports: dict[str, Any] = {}
    if args.command == "vllm":
        env = dict(word.split("=", 1) for word in args.env)
        for pair in args.pair or serving.PAIRS:
            reports[pair] = serving.compare(
                args.out, pair, args.scenario, args.repeats, args.serve_args, env, _say
            )
            _print(serving.lines(reports[pair]))
    else:
        for kind in args.kind or llama.PAIRS:
            rival = llama.Rival(args.python, args.threads)
            reports[kind] = llama.compare(args.out, kind, rival, args.repeats, args.serve_args, _say)
            _print(llama.lines(reports[kind]))
    output.write_json(reports, args.json)


def _print(lines: Any) -> None:
    for line in lines:
        sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    """Run one of the commands; 2 for what the user can mend."""
    args = _parser().parse_args()
    try:
        _run(args)
    except UserError as error:
        _say(f"error: {error}")
        return 2
    return 0
