"""How a problem is cut for the CUDA C++ kernel: what it takes, what it needs, what is tried.

It shares :class:`Config` with the Triton kernels: ``block_n`` rows per block of threads are 16 or 32 a warp,
``tokens`` are 8 to 64, ``stages`` blocks of 256 columns are in flight or in use.
"""

from collections.abc import Iterator
from dataclasses import replace

from vllm_sparse.kernels.base import WeightFormat
from vllm_sparse.kernels.triton.configs import Config, Machine, Route, Shape, split_for, token_bin
from vllm_sparse.kernels.triton.layout import WORD_BYTES

_SHARED_INSTANCES = ((8, 16), (16, 16), (32, 16), (32, 32))
MAX_TOKENS = 64
_WARPS = (4, 8)
_STAGES = (2, 3, 4)
_METADATA_BYTES = 512
_TOKEN_BYTES = 512


def instances(weight: WeightFormat) -> tuple[tuple[int, int], ...]:
    """(tokens per pass, rows per warp) of the instances in csrc/launch.cuh.

    Int4 sums each scale group apart, so 64 tokens of 32 rows would take more registers than there are.
    """
    return (*_SHARED_INSTANCES, (64, 16 if weight is WeightFormat.INT4 else 32))


def rows_per_warp(config: Config) -> int:
    """Rows that a warp owns."""
    return config.block_n // config.warps


def shared_bytes(config: Config, weight: WeightFormat) -> int:
    """Shared memory of one block of threads, exactly (``stage_bytes`` in csrc/mma_sp_kernel.cuh)."""
    values = 1024 * WORD_BYTES[weight]
    weights = config.block_n // 16 * (values + _METADATA_BYTES)
    return config.stages * (weights + config.tokens * _TOKEN_BYTES)


def instance_reason(config: Config, weight: WeightFormat) -> str | None:
    """Why there is no instance of the kernel for a configuration; None if there is."""
    if (config.tokens, rows_per_warp(config)) not in instances(weight) or config.block_n % config.warps:
        return (
            f"no instance for {weight.value}, {config.tokens} tokens and {config.block_n} rows of "
            f"{config.warps} warps"
        )
    if config.stages not in _STAGES or not 1 <= config.warps <= max(_WARPS):
        return f"it takes 2 to 4 stages and up to {max(_WARPS)} warps"
    return None


def format_reason(weight: WeightFormat, group: int) -> str | None:
    """Why the kernel does not take a weight format; None if it does. ``group`` 0: one scale per row."""
    if weight is WeightFormat.INT4:
        if group % 128 or not group:
            return "the CUDA C++ kernel takes int4 in scale groups of a multiple of 128 columns only"
    elif group:
        return f"the CUDA C++ kernel takes {weight.value} with one scale per output channel only"
    return None


def default_config(shape: Shape, m: int, machine: Machine) -> Config:
    """The configuration where no table has one: reasoned, not measured.

    As many tokens at a time as there are, so that weights are read once; three or four blocks of columns on
    the way; two blocks of threads on a multiprocessor where they fit.
    """
    tokens = min(max(token_bin(m), 8), MAX_TOKENS)
    tries = [
        Config(Route.MMA_SP, 4 * rows, many, 1, 4, stages)
        for many, rows in sorted(instances(shape.weight), reverse=True)
        if many <= tokens
        for stages in (4, 3, 2)
    ]
    room = [(config, machine.shared_bytes // blocks) for blocks in (2, 1) for config in tries]
    fitting = [config for config, limit in room if shared_bytes(config, shape.weight) <= limit]
    # Fewer tokens at a time only where more do not fit at all.
    most = max(config.tokens for config in fitting)
    config = next(config for config in fitting if config.tokens == most)
    programs = -(-shape.n // config.block_n) * -(-m // config.tokens)
    return replace(config, split_k=split_for(shape, m, programs, 4 * machine.multiprocessors))


def candidates(shape: Shape, m: int, machine: Machine) -> Iterator[Config]:
    """Every configuration that tuning tries for one shape and token count."""
    bin_ = token_bin(m)
    if bin_ > MAX_TOKENS:
        return
    for tokens, rows in instances(shape.weight):
        if tokens != max(bin_, 8) and not (tokens == 32 and bin_ == 64):
            continue
        for warps in _WARPS:
            for split in (1, 2, 4, 8, 16):
                if shape.k_blocks < split:
                    continue
                for stages in _STAGES:
                    config = Config(Route.MMA_SP, rows * warps, tokens, split, warps, stages)
                    if shared_bytes(config, shape.weight) <= machine.shared_bytes:
                        yield config
