"""The kernel table on an NVIDIA GPU, and tuning of the Triton kernels.

``python -m bench.kernels_cuda --json OUT`` measures; with ``--tune`` it first searches configurations and
writes the table that the backend reads (``vllm_sparse/kernels/triton/tuned/``). ``vllm-sparse bench kernels``
shows the same table on a machine with a GPU.
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.cuda_dense import Baseline, baselines
from bench.cuda_timing import Timing, cache_bytes, copies_needed, copy_bandwidth, time_together
from bench.environment import describe
from bench.files import STANDARD_OUTPUT, check_writable, line_writer, write_document
from vllm_sparse.errors import UnsupportedError, UserError
from vllm_sparse.kernels.base import ActivationQuant, CanonicalWeight, LinearSpec, WeightFormat
from vllm_sparse.kernels.dispatch import available_backends, get_backend
from vllm_sparse.kernels.triton.configs import Route

logger = logging.getLogger(__name__)

SCHEMA = "vllm-sparse/bench-kernels/1"
# Llama-3.1-8B: qkv, o, gate_up, down (fused as vLLM fuses them).
DEFAULT_SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
DEFAULT_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 4096)
_NONE, _INT8, _FP8 = ActivationQuant.NONE, ActivationQuant.INT8_PER_TOKEN, ActivationQuant.FP8_PER_TOKEN
FORMATS: dict[str, tuple[WeightFormat, ActivationQuant, int | None]] = {
    "bf16": (WeightFormat.BF16, _NONE, None),
    "int8": (WeightFormat.INT8, _NONE, None),
    "w8a8-int8": (WeightFormat.INT8, _INT8, None),
    "fp8": (WeightFormat.FP8_E4M3, _NONE, None),
    "w8a8-fp8": (WeightFormat.FP8_E4M3, _FP8, None),
    "int4-g128": (WeightFormat.INT4, _NONE, 128),
}
_MOST_JOBS = 32
BACKENDS = ("triton", "cuda", "cusparselt")
Timer = Callable[[dict[str, Sequence[Callable[[], object]]]], dict[str, Timing]]


@dataclass(frozen=True)
class Row:
    """One line of the table; fields up to ``ratio_vs_vllm_dense`` are the published contract.

    Attributes:
        gbs: resident weight bytes per time, GB/s.
        limit_fraction: that over the measured copy bandwidth.
        ratio_vs_best_dense: time of the fastest dense product over this one's; above 1 is faster.
        ratio_vs_vllm_dense: the same against what vLLM runs for the dense format, if it has that here.
        note: why a figure is missing.
    """

    format: str
    backend: str
    n: int
    k: int
    m: int
    us: float | None
    gbs: float | None
    limit_fraction: float | None
    ratio_vs_best_dense: float | None
    ratio_vs_vllm_dense: float | None
    us_best: float | None = None
    note: str | None = None


def make_spec(name: str, n: int, k: int) -> LinearSpec:
    """A layer of one of :data:`FORMATS`.

    Raises:
        UnsupportedError: there is no such format.
    """
    if name not in FORMATS:
        raise UnsupportedError(f"no format {name!r} to measure; there are {', '.join(FORMATS)}")
    weight, quant, group = FORMATS[name]
    return LinearSpec(n, k, weight, torch.bfloat16, quant, group)


def random_weight(spec: LinearSpec, device: torch.device) -> CanonicalWeight:
    """A 2:4 weight with random values and patterns."""
    dtype = {WeightFormat.BF16: torch.bfloat16, WeightFormat.FP8_E4M3: torch.float8_e4m3fn}.get(
        spec.weight, torch.int8
    )
    values = torch.randint(-8, 8, (spec.n, spec.k // 2), device=device).to(torch.float32).to(dtype)
    nibbles = torch.tensor([3, 5, 6, 9, 10, 12], dtype=torch.uint8, device=device)
    low, high = (nibbles[torch.randint(0, 6, (spec.n, spec.k // 8), device=device)] for _ in range(2))
    if spec.weight is WeightFormat.BF16:
        return CanonicalWeight(values, low | high << 4)
    groups = 1 if spec.group_size is None else spec.k // spec.group_size
    return CanonicalWeight(values, low | high << 4, torch.full((spec.n, groups), 0.0625, device=device))


def _sparse_calls(
    name: str, spec: LinearSpec, m: int, device: torch.device, cache: int
) -> tuple[list[Callable[[], object]], int]:
    """One call per copy of the packed weight, and the bytes of one copy."""
    backend = get_backend(name)
    reason = backend.unsupported_reason(spec, device)
    if reason is not None:
        raise UnsupportedError(reason)
    packed = backend.pack(spec, random_weight(spec, device))
    size = packed.packed.nbytes + (0 if packed.scale is None else packed.scale.nbytes)
    x = torch.randn(m, spec.k, device=device, dtype=spec.activation_dtype)

    def call(weight: Tensor) -> Callable[[], object]:
        return lambda: backend.linear(spec, x, weight, packed.scale, None)

    copies = [packed.packed] + [packed.packed.clone() for _ in range(copies_needed(size, cache) - 1)]
    return [call(copy) for copy in copies], size


def _dense_calls(baseline: Baseline, m: int, device: torch.device, cache: int) -> list[Callable[[], object]]:
    count = copies_needed(baseline.weight_bytes, cache)
    return [baseline.make(device, m) for _ in range(count)]


def measure(
    name: str,
    spec: LinearSpec,
    m: int,
    device: torch.device,
    bandwidth: float,
    cache: int,
    backends: Iterable[str] = BACKENDS,
    timer: Timer = time_together,
) -> list[Row]:
    """Time one layer at one token count on every backend and every dense baseline, in turns."""
    calls: dict[str, Sequence[Callable[[], object]]] = {}
    sizes: dict[str, int] = {}
    notes: dict[str, str] = {}
    dense = {baseline.name: baseline for baseline in baselines(spec)}
    for backend in backends:
        try:
            calls[backend], sizes[backend] = _sparse_calls(backend, spec, m, device, cache)
        except (UserError, RuntimeError) as error:
            notes[backend] = _one_line(error)
    for baseline in dense.values():
        try:
            built = _dense_calls(baseline, m, device, cache)
            built[0]()
            calls[baseline.name] = built
        except (ImportError, AttributeError, TypeError, RuntimeError) as error:
            notes[baseline.name] = _one_line(error)
            logger.warning("%s cannot run %dx%d: %s", baseline.name, spec.n, spec.k, notes[baseline.name])
    timings = timer(calls)
    best_dense = min((timings[n].median for n in dense if n in timings), default=None)
    vllm_dense = min((timings[n].median for n, b in dense.items() if b.vllm and n in timings), default=None)
    rows = []
    for competitor in (*backends, *dense):
        shape = (name, competitor, spec.n, spec.k, m)
        if competitor not in timings:
            rows.append(Row(*shape, None, None, None, None, None, note=notes[competitor]))
            continue
        timing = timings[competitor]
        size = sizes.get(competitor) or dense[competitor].weight_bytes
        gbs = size / timing.median / 1e3
        ratios = (_ratio(best_dense, timing), _ratio(vllm_dense, timing))
        rows.append(Row(*shape, timing.median, gbs, gbs / bandwidth, *ratios, us_best=timing.best))
    return rows


def _ratio(dense: float | None, timing: Timing) -> float | None:
    return None if dense is None else dense / timing.median


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def table(
    shapes: Iterable[tuple[int, int]] = DEFAULT_SHAPES,
    tokens: Iterable[int] = DEFAULT_TOKENS,
    formats: Iterable[str] = tuple(FORMATS),
    progress: Callable[[str], None] = lambda line: None,
    backends: Sequence[str] = BACKENDS,
) -> dict[str, Any]:
    """The whole document of ``vllm-sparse bench kernels`` on this machine's GPU.

    ``read_bandwidth_gbs`` is the measured copy bandwidth (bytes read plus written).

    Raises:
        UnsupportedError: no NVIDIA GPU.
    """
    if not torch.cuda.is_available():
        raise UnsupportedError("no NVIDIA GPU that torch can use; the GPU kernel table needs one")
    device = torch.device("cuda", torch.cuda.current_device())
    bandwidth = copy_bandwidth(device)
    progress(f"{torch.cuda.get_device_name(device)}: copy bandwidth {bandwidth:.0f} GB/s")
    rows: list[Row] = []
    tokens, formats = tuple(tokens), tuple(formats)
    for n, k in shapes:
        for name in formats:
            for m in tokens:
                spec = make_spec(name, n, k)
                measured = measure(name, spec, m, device, bandwidth, cache_bytes(device), backends)
                rows += measured
                for row in measured:
                    progress(_line(row))
                torch.cuda.empty_cache()
    return {
        "schema": SCHEMA,
        "device": torch.cuda.get_device_name(device),
        "read_bandwidth_gbs": bandwidth,
        "threads": 0,
        "environment": describe(),
        "rows": [asdict(row) for row in rows],
    }


def _line(row: Row) -> str:
    head = f"{row.format:<10} {row.backend:<26} {row.n:>6}x{row.k:<6} m={row.m:<5}"
    if row.us is None:
        return f"{head} not run: {row.note}"
    return (
        f"{head} {row.us:>9.1f} us {row.gbs:>6.0f} GB/s {row.limit_fraction:>5.0%} of copy  "
        f"x{row.ratio_vs_best_dense or 0:.2f} of best dense"
    )


def command(
    shapes: list[tuple[int, int]] | None,
    tokens: list[int] | None,
    formats: str | None,
    json_path: Path | None,
) -> int:
    """``vllm-sparse bench kernels`` on a machine with a GPU; None takes this module's defaults.

    Raises:
        UnsupportedError: a format that is not measured on GPUs.
    """
    import typer

    from bench.output import write_json

    names = list(FORMATS) if formats is None else [part.strip() for part in formats.split(",")]
    quiet = json_path == STANDARD_OUTPUT
    document = table(
        shapes or DEFAULT_SHAPES,
        tokens or DEFAULT_TOKENS,
        names,
        (lambda line: None) if quiet else typer.echo,
    )
    write_json(document, json_path)
    return 0


def _shape(text: str) -> tuple[int, int]:
    n, _, k = text.partition("x")
    if not (n.isdigit() and k.isdigit() and int(n) and int(k)) or int(k) % 8:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not NxK, output by input features, K a multiple of 8; for example 4096x4096"
        )
    return int(n), int(k)


def _count(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the table here")
    parser.add_argument("--shapes", nargs="+", type=_shape, metavar="NxK", default=list(DEFAULT_SHAPES))
    parser.add_argument("--tokens", nargs="+", type=_count, default=list(DEFAULT_TOKENS))
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=available_backends())
    parser.add_argument("--tune", action="store_true", help="search configurations first")
    parser.add_argument(
        "--routes",
        nargs="+",
        type=Route,
        default=list(Route),
        choices=list(Route),
        metavar="ROUTE",
        help=f"kernels that --tune searches: {', '.join(Route)}",
    )
    # Each process holds a CUDA context of about half a gigabyte.
    jobs = min(os.cpu_count() or 1, _MOST_JOBS)
    parser.add_argument("--jobs", type=int, default=jobs, help="processes that compile for --tune")
    chosen = parser.parse_args(arguments)
    say = line_writer(sys.stderr if chosen.json == STANDARD_OUTPUT else sys.stdout)

    try:
        check_writable(chosen.json)
        if chosen.tune:
            from bench.kernels_tune import tune

            tune(chosen.shapes, chosen.tokens, chosen.formats, say, chosen.routes, chosen.jobs)
        document = table(chosen.shapes, chosen.tokens, chosen.formats, say, chosen.backends)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    write_document(document, chosen.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
