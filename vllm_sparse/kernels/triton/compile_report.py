"""Compile the kernels ahead of time for any architecture, without a GPU, and say what they came out as.

``python -m vllm_sparse.kernels.triton.compile_report [--arch 90 ...] [--json FILE]``. It needs only Triton
and the assembler that comes with it, so a build machine can show that every kernel compiles for every
supported architecture, how many registers it takes and that nothing spills.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_sparse.kernels.base import WeightFormat
from vllm_sparse.kernels.triton import decode
from vllm_sparse.kernels.triton.configs import (
    EXPERT_CONFIG,
    EXPERT_DOT_CONFIG,
    Config,
    Machine,
    Route,
    Shape,
    default_config,
)
from vllm_sparse.kernels.triton.dot_kernel import dot_24, experts_dot_24
from vllm_sparse.kernels.triton.layout import FORMAT_NUMBER
from vllm_sparse.kernels.triton.select_kernel import select_24
from vllm_sparse.kernels.triton.side_kernels import expand_24, quantize_tokens, sum_splits_24

# Shared memory one program may use, per compute capability (CUDA C++ Programming Guide, technical
# specifications per compute capability).
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
ARCHITECTURES = tuple(SHARED_BYTES)
_POINTER_DTYPE = {True: "*fp16", False: "*bf16"}
# What the launcher would find out: addresses and these sizes are multiples of 16 for real layers.
_DIVISIBLE = {"n", "k", "stride_x", "metadata_offset", "expert_bytes", "expert_scales"}


@dataclass(frozen=True)
class Variant:
    """One kernel with all its compile-time constants."""

    kernel: Any
    label: str
    pointers: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True)
class Compiled:
    """What a variant came out as on one architecture; bytes per program or thread as named."""

    label: str
    arch: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    asynchronous_copies: int
    tensor_core: str


def _pointers(weight: WeightFormat, half: bool, split: bool, scales: int) -> dict[str, str]:
    x = _POINTER_DTYPE[half]
    found = {"x_ptr": x, "packed_ptr": "*u8", "y_ptr": "*fp32" if split else x}
    if scales:
        found["scale_ptr"] = "*bf16" if scales == decode.PER_GROUP.value else "*fp32"
    return found


def product_variant(shape: Shape, m: int, config: Config, half: bool, group: int) -> Variant:
    """The multiplying kernel that ``config`` launches for one problem."""
    if shape.weight in (WeightFormat.BF16, WeightFormat.FP16):
        scales = decode.NO_SCALE.value
    else:
        scales = decode.PER_GROUP.value if group else decode.PER_CHANNEL.value
    constants = {
        "FORMAT": FORMAT_NUMBER[shape.weight],
        "SCALES": scales,
        "GROUP": group,
        "TOKEN_SCALES": False,
        "BIAS": False,
        "TOKENS": config.tokens,
        "BLOCK_N": config.block_n,
        "PARTIAL": config.split_k > 1,
        "STAGES": config.stages,
    }
    kernel = dot_24
    if config.route is Route.SELECT:
        kernel = select_24
        constants |= {"HALF": half, "EXPERTS": False}
    pointers = _pointers(shape.weight, half, config.split_k > 1, scales)
    label = f"{config.route.value} {shape.weight.value}{f' g{group}' if group else ''} m={m}"
    return Variant(kernel, label, pointers, constants, config.warps, config.stages)


def expert_variants(half: bool) -> Iterator[Variant]:
    """The kernels over experts."""
    for weight, group in ((WeightFormat.FP16 if half else WeightFormat.BF16, 0), (WeightFormat.INT4, 128)):
        plain = product_variant(Shape(weight, 1536, 2048), 1, EXPERT_CONFIG, half, group)
        yield replace(
            plain,
            label=f"experts {weight.value}{f' g{group}' if group else ''}",
            pointers={**plain.pointers, "expert_ptr": "*i32"},
            constants={**plain.constants, "EXPERTS": True},
        )
        dense = product_variant(Shape(weight, 1536, 2048), 16, EXPERT_DOT_CONFIG, half, group)
        yield replace(
            dense,
            kernel=experts_dot_24,
            label=f"experts dot {weight.value}{f' g{group}' if group else ''}",
            pointers={**dense.pointers, "pair_ptr": "*i32", "block_expert_ptr": "*i32"},
            constants={
                name: value for name, value in dense.constants.items() if name not in ("BIAS", "PARTIAL")
            },
        )


def side_variants(half: bool) -> Iterator[Variant]:
    """The kernels around the products."""
    x = _POINTER_DTYPE[half]
    yield Variant(
        sum_splits_24,
        "sum_splits",
        {"partial_ptr": "*fp32", "scale_ptr": "*fp32", "token_scale_ptr": "*fp32", "bias_ptr": x, "y_ptr": x},
        {
            "FORMAT": FORMAT_NUMBER[WeightFormat.FP8_E4M3],
            "SCALES": decode.PER_CHANNEL.value,
            "TOKEN_SCALES": True,
            "BIAS": True,
            "SPLIT_K": 4,
            "BLOCK_N": 256,
        },
    )
    for weight, scales, group in (
        (WeightFormat.FP16 if half else WeightFormat.BF16, decode.NO_SCALE.value, 0),
        (WeightFormat.INT8, decode.PER_CHANNEL.value, 0),
        (WeightFormat.FP8_E4M3, decode.PER_CHANNEL.value, 0),
        (WeightFormat.INT4, decode.PER_GROUP.value, 128),
    ):
        yield Variant(
            expand_24,
            f"expand {weight.value}",
            {"packed_ptr": "*u8", "scale_ptr": "*bf16" if group else "*fp32", "dense_ptr": x},
            {"FORMAT": FORMAT_NUMBER[weight], "SCALES": scales, "GROUP": group, "BLOCK_N": 16},
        )
    for fp8 in (False, True):
        yield Variant(
            quantize_tokens,
            f"quantize {'fp8' if fp8 else 'int8'}",
            {"x_ptr": x, "q_ptr": x, "token_scale_ptr": "*fp32"},
            {"FP8": fp8, "BLOCK": 1024},
        )


def default_variants(arch: int, half: bool = False) -> Iterator[Variant]:
    """Every kernel in the configurations that the default rule picks for a 4096x4096 layer on ``arch``."""
    machine = Machine(f"sm{arch}", divmod(arch, 10), 132, SHARED_BYTES[arch])
    plain = WeightFormat.FP16 if half else WeightFormat.BF16
    for weight, group in (
        (plain, 0),
        (WeightFormat.INT8, 0),
        (WeightFormat.FP8_E4M3, 0),
        (WeightFormat.INT4, 128),
        (WeightFormat.INT4, 32),
    ):
        shape = Shape(weight, 4096, 4096)
        for m in (1, 16, 64):
            yield product_variant(shape, m, default_config(shape, m, machine), half, group)
    for m in (2, 128):
        shape = Shape(plain, 4096, 4096)
        yield product_variant(shape, m, default_config(shape, m, machine), half, 0)
    yield from expert_variants(half)
    yield from side_variants(half)


def compile_variant(variant: Variant, arch: int) -> Any:
    """Triton's compiled kernel for compute capability ``arch`` (for example 90)."""
    names = variant.kernel.arg_names
    constants = dict(variant.constants)
    signature = {}
    for name in names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in variant.pointers:
            signature[name] = variant.pointers[name]
        elif name.endswith("_ptr"):
            # An operand that is None at launch is a constant too.
            signature[name], constants[name] = "constexpr", None
        else:
            signature[name] = "i32"
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*") or name in _DIVISIBLE
    }
    source = ASTSource(variant.kernel, signature, constants, aligned)
    options = {"num_warps": variant.warps, "num_stages": variant.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack (spill) bytes per thread, read by cuobjdump."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    registers, stack = re.search(r"REG:(\d+)", text), re.search(r"STACK:(\d+)", text)
    return (int(registers[1]) if registers else -1), (int(stack[1]) if stack else -1)


def _tensor_core(ptx: str) -> str:
    for instruction in ("tcgen05.mma", "wgmma.mma_async", "mma.sync"):
        if instruction in ptx:
            return instruction
    return "none"


def report(variant: Variant, arch: int) -> Compiled:
    """Compile and read off what a tuner wants to know."""
    compiled = compile_variant(variant, arch)
    registers, stack = _resources(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    return Compiled(
        variant.label,
        arch,
        registers,
        stack,
        compiled.metadata.shared,
        ptx.count("cp.async.cg") + ptx.count("cp.async.ca") + ptx.count("cp.async.bulk.tensor"),
        _tensor_core(ptx),
    )


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit status 1 if a kernel does not compile, spills or takes too much shared memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--json", type=Path, help="also write the table as JSON")
    parser.add_argument("--only", default="", help="kernels whose label contains this")
    chosen = parser.parse_args(arguments)
    rows = []
    bad = 0
    for arch in chosen.arch:
        for variant in (variant for variant in default_variants(arch) if chosen.only in variant.label):
            row = report(variant, arch)
            rows.append(row)
            fits = row.spilled_bytes == 0 and row.shared_bytes <= SHARED_BYTES[arch]
            bad += not fits
            sys.stdout.write(
                f"sm{arch:<4} {row.label:<28} {row.registers:>4} registers {row.spilled_bytes:>5} B spilled "
                f"{row.shared_bytes:>7} B shared {row.asynchronous_copies:>4} async copies  {row.tensor_core}"
                f"{'' if fits else '  TOO MUCH'}\n"
            )
    if not rows:
        parser.error(f"no kernel's label contains {chosen.only!r}")
    if chosen.json:
        chosen.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
