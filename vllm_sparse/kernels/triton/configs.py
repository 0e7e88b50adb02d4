"""How a problem is cut into programs: the configuration of one launch, defaults, and candidates for tuning.

Configurations are chosen per bin of token counts, on the host, from facts known before the launch, so that a
choice never waits for the device.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

from vllm_sparse.kernels.base import WeightFormat
from vllm_sparse.kernels.triton.layout import BLOCK_COLUMNS, Layout

# The last one stands for all that is beyond it too.
TOKEN_BINS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
# Beyond them a matrix is expanded once and multiplied by the dense library, where no table knows better.
MOST_DOT_TOKENS = 256
_SELECT_TOKENS = (1, 2, 4, 8)
_DOT_TOKENS = (16, 32, 64, 128)


class Route(StrEnum):
    """Which kernel multiplies."""

    SELECT = "select"
    DOT = "dot"
    EXPAND = "expand"
    # The CUDA C++ kernel (kernels/cuda), for which only a measured table asks.
    MMA_SP = "mma_sp"
    # The same for compute capability 9.0, by the products that warpgroups have there.
    WGMMA_SP = "wgmma_sp"
    # That for many tokens, with the copies that the hardware does by itself.
    WGMMA_SP_TMA = "wgmma_sp_tma"


# The routes of the CUDA C++ library, as it numbers its kernels.
CUDA_ROUTES = (Route.MMA_SP, Route.WGMMA_SP, Route.WGMMA_SP_TMA)


@dataclass(frozen=True)
class Config:
    """One way to launch.

    Attributes:
        route: the kernel.
        block_n: rows per program, a multiple of 16.
        tokens: tokens per program (``select``: at least the tokens of the call).
        split_k: programs that share the blocks along K.
        warps: warps per program; of ``wgmma_sp_tma`` those that multiply.
        stages: depth of the software pipeline over blocks along K.
        cluster: ``mma_sp``, ``wgmma_sp``: the programs that share the blocks along K are a cluster and add up
            there.
        programs: ``wgmma_sp_tma``: so many programs share out what would be one program each, and take one
            after another; 0 starts them all.
    """

    route: Route
    block_n: int = 64
    tokens: int = 16
    split_k: int = 1
    warps: int = 4
    stages: int = 3
    cluster: bool = False
    programs: int = 0


# One program column per (token, expert) pair fills a GPU without splitting K.
EXPERT_CONFIG = Config(Route.SELECT, 32, 1, 1, 4, 4)
# The pairs of an expert come together in sixteens.
EXPERT_DOT_CONFIG = Config(Route.DOT, 64, 16, 1, 4, 2)


@dataclass(frozen=True)
class Machine:
    """What a choice depends on besides the problem.

    Attributes:
        name: as the driver reports it.
        capability: ``(major, minor)``.
        multiprocessors: how many.
        shared_bytes: shared memory one program may use.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int


@dataclass(frozen=True)
class Shape:
    """The part of a problem that a tuned table is indexed by.

    Attributes:
        weight: storage of the kept values.
        n: output features.
        k: input features.
        quantized: activations are quantised per token; the kernels that multiply 8-bit numbers differ then.
    """

    weight: WeightFormat
    n: int
    k: int
    quantized: bool = False

    @property
    def k_blocks(self) -> int:
        """Blocks of 256 columns."""
        return -(-self.k // BLOCK_COLUMNS)


def token_bin(m: int) -> int:
    """The smallest bin that holds ``m`` tokens; the last one beyond it."""
    return next((bin_ for bin_ in TOKEN_BINS if m <= bin_), TOKEN_BINS[-1])


def shared_bytes(config: Config, weight: WeightFormat, machine: Machine) -> int:
    """Upper estimate of the shared memory of one program.

    The pipeline keeps one block of weights and activations per stage where the tensor core reads them
    asynchronously (compute capability 9 and 10), elsewhere one fewer.
    """
    block = config.block_n * BLOCK_COLUMNS
    packed = block * {2: 9, 1: 5, 0: 3}[_value_bytes(weight)] // 8
    if weight is WeightFormat.INT4:
        packed += block // 2  # tiles of scales, for small groups
    if config.route is Route.SELECT:
        return config.stages * packed
    activations = config.tokens * BLOCK_COLUMNS * 2
    buffers = config.stages if machine.capability[0] in (9, 10) else config.stages - 1
    return max(buffers, 1) * (packed + activations)


def _value_bytes(weight: WeightFormat) -> int:
    return {WeightFormat.INT4: 0, WeightFormat.INT8: 1, WeightFormat.FP8_E4M3: 1}.get(weight, 2)


def split_for(shape: Shape, m: int, programs: int, wanted: int) -> int:
    """Power of two that brings ``programs`` to about ``wanted``.

    Each split keeps at least 4 blocks, so that its pipeline fills, and writing and reading the partial sums
    stays below a quarter of the weight's own traffic.
    """
    weight_bytes = Layout(shape.n, shape.k, shape.weight).total_bytes
    split = 1
    while (
        programs * split * 2 <= wanted
        and shape.k_blocks >= 8 * split
        and 4 * (2 * split) * 8 * m * shape.n <= weight_bytes
    ):
        split *= 2
    return split


def default_config(shape: Shape, m: int, machine: Machine) -> Config:
    """The configuration used where no table has one: reasoned, not measured.

    Up to 2 tokens the select kernel does less work than a tensor core would waste; beyond, its arithmetic
    grows with the tokens while the dot kernel's does not. Programs are split along K until there are about
    four per multiprocessor, which keeps enough loads in flight to fill the memory system.
    """
    bin_ = token_bin(m)
    if bin_ > MOST_DOT_TOKENS:
        return Config(Route.EXPAND)
    wanted = 4 * machine.multiprocessors
    if bin_ <= 2:
        split = split_for(shape, m, -(-shape.n // 32), wanted)
        return Config(Route.SELECT, 32, bin_, split, warps=4, stages=4)
    tokens = min(max(bin_, 16), 64)
    # Scaling each tile's product takes a second accumulator; with 4 warps that spills registers here.
    crowded = tokens == 64 and shape.weight is WeightFormat.INT4 and machine.capability[0] not in (9, 10)
    tries = [Config(Route.DOT, 64, tokens, 1, 8 if crowded else 4, stages) for stages in (3, 2)]
    # Two programs at a time on a multiprocessor hide each other's waiting.
    room = [(config, machine.shared_bytes // programs) for programs in (2, 1) for config in tries]
    config = next(
        (config for config, limit in room if shared_bytes(config, shape.weight, machine) <= limit),
        Config(Route.DOT, 64, 16, 1, 4, 2),
    )
    programs = -(-shape.n // config.block_n) * -(-m // config.tokens)
    return replace(config, split_k=split_for(shape, m, programs, wanted))


def candidates(shape: Shape, m: int, machine: Machine) -> Iterator[Config]:
    """Every configuration that tuning tries for one shape and token count."""
    splits = [split for split in (1, 2, 4, 8, 16) if shape.k_blocks >= split]
    bin_ = token_bin(m)
    if bin_ <= _SELECT_TOKENS[-1]:
        for rows in (16, 32, 64):
            for split in splits:
                for warps in (2, 4, 8):
                    for stages in (2, 4):
                        yield Config(Route.SELECT, rows, bin_, split, warps, stages)
    if 1 < bin_ <= MOST_DOT_TOKENS:
        for tokens in _DOT_TOKENS:
            if tokens < min(bin_, 64) or tokens > max(bin_, 16):
                continue
            for rows in (32, 64, 128):
                for split in splits:
                    for warps in (4, 8):
                        for stages in (2, 3, 4):
                            config = Config(Route.DOT, rows, tokens, split, warps, stages)
                            if shared_bytes(config, shape.weight, machine) <= machine.shared_bytes:
                                yield config
    if bin_ >= 128:
        yield Config(Route.EXPAND)
