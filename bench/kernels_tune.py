"""Search the configurations of the GPU kernels on this machine and write its table.

The CUDA C++ kernel takes part where its library is loaded: it enters the table, and with it the dispatch, for
the shapes and token counts at which it was the fastest.
"""

import contextlib
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import torch
from torch import Tensor

from bench.cuda_timing import cache_bytes, copies_needed, time_together
from bench.files import check_writable
from bench.kernels_cuda import make_spec, random_weight
from vllm_sparse.errors import UnsupportedError
from vllm_sparse.kernels.base import ActivationQuant, LinearSpec
from vllm_sparse.kernels.cuda import configs as cuda_configs
from vllm_sparse.kernels.cuda import library, mma_sp, selftest
from vllm_sparse.kernels.dispatch import get_backend
from vllm_sparse.kernels.triton.backend import QUANT_NUMBER
from vllm_sparse.kernels.triton.configs import (
    CUDA_ROUTES,
    TOKEN_BINS,
    Config,
    Machine,
    Route,
    Shape,
    candidates,
    default_config,
    token_bin,
)
from vllm_sparse.kernels.triton.layout import FORMAT_NUMBER, ROWS, Layout
from vllm_sparse.kernels.triton.tables import choose, forget, read_times, table_path, write_table

# Candidates within this factor of the best of a first, short round are timed again.
_FINALISTS = 1.1
_FIRST_REPLAYS = 3
# Configurations that a compiling process takes at a time.
_CHUNK = 4


@dataclass(frozen=True)
class Problem:
    """A layer of one of the formats that are measured, and the tokens it meets."""

    name: str
    n: int
    k: int
    m: int


_Problems = dict[tuple[Shape, int], tuple[Problem, list[Config]]]


def tune(
    shapes: Iterable[tuple[int, int]],
    tokens: Iterable[int],
    formats: Iterable[str],
    progress: Callable[[str], None],
    routes: Collection[Route] = tuple(Route),
    jobs: int = 1,
) -> None:
    """Time the candidates for every shape and bin; merge the winners into this device's table.

    Args:
        shapes: ``(n, k)`` of the layers.
        tokens: token counts; each stands for its bin.
        formats: names of :data:`bench.kernels_cuda.FORMATS`.
        progress: takes a line at a time.
        routes: kernels to search; the rule's configuration and what serves now always take part.
        jobs: processes that compile all candidates before the first is timed; 1 compiles as it goes.

    Raises:
        UnsupportedError: no NVIDIA GPU, or the Triton backend cannot run on it.
        UserError: the table's folder, which is in this package, cannot be written.
    """
    if not torch.cuda.is_available():
        raise UnsupportedError("no NVIDIA GPU that torch can use; tuning needs one")
    from vllm_sparse.kernels.triton import ops

    device = torch.device("cuda", torch.cuda.current_device())
    machine = ops.machine_of(torch.cuda.current_device())
    path = table_path(machine.name)
    # Known now: what follows takes long, and is written at its end.
    check_writable(path)
    timed = read_times(path) if path.exists() else {}
    bins = sorted({token_bin(m) for m in tokens if token_bin(m) in TOKEN_BINS})
    problems: _Problems = {}
    for n, k in shapes:
        for name in formats:
            spec = make_spec(name, n, k)
            for m in bins:
                key = (_shape_of(spec), m)
                known = [timed[key][0]] if key in timed else []
                configs = _contestants(spec, m, machine, routes, known)
                if configs:
                    problems[key] = (Problem(name, n, k, m), configs)
                else:
                    progress(f"{name} {n}x{k} m<={m}: no candidate among {', '.join(sorted(routes))}")
    problems = _tested(problems, device, machine, progress)
    if jobs > 1:
        compile_ahead(list(problems.values()), jobs, progress)
    for key, (problem, configs) in problems.items():
        spec = make_spec(problem.name, problem.n, problem.k)
        config, us = _best(spec, problem.m, configs, device, progress)
        timed[key] = (config, us)
        progress(f"{problem.name} {problem.n}x{problem.k} m<={problem.m}: {us:.1f} us  {config}")
    environment = {"torch": torch.__version__, "cuda": str(torch.version.cuda), "triton": _triton_version()}
    write_table(path, machine, environment, timed)
    progress(f"wrote {path}")
    forget()


def _shape_of(spec: LinearSpec) -> Shape:
    return Shape(spec.weight, spec.n, spec.k, spec.activation_quant is not ActivationQuant.NONE)


def all_candidates(spec: LinearSpec, m: int, machine: Machine) -> list[Config]:
    """Configurations of the Triton kernels, and of the CUDA C++ kernels where they can be had."""
    shape = _shape_of(spec)
    found = list(candidates(shape, m, machine))
    if library.load_failure() is None:
        found += [
            config for config in cuda_configs.candidates(shape, m, machine) if _runs(spec, config, machine)
        ]
    return found


def _runs(spec: LinearSpec, config: Config, machine: Machine) -> bool:
    """Whether this machine has the kernel of a configuration."""
    if config.route not in CUDA_ROUTES:
        return True
    layout, group = Layout(spec.n, spec.k, spec.weight), spec.group_size or 0
    return mma_sp.unsupported_reason(layout, group, config, machine) is None


def _contestants(
    spec: LinearSpec, m: int, machine: Machine, routes: Collection[Route], known: list[Config]
) -> list[Config]:
    """Candidates of the routes, then what a winner has to beat; nothing if the routes have no candidate."""
    found = [config for config in all_candidates(spec, m, machine) if config.route in routes]
    if not found:
        return []
    shape = _shape_of(spec)
    others = [default_config(shape, m, machine), choose(shape, m, machine), *known]
    return list(dict.fromkeys(found + [config for config in others if _runs(spec, config, machine)]))


def _tested(
    problems: _Problems, device: torch.device, machine: Machine, progress: Callable[[str], None]
) -> _Problems:
    """The problems, without configurations that loading a layer does not test if those go wrong now."""
    if not any(config.programs for _, configs in problems.values() for config in configs):
        return problems
    reason = selftest.failure(device, machine, programs=True)
    if reason is None:
        return problems
    progress(f"left out: programs that take tile after tile: {reason}")
    return {
        key: (problem, [config for config in configs if not config.programs])
        for key, (problem, configs) in problems.items()
    }


def compile_ahead(
    problems: Sequence[tuple[Problem, list[Config]]],
    jobs: int,
    progress: Callable[[str], None],
    start_pool: Callable[[int], Executor] = lambda jobs: ProcessPoolExecutor(jobs, get_context("spawn")),
) -> None:
    """Fill Triton's cache on disk, in processes of their own, so that timing finds every kernel compiled.

    A chunk that fails is named and left to the timing, which says why.

    Args:
        problems: what will be timed.
        jobs: processes.
        progress: takes a line at a time.
        start_pool: starts that many workers.
    """
    chunks = [
        (problem, compiled[start : start + _CHUNK])
        for problem, configs in problems
        for compiled in [[config for config in configs if config.route not in CUDA_ROUTES]]
        for start in range(0, len(compiled), _CHUNK)
    ]
    if not chunks:
        return
    count = sum(len(configs) for _, configs in chunks)
    workers = min(jobs, len(chunks))
    progress(f"compiling {count} configurations in {workers} processes")
    began = time.monotonic()
    with start_pool(workers) as pool:
        pending = [(problem, pool.submit(compile_chunk, problem, configs)) for problem, configs in chunks]
        for problem, future in pending:
            try:
                future.result()
            except RuntimeError as error:
                progress(f"not compiled ahead for {problem}: {error}")
    progress(f"compiled in {time.monotonic() - began:.0f} s")


def compile_chunk(problem: Problem, configs: Sequence[Config], device: str = "cuda") -> None:
    """Run each configuration once, on operands of zeros: what compiles is what will be timed."""
    from triton.runtime.errors import OutOfResources

    from vllm_sparse.kernels.triton import ops

    spec = make_spec(problem.name, problem.n, problem.k)
    layout = Layout(spec.n, spec.k, spec.weight)
    packed = torch.zeros(layout.total_bytes, dtype=torch.uint8, device=device)
    x = torch.zeros(problem.m, spec.k, dtype=spec.activation_dtype, device=device)
    # A few rows tell how the backend stores the scales.
    few = make_spec(problem.name, ROWS, problem.k)
    stored = get_backend("triton").pack(few, random_weight(few, torch.device(device))).scale
    scale = None if stored is None else stored.new_zeros(stored.shape[0], spec.n)
    number, group = FORMAT_NUMBER[spec.weight], spec.group_size or 0
    quant = QUANT_NUMBER[spec.activation_quant]
    for config in configs:
        # What does not fit is compiled all the same; the timing leaves it out and says so.
        with contextlib.suppress(OutOfResources):
            ops.linear(x, packed, scale, None, spec.n, spec.k, number, group, quant, config)


def _triton_version() -> str:
    import triton

    return str(triton.__version__)


def _best(
    spec: LinearSpec, m: int, configs: list[Config], device: torch.device, progress: Callable[[str], None]
) -> tuple[Config, float]:
    from triton.runtime.errors import OutOfResources

    from vllm_sparse.kernels.triton import ops

    packed = get_backend("triton").pack(spec, random_weight(spec, device))
    x = torch.randn(m, spec.k, device=device, dtype=spec.activation_dtype)
    count = copies_needed(packed.packed.nbytes, cache_bytes(device))
    copies = [packed.packed] + [packed.packed.clone() for _ in range(count - 1)]
    number, group = FORMAT_NUMBER[spec.weight], spec.group_size or 0
    quant = QUANT_NUMBER[spec.activation_quant]

    def calls(config: Config) -> list[Callable[[], Tensor]]:
        def call(weight: Tensor) -> Callable[[], Tensor]:
            arguments = (packed.scale, None, spec.n, spec.k, number, group, quant, config)
            return lambda: ops.linear(x, weight, *arguments)

        return [call(weight) for weight in copies]

    first = {}
    for config in configs:
        try:
            first[config] = time_together({"one": calls(config)}, _FIRST_REPLAYS)["one"].median
        except OutOfResources as error:
            progress(f"left out: {config}: {error}")
    if not first:
        raise UnsupportedError(f"no configuration runs for {spec.n}x{spec.k} {spec.weight.value}, {m} tokens")
    limit = _FINALISTS * min(first.values())
    finalists = {str(config): config for config, us in first.items() if us <= limit}
    final = time_together({name: calls(config) for name, config in finalists.items()})
    winner = min(final, key=lambda name: final[name].median)
    return finalists[winner], final[winner].median
