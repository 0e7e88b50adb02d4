"""Everything that wants an NVIDIA GPU, in the order in which it is worth having.

``python -m bench.gpu_session [PIECE ...]`` runs the pieces named, or all of them; ``--list`` prints their
commands, each of which is stopped after its own limit (under ten minutes, but for ``serve``). Correctness
comes first: without it no time means anything. Results and logs go to ``out/gpu``. Only ``serve`` needs vLLM;
the others need torch, Triton and pytest, ``build`` nvcc, ``sanitize`` NVIDIA's compute-sanitizer.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import processes
from bench.files import line_writer

OUT = Path("out/gpu")
_SERIAL = OUT / "serial.so"
_TESTS = "tests/kernels_gpu"
_GONE_SECONDS = 10.0
_LARGE = "28672x4096 4096x14336"
_COMPARE = f"{OUT}/compare${{VLLM_SPARSE_PREFILL:+-prefill}}"
_MAKE_MODELS = "python -m bench.gpu_models OUT makes OUT/dense and OUT/sparse"


def _pytest(*arguments: str) -> str:
    return " ".join(("python -m pytest -q -x -p no:cacheprovider", *arguments))


def _sanitized(tool: str, file: str, chosen: str) -> str:
    tests = _pytest(f"{_TESTS}/numerics/{file}", f"-k '{chosen}'")
    return f"compute-sanitizer --error-exitcode 9 --tool {tool} {tests}"


def _table(arguments: str, name: str) -> str:
    return f"python -m bench.kernels_cuda {arguments} --json {OUT}/{name}.json"


_PROBE = f"{OUT}/products_under_way"
_BUILD_PROBE = (
    "nvcc -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a -I vllm_sparse/kernels/cuda/csrc "
    f"{_TESTS}/products_under_way.cu -o {_PROBE}"
)
_MEMCHECK = _sanitized("memcheck", "test_mma_sp.py", "float_weights or quantised or stride")


@dataclass(frozen=True)
class Piece:
    """One part of a session.

    Attributes:
        name: as the command line names it.
        shows: what its result is good for.
        commands: run in turn, ``python`` is this interpreter.
        limit_s: seconds after which a command is stopped.
    """

    name: str
    shows: str
    commands: tuple[str, ...]
    limit_s: int = 580


PIECES = (
    Piece("build", "the CUDA C++ kernels for this GPU", ("python -m vllm_sparse.kernels.cuda.build",), 300),
    Piece(
        "parity",
        "every route and format against float64, graphs and torch.compile included",
        (_pytest(f"{_TESTS}/numerics", f"{_TESTS}/test_bench.py", f"{_TESTS}/test_cusparselt.py"),),
    ),
    Piece(
        "sanitize",
        "no access out of bounds, no race, no barrier that some threads miss",
        (
            _sanitized("memcheck", "test_triton.py", "every_route or quantised or adversarial"),
            _sanitized("racecheck", "test_mma_sp.py", "float_weights and dtype0"),
            _sanitized("synccheck", "test_mma_sp.py", "float_weights and dtype0"),
            # Products under way are wrong under memcheck and only there: first the instruction by itself,
            # then our kernels with one stage's products at a time, then as they are.
            f"{_BUILD_PROBE} && {_PROBE} && compute-sanitizer --tool memcheck {_PROBE}",
            f"python -m vllm_sparse.kernels.cuda.build --define SPARSE24_SERIAL_PRODUCTS --out {_SERIAL}",
            f"VLLM_SPARSE_CUDA_LIBRARY={_SERIAL} " + _MEMCHECK,
            _MEMCHECK,
        ),
    ),
    Piece(
        "table",
        "the kernel table by the default rules, against cuBLAS and the measured copy bandwidth",
        (
            _table(
                f"--shapes 4096x4096 {_LARGE} --tokens 1 8 64 --formats bf16 fp8 int4-g128", "kernels-rule"
            ),
            _table(f"--shapes {_LARGE} --tokens 4096 --formats bf16 w8a8-fp8 w8a8-int8", "kernels-large"),
        ),
    ),
    Piece(
        "tune",
        "the table that the dispatch reads, of the CUDA C++ kernels, and the kernels with it",
        (
            _table(
                f"--tune --routes mma_sp wgmma_sp --shapes 6144x4096 4096x4096 {_LARGE} "
                "--tokens 1 4 8 16 32 64 --formats bf16 fp8 int4-g128",
                "kernels-tuned",
            ),
        ),
    ),
    Piece(
        "tune-tma",
        "the same for the kernel whose copies the hardware does, from 8 tokens to prompts, W8A8 included",
        (
            _table(
                f"--tune --routes wgmma_sp_tma --shapes 6144x4096 4096x4096 {_LARGE} "
                "--tokens 64 128 256 512 4096 --formats bf16",
                "kernels-tuned-tma",
            ),
            _table(
                f"--tune --routes wgmma_sp_tma --shapes 4096x4096 {_LARGE} --tokens 64 256 4096 "
                "--formats w8a8-fp8 w8a8-int8 fp8 int4-g128",
                "kernels-tuned-tma-quantised",
            ),
            _table(
                f"--tune --routes wgmma_sp_tma --shapes 6144x4096 4096x4096 {_LARGE} "
                "--tokens 8 16 32 --formats bf16 fp8 int4-g128",
                "kernels-tuned-tma-decode",
            ),
        ),
    ),
    Piece(
        "prefill",
        "where cuSPARSELt's form of the weights pays beside ours: each alone, both together, dense",
        (
            _table(
                f"--shapes 6144x4096 4096x4096 {_LARGE} --tokens 128 256 512 1024 2048 4096 8192 "
                "--formats bf16 --backends triton cuda cusparselt triton+cusparselt",
                "kernels-prefill",
            ),
        ),
    ),
    Piece(
        "stack",
        "a decode step of a Llama-3.1-8B-shaped stack, one CUDA graph, against dense",
        (f"python -m bench.decode_stack --backends triton cuda --m 1 8 64 --json {OUT}/stack.json",),
    ),
    Piece(
        "serve",
        f"two real servers, dense against 2:4, in the folders DENSE and SPARSE; {_MAKE_MODELS}; with "
        "VLLM_SPARSE_PREFILL=cusparselt set, 2:4 with both forms of its weights",
        (
            # A dense model's server has no layer that would read the variable.
            'python -m converters.cli bench compare --dense "$DENSE" --compressed "$SPARSE" '
            "${VLLM_SPARSE_PREFILL:+--env VLLM_SPARSE_PREFILL=$VLLM_SPARSE_PREFILL} "
            f"--json {_COMPARE}.json --html {_COMPARE}.html",
        ),
        3600,
    ),
)


def run_piece(piece: Piece, say: Callable[[str], None]) -> int:
    """Run its commands, output to the terminal; the first exit status that is not 0, 124 for out of time."""
    for command in piece.commands:
        say(f"[{piece.name}] {command}")
        # The names after $ are the shell's; the interpreter is ours wherever it stands.
        line = command.replace("python -m", f"{shlex.quote(sys.executable)} -m")
        status = _run_command(line, piece.limit_s)
        if status is None:
            say(f"[{piece.name}] stopped after {piece.limit_s} s")
            return 124
        if status:
            return status
    return 0


def _run_command(line: str, limit_s: float) -> int | None:
    """The exit status of a line of shell, None if it was stopped; then nothing that it began is left.

    Compilers, workers or servers that go on would hold the GPU while the next command is timed.
    """
    with subprocess.Popen(["bash", "-c", line]) as shell:
        try:
            return shell.wait(limit_s)
        except subprocess.TimeoutExpired:
            left = processes.family(shell.pid)
            processes.send_signal(left, signal.SIGKILL)
            processes.wait_gone(left, _GONE_SECONDS)
            return None


def run(pieces: Sequence[Piece], keep_going: bool, say: Callable[[str], None]) -> int:
    """Run pieces in order, to the first that fails unless told otherwise; exit status 1 if one failed."""
    failed = []
    for piece in pieces:
        status = run_piece(piece, say)
        say(f"[{piece.name}] {'ok' if not status else f'failed with {status}'}: {piece.shows}")
        if status:
            failed.append(piece.name)
            if not keep_going:
                break
    return 1 if failed else 0


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [piece.name for piece in PIECES]
    parser.add_argument("pieces", nargs="*", metavar="PIECE", help=", ".join(names))
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    parser.add_argument("--keep-going", action="store_true", help="go on after a piece that failed")
    chosen = parser.parse_args(arguments)

    say = line_writer(sys.stdout)
    unknown = [name for name in chosen.pieces if name not in names]
    if unknown:
        sys.stderr.write(f"no piece {unknown[0]!r}; there are {', '.join(names)}\n")
        return 2
    wanted = [piece for piece in PIECES if not chosen.pieces or piece.name in chosen.pieces]
    if chosen.list:
        for piece in wanted:
            say(f"# {piece.name}: {piece.shows}")
            for command in piece.commands:
                say(command)
        return 0
    import torch

    if not torch.cuda.is_available():
        sys.stderr.write("no NVIDIA GPU that torch can use; --list shows what would run\n")
        return 2
    if any(piece.name == "serve" for piece in wanted) and not {"DENSE", "SPARSE"} <= set(os.environ):
        if "serve" in chosen.pieces:
            sys.stderr.write(f"serve needs the folders of both models in DENSE and SPARSE; {_MAKE_MODELS}\n")
            return 2
        say("[serve] left out: DENSE and SPARSE do not name two models")
        wanted = [piece for piece in wanted if piece.name != "serve"]
    OUT.mkdir(parents=True, exist_ok=True)
    return run(wanted, chosen.keep_going, say)


if __name__ == "__main__":
    sys.exit(main())
