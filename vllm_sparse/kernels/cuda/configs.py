"""How a problem is cut for the CUDA C++ kernels: what they take, what they need, what is tried.

They share :class:`Config` with the Triton kernels: ``block_n`` rows per block of threads are 16 or 32 a warp,
``tokens`` are 8 to 64, of ``wgmma_sp_tma`` 64 to 256. ``stages`` are in flight or in use: blocks of 256
columns for ``mma_sp``, half blocks for ``wgmma_sp``, for ``wgmma_sp_tma`` 128 bytes of activations a token.
"""

from collections.abc import Iterator
from dataclasses import replace

from vllm_sparse.kernels.base import WeightFormat
from vllm_sparse.kernels.triton.configs import (
    Config,
    Machine,
    Route,
    Shape,
    split_for,
    token_bin,
)
from vllm_sparse.kernels.triton.layout import WORD_BYTES

MAX_TOKENS = 64
# Beyond them wgmma_sp_tma is faster on an H200, of int4 beyond twice as many.
_MOST_WGMMA_TOKENS = 32
# Tiles per multiprocessor that are enough; blocks of columns up to which low tiles beat parts of K.
_ENOUGH_TILES = 0.7
_FEW_BLOCKS = 32
_SHARED_INSTANCES = ((8, 16), (16, 16), (32, 16), (32, 32))
_WGMMA_INSTANCES = tuple((tokens, rows) for tokens in (8, 16, 32, 64) for rows in (16, 32))
# (tokens, rows per warp, warps).
_TMA_INSTANCES = ((64, 16, 8), (64, 32, 8), (128, 16, 4), (128, 16, 8), (256, 16, 8))
_WARPS = (4, 8)
_STAGES = {Route.MMA_SP: (2, 3, 4), Route.WGMMA_SP: (3, 4, 5, 6), Route.WGMMA_SP_TMA: (3, 4, 5, 6)}
_WGMMA_CAPABILITY = (9, 0)
_CLUSTER_CAPABILITY = (9, 0)
# What every GPU with clusters takes.
_CLUSTER_SPLITS = (2, 4, 8)
_METADATA_BYTES = 512
_TOKEN_BYTES = 512
# What a block of threads may use on compute capability 9.0.
_HOPPER_SHARED_BYTES = 227 << 10


def instances(route: Route, weight: WeightFormat) -> tuple[tuple[int, int], ...]:
    """(tokens per pass, rows per warp) of the instances in csrc/launch.cuh.

    ``mma_sp`` sums each scale group of int4 apart, so 64 tokens of 32 rows would take more registers than
    there are.
    """
    if route is Route.WGMMA_SP:
        return _WGMMA_INSTANCES
    if route is Route.WGMMA_SP_TMA:
        return tuple(dict.fromkeys((tokens, rows) for tokens, rows, _ in _TMA_INSTANCES))
    return (*_SHARED_INSTANCES, (64, 16 if weight is WeightFormat.INT4 else 32))


def rows_per_warp(config: Config) -> int:
    """Rows that a warp owns."""
    return config.block_n // config.warps


def shared_bytes(config: Config, weight: WeightFormat) -> int:
    """Shared memory of one block of threads, exactly.

    ``stage_bytes`` in csrc/mma_sp_kernel.cuh, ``half_stage_bytes`` in csrc/wgmma_sp_kernel.cuh, ``Places`` in
    csrc/wgmma_sp_tma_kernel.cuh. The sums of a cluster lie where the pipeline was.
    """
    if config.route is Route.WGMMA_SP_TMA:
        return _tma_bytes(config, weight, weight_slots(config, weight))
    half = 2 if config.route is Route.WGMMA_SP else 1
    values = 1024 * WORD_BYTES[weight] // half
    weights = config.block_n // 16 * (values + _METADATA_BYTES)
    return config.stages * (weights + config.tokens * _TOKEN_BYTES // half)


def weight_slots(config: Config, weight: WeightFormat) -> int:
    """Blocks of columns of weights that ``wgmma_sp_tma`` keeps in flight or in use: 3 where they fit, else 2.

    While one is used, two on their way are more than the memory's latency times its bandwidth.
    """
    return 3 if _tma_bytes(config, weight, 3) <= _HOPPER_SHARED_BYTES else 2


def _tma_bytes(config: Config, weight: WeightFormat, slots: int) -> int:
    slot = config.block_n // 16 * (1024 * WORD_BYTES[weight] + _METADATA_BYTES)
    barriers = 2 * 8 * (config.stages + slots)
    return config.stages * config.tokens * _TOKEN_BYTES // 4 + slots * slot + barriers


def _sums_bytes(config: Config) -> int:
    return 4 * (config.block_n + 4) * config.tokens


def instance_reason(config: Config, weight: WeightFormat) -> str | None:
    """Why there is no instance of a kernel for a configuration; None if there is."""
    sizes = (config.tokens, rows_per_warp(config))
    if sizes not in instances(config.route, weight) or config.block_n % config.warps:
        return (
            f"no instance of {config.route.value} for {weight.value}, {config.tokens} tokens and "
            f"{config.block_n} rows of {config.warps} warps"
        )
    stages = _STAGES[config.route]
    if config.stages not in stages or not 1 <= config.warps <= max(_WARPS):
        return (
            f"{config.route.value} takes {stages[0]} to {stages[-1]} stages and up to {max(_WARPS)} warps, "
            f"not {config.stages} stages and {config.warps} warps"
        )
    if config.route is Route.WGMMA_SP and config.warps % 4:
        return f"wgmma_sp takes 4 or 8 warps, not {config.warps}"
    if config.route is Route.WGMMA_SP_TMA:
        return _tma_reason(config)
    if config.programs:
        return f"{config.route.value} does not take a number of programs"
    if config.cluster and config.split_k not in _CLUSTER_SPLITS:
        return f"a cluster adds up 2, 4 or 8 parts, not {config.split_k}"
    if config.cluster and _sums_bytes(config) > shared_bytes(config, weight):
        return (
            f"the sums of {config.tokens} tokens and {config.block_n} rows do not fit the pipeline's memory"
        )
    return None


def _tma_reason(config: Config) -> str | None:
    if (config.tokens, rows_per_warp(config), config.warps) not in _TMA_INSTANCES:
        return f"wgmma_sp_tma has no instance of {config.tokens} tokens and {config.warps} warps"
    if config.cluster:
        return "wgmma_sp_tma adds up parts of K in memory only"
    if config.programs < 0:
        return f"wgmma_sp_tma takes 0 or more programs, not {config.programs}"
    return None


def capability_reason(config: Config, machine: Machine) -> str | None:
    """Why a GPU's kind cannot run a configuration; None if it can."""
    if config.route is not Route.MMA_SP and machine.capability != _WGMMA_CAPABILITY:
        return f"{config.route.value} is for compute capability 9.0, {machine.name} has {machine.capability}"
    if config.cluster and machine.capability < _CLUSTER_CAPABILITY:
        return f"clusters need compute capability 9.0 or later, {machine.name} has {machine.capability}"
    return None


def format_reason(weight: WeightFormat, group: int) -> str | None:
    """Why the kernels do not take a weight format; None if they do. ``group`` 0: one scale per row."""
    if weight is WeightFormat.INT4:
        if group % 128 or not group:
            return "the CUDA C++ kernels take int4 in scale groups of a multiple of 128 columns only"
    elif group:
        return f"the CUDA C++ kernels take {weight.value} with one scale per output channel only"
    return None


def serves_without_a_table(machine: Machine) -> bool:
    """Whether :func:`default_config` is what runs where no table has an entry.

    On compute capability 9.0: on an H200 these kernels beat Triton's at every size measured.
    """
    return machine.capability == _WGMMA_CAPABILITY


def takes(m: int, machine: Machine) -> bool:
    """Whether :func:`default_config` has one for ``m`` tokens."""
    return m > 0 and (m <= MAX_TOKENS or machine.capability == _WGMMA_CAPABILITY)


def default_config(shape: Shape, m: int, machine: Machine) -> Config:
    """The configuration where no table has one.

    On compute capability 9.0 the pattern of what was measured on an H200; all else is reasoned, not measured.
    """
    tokens = min(max(token_bin(m), 8), MAX_TOKENS)
    if machine.capability != _WGMMA_CAPABILITY:
        return _reasoned_config(shape, m, tokens, machine)
    if m > (MAX_TOKENS if shape.weight is WeightFormat.INT4 else _MOST_WGMMA_TOKENS):
        return _many_tokens_config(shape, m, machine)
    return _hopper_config(shape, m, tokens, machine)


def _hopper_config(shape: Shape, m: int, tokens: int, machine: Machine) -> Config:
    """``wgmma_sp``: more rows for more tokens, which the rows share; many small blocks of threads for few.

    Int4, which is bound by instructions, wants many blocks too. K is split until there are enough.
    """
    int4 = shape.weight is WeightFormat.INT4
    if tokens > 8:
        config = Config(Route.WGMMA_SP, 128, tokens, 1, 8, 3 if int4 else 4)
        per_multiprocessor = 2.0 if int4 else 1.5
    elif shape.weight in (WeightFormat.INT8, WeightFormat.FP8_E4M3):
        config, per_multiprocessor = Config(Route.WGMMA_SP, 128, 8, 1, 4, 4), 2.2
    else:
        config, per_multiprocessor = Config(Route.WGMMA_SP, 64, 8, 1, 4, 4), 6.0 if int4 else 2.0
    programs = -(-shape.n // config.block_n) * -(-m // config.tokens)
    wanted = 0.8 * per_multiprocessor * machine.multiprocessors
    # The last block of columns of each part is half a pipeline; int4 gains more blocks than it loses there.
    blocks = 1 if int4 else 2
    split = 1
    while programs * split < wanted and shape.k_blocks >= 2 * blocks * split:
        split *= 2
    return replace(config, split_k=split)


def _many_tokens_config(shape: Shape, m: int, machine: Machine) -> Config:
    """``wgmma_sp_tma``: tiles as large as leave most multiprocessors one, then K in parts until they have.

    What sweeps of four shapes at 64 to 4096 tokens on an H200 found best.
    """
    enough = _ENOUGH_TILES * machine.multiprocessors
    # (rows, tokens, warps).
    if m <= MAX_TOKENS:
        tries = [(256, 64, 8), (128, 64, 8)]
    else:
        tries = [(128, 256, 8)] * (m > 128) + [(128, 128, 8)]
        tries += [(64, 128, 4)] * (shape.k_blocks <= _FEW_BLOCKS)

    def tiles(rows: int, tokens: int) -> int:
        return -(-shape.n // rows) * -(-m // tokens)

    rows, tokens, warps = next((size for size in tries if tiles(*size[:2]) >= enough), tries[-1])
    split = 1
    while 2 * split * tiles(rows, tokens) <= machine.multiprocessors and shape.k_blocks >= 8 * split:
        split *= 2
    stages = (Config(Route.WGMMA_SP_TMA, rows, tokens, split, warps, stages) for stages in (6, 5, 4, 3))
    return next(config for config in stages if shared_bytes(config, shape.weight) <= machine.shared_bytes)


def _reasoned_config(shape: Shape, m: int, tokens: int, machine: Machine) -> Config:
    """As many tokens at a time as there are, so that weights are read once.

    Three or four blocks of columns are on the way; two blocks of threads are on a multiprocessor where they
    fit.
    """
    tries = [
        Config(Route.MMA_SP, 4 * rows, many, 1, 4, stages)
        for many, rows in sorted(instances(Route.MMA_SP, shape.weight), reverse=True)
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
    found = [*_many_tokens_candidates(shape, bin_, machine)]
    if bin_ <= MAX_TOKENS:
        found += _few_tokens_candidates(shape, bin_)
    yield from (config for config in found if _runs(config, shape.weight, machine))


def _few_tokens_candidates(shape: Shape, bin_: int) -> Iterator[Config]:
    for route in (Route.MMA_SP, Route.WGMMA_SP):
        for tokens, rows in instances(route, shape.weight):
            if tokens != max(bin_, 8) and not (tokens == 32 and bin_ == 64):
                continue
            for warps in _WARPS:
                for split in (1, 2, 4, 8, 16):
                    if shape.k_blocks < split:
                        continue
                    for stages in _STAGES[route]:
                        plain = Config(route, rows * warps, tokens, split, warps, stages)
                        yield from (plain, replace(plain, cluster=True))


def _many_tokens_candidates(shape: Shape, bin_: int, machine: Machine) -> Iterator[Config]:
    """``wgmma_sp_tma``: K is split where few tokens leave multiprocessors idle.

    Its 64 tokens are tried from 5 on, a few ways: what it gains there are the copies. Where there are more
    tiles than multiprocessors, of which each has room for one program, these take one after another as well.
    """
    splits = [split for split in (1, 2, 4, 8) if shape.k_blocks >= 2 * split] or [1]
    few = bin_ < MAX_TOKENS
    for tokens, rows, warps in _TMA_INSTANCES:
        if bin_ < 8 or not min(max(bin_, 64), 128) <= tokens <= max(bin_, 64):
            continue
        for split in splits if bin_ <= 512 else [1]:
            tiles = -(-shape.n // (rows * warps)) * -(-bin_ // tokens) * split
            for stages in (4,) if few else _STAGES[Route.WGMMA_SP_TMA]:
                config = Config(Route.WGMMA_SP_TMA, rows * warps, tokens, split, warps, stages)
                yield config
                if tiles > machine.multiprocessors:
                    yield replace(config, programs=machine.multiprocessors)


def _runs(config: Config, weight: WeightFormat, machine: Machine) -> bool:
    return (
        instance_reason(config, weight) is None
        and capability_reason(config, machine) is None
        and shared_bytes(config, weight) <= machine.shared_bytes
    )
