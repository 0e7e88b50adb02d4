"""Compile the CUDA C++ kernels for any architecture, without a GPU, and say what they came out as.

``python -m vllm_sparse.kernels.cuda.compile_report [--arch 90 ...] [--json FILE]``. It needs nvcc, and
``cuobjdump`` for reading the machine code, from the CUDA toolkit or as it comes with Triton. The exit status
is 1 if an instance keeps anything in local memory, has no sparse tensor-core instruction, or no asynchronous
copy. ``wgmma_sp`` and ``wgmma_sp_tma`` are code for compute capability 9.0 only and left out for others.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from vllm_sparse.errors import UnsupportedError, UserError
from vllm_sparse.kernels.cuda import build

_NAME = re.compile(
    r"\d(mma_sp|wgmma_sp|wgmma_sp_tma)_24\w*?\d(Bf16|Fp16)(?:\d(E4m3|Int8))?\w*?Format(\d)E\w*?"
    r"Li(\d+)ELi(\d)E(?:Li(\d)E)?"
)
_WGMMA_ARCH = 90
_PRODUCTS = ("HMMA.SP", "HGMMA.SP", "QGMMA.SP", "IGMMA.SP")
# By threads, and by the tensor memory accelerator.
_COPIES = ("LDGSTS", "UTMALDG")
_FORMATS = {"0": "16-bit", "2": "int8", "3": "fp8", "4": "int4"}


@dataclass(frozen=True)
class Compiled:
    """What one instance came out as; instructions are counted in the machine code as it stands.

    Attributes:
        instance: kernel, storage of the weights, type of the activations and of the results where that is
            another, tokens a pass, rows a warp and, where they are fixed, warps.
        arch: compute capability.
        registers: per thread.
        stack_bytes: per thread; above 0 would be spilled registers.
        sparse_products: sparse tensor-core instructions.
        copies: asynchronous copies to shared memory.
        local_accesses: loads and stores of local memory.
        instructions: of the whole kernel.
    """

    instance: str
    arch: int
    registers: int
    stack_bytes: int
    sparse_products: int
    copies: int
    local_accesses: int
    instructions: int

    @property
    def is_sound(self) -> bool:
        """Whether it is what it should be."""
        return (
            not self.stack_bytes and not self.local_accesses and self.sparse_products > 0 and self.copies > 0
        )


@cache
def _cuobjdump() -> str:
    found = shutil.which("cuobjdump")
    if found:
        return found
    try:
        import triton

        return str(triton.knobs.nvidia.cuobjdump.path)
    except (ImportError, AttributeError, RuntimeError) as error:
        raise UnsupportedError("no cuobjdump: neither a CUDA toolkit's nor Triton's was found") from error


def _instance(symbol: str, arch: int) -> str | None:
    found = _NAME.search(symbol)
    if found is None:
        return None
    kernel, results, eight_bits, number, tokens, rows, warps = found.groups()
    if kernel != "mma_sp" and arch != _WGMMA_ARCH:
        return None
    activations = f"{eight_bits}->{results}" if eight_bits else results
    sizes = f"tokens={8 * int(tokens)} rows={16 * int(rows)}" + (f" warps={warps}" if warps else "")
    return f"{kernel} {_FORMATS[number]} {activations.lower()} {sizes}"


def _dump(option: str, cubin: Path) -> str:
    command = [_cuobjdump(), option, str(cubin)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def read_cubin(cubin: Path, arch: int) -> list[Compiled]:
    """Every instance in one file of machine code."""
    resources: dict[str, tuple[int, int]] = {}
    for symbol, text in re.findall(r"Function (\S+):\s*\n\s*(.*)", _dump("--dump-resource-usage", cubin)):
        registers, stack = re.search(r"REG:(\d+)", text), re.search(r"STACK:(\d+)", text)
        if registers and stack:
            resources[symbol] = int(registers[1]), int(stack[1])
    compiled = []
    for part in _dump("--dump-sass", cubin).split("Function : ")[1:]:
        symbol = part.split("\n", 1)[0].strip()
        instance = _instance(symbol, arch)
        if instance is None:
            continue
        code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", part)
        compiled.append(
            Compiled(
                instance,
                arch,
                *resources[symbol],
                sum(name.startswith(_PRODUCTS) for name in code),
                sum(name.startswith(_COPIES) for name in code),
                sum(name.startswith(("LDL", "STL")) for name in code),
                sum(not name.startswith("NOP") for name in code),
            )
        )
    return compiled


def report(source: Path, arch: int) -> list[Compiled]:
    """Compile one translation unit for one architecture and read it.

    Raises:
        UnsupportedError: no nvcc, no cuobjdump, or the compiler fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        command = build.compile_command(build.find_nvcc(), source, cubin, [arch])
        build.run([part if part != "-c" else "-cubin" for part in command])
        return read_cubin(cubin, arch)


def _line(item: Compiled) -> str:
    return (
        f"sm{item.arch:<4} {item.instance:<50} registers {item.registers:>3}  stack {item.stack_bytes}  "
        f"mma.sp {item.sparse_products:>3}  copies {item.copies:>2}  local {item.local_accesses}  "
        f"instructions {item.instructions}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", type=int, default=list(build.ARCHITECTURES))
    parser.add_argument("--only", default="", help="translation units whose name contains this")
    parser.add_argument("--json", type=Path, help="write the lines here too")
    jobs = os.cpu_count() or 1
    parser.add_argument("--jobs", type=build.positive, default=jobs, help="compilers at a time")
    chosen = parser.parse_args(arguments)
    units = [path for path in build.sources() if path.stem != "library" and chosen.only in path.stem]
    try:
        if not units:
            raise UnsupportedError(f"no translation unit's name contains {chosen.only!r}")
        with ThreadPoolExecutor(chosen.jobs) as pool:
            pairs = [(unit, arch) for arch in chosen.arch for unit in units]
            found = [item for items in pool.map(lambda pair: report(*pair), pairs) for item in items]
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    for item in found:
        sys.stdout.write(_line(item) + ("" if item.is_sound else "  <-- unsound") + "\n")
    if chosen.json:
        chosen.json.write_text(json.dumps([asdict(item) for item in found], indent=1) + "\n")
    return 0 if found and all(item.is_sound for item in found) else 1


if __name__ == "__main__":
    sys.exit(main())
