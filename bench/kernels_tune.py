"""Search the configurations of the GPU kernels on this machine and write its table.

The CUDA C++ kernel takes part where its library is loaded: it enters the table, and with it the dispatch, for
the shapes and token counts at which it was the fastest.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from bench.cuda_timing import cache_bytes, copies_needed, time_together
from bench.kernels_cuda import make_spec, random_weight
from vllm_sparse.errors import UnsupportedError
from vllm_sparse.kernels.base import LinearSpec
from vllm_sparse.kernels.cuda import configs as cuda_configs
from vllm_sparse.kernels.cuda import library, mma_sp
from vllm_sparse.kernels.dispatch import get_backend
from vllm_sparse.kernels.triton.configs import TOKEN_BINS, Config, Machine, Shape, candidates, token_bin
from vllm_sparse.kernels.triton.layout import FORMAT_NUMBER, Layout
from vllm_sparse.kernels.triton.tables import choose, read_table, table_path, write_table

# Candidates within this factor of the best of a first, short round are timed again.
_FINALISTS = 1.1
_FIRST_REPLAYS = 3


def tune(
    shapes: Iterable[tuple[int, int]],
    tokens: Iterable[int],
    formats: Iterable[str],
    progress: Callable[[str], None],
) -> None:
    """Time every candidate for every shape and bin; merge the winners into this device's table.

    Raises:
        UnsupportedError: no NVIDIA GPU, or the Triton backend cannot run on it.
    """
    if not torch.cuda.is_available():
        raise UnsupportedError("no NVIDIA GPU that torch can use; tuning needs one")
    from vllm_sparse.kernels.triton import ops

    device = torch.device("cuda", torch.cuda.current_device())
    machine = ops.machine_of(torch.cuda.current_device())
    path = table_path(machine.name)
    timed: dict[tuple[Shape, int], tuple[Config, float]] = {}
    if path.exists():
        timed = {key: (config, 0.0) for key, config in read_table(path).items()}
    bins = sorted({token_bin(m) for m in tokens if token_bin(m) in TOKEN_BINS})
    seen: set[Shape] = set()
    for n, k in shapes:
        for name in formats:
            spec = make_spec(name, n, k)
            shape = Shape(spec.weight, n, k)
            if shape in seen:  # quantised activations change nothing in the weight's kernel
                continue
            seen.add(shape)
            for m in bins:
                config, us = _best(spec, m, all_candidates(spec, m, machine), device, progress)
                timed[shape, m] = (config, us)
                progress(f"{name} {n}x{k} m<={m}: {us:.1f} us  {config}")
    path.parent.mkdir(exist_ok=True)
    environment = {"torch": torch.__version__, "cuda": str(torch.version.cuda), "triton": _triton_version()}
    write_table(path, machine, environment, timed)
    progress(f"wrote {path}")
    choose.cache_clear()


def all_candidates(spec: LinearSpec, m: int, machine: Machine) -> list[Config]:
    """Configurations of the Triton kernels, and of the CUDA C++ kernel where it can be had."""
    shape = Shape(spec.weight, spec.n, spec.k)
    found = list(candidates(shape, m, machine))
    if library.load_failure() is None:
        layout, group = Layout(spec.n, spec.k, spec.weight), spec.group_size or 0
        found += [
            config
            for config in cuda_configs.candidates(shape, m, machine)
            if mma_sp.unsupported_reason(layout, group, config, machine) is None
        ]
    return found


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

    def calls(config: Config) -> list[Callable[[], Tensor]]:
        def call(weight: Tensor) -> Callable[[], Tensor]:
            return lambda: ops.linear(x, weight, packed.scale, None, spec.n, spec.k, number, group, 0, config)

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
