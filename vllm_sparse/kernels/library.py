"""The compiled CPU kernels: finding and loading the library, its instruction-set level, facts about both."""

import ctypes
import logging
import os
import platform
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from vllm_sparse.errors import NumericsError, UnsupportedError

logger = logging.getLogger(__name__)

ENV_ISA = "VLLM_SPARSE_ISA"


class Isa(IntEnum):
    """Instruction-set levels, numbered as the library numbers them.

    Those from ``AMX_TILES`` on are for tests: they use a level's kernels for many tokens for any number.
    """

    SCALAR = 0
    AVX2 = 1
    AVX512 = 2
    AVX512BF16 = 3
    AMX = 4
    AMX_TILES = 5
    AVX2_LANES = 6
    AVX512BF16_LANES = 7

    @property
    def has_bf16(self) -> bool:
        """Whether the processor multiplies bf16."""
        return self in (Isa.AVX512BF16, Isa.AMX, Isa.AMX_TILES, Isa.AVX512BF16_LANES)

    @property
    def is_for_tests(self) -> bool:
        """Whether it is never chosen by itself."""
        return self >= Isa.AMX_TILES

    @property
    def has_dense(self) -> bool:
        """Whether there are kernels of dense heads."""
        return self >= Isa.AVX2


_LIBRARY_FILE = Path(__file__).parent / "_cpu.abi3.so"


@dataclass(frozen=True)
class CpuFacts:
    """What ``vllm-sparse doctor`` shows about the CPU kernels.

    Attributes:
        machine: architecture, e.g. ``x86_64``.
        built: whether the compiled library is there and loads.
        reason: why not, if it does not.
        supported: levels this processor can execute, worst first, without those for tests; empty without the
            library.
        level: the level in use.
    """

    machine: str
    built: bool
    reason: str | None
    supported: tuple[str, ...]
    level: str | None


def _fake_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    n: int,
    k: int,
    kind: int,
    group: int,
) -> Tensor:
    return x.new_empty([*x.shape[:-1], n])


def _fake_linear_dense(
    x: Tensor, packed: Tensor, scale: Tensor | None, bias: Tensor | None, n: int, k: int, wide: bool
) -> Tensor:
    return x.new_empty([*x.shape[:-1], n], dtype=torch.float32 if wide else x.dtype)


def _fake_experts(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor | None,
    down: Tensor,
    down_scale: Tensor | None,
    width: int,
    kind: int,
    group: int,
    activation: int,
) -> Tensor:
    return torch.empty_like(x)


@cache
def _register_fakes() -> None:
    torch.library.register_fake("vllm_sparse::linear_24", _fake_linear)
    torch.library.register_fake("vllm_sparse::linear_dense", _fake_linear_dense)
    torch.library.register_fake("vllm_sparse::experts_packed_24", _fake_experts)


@cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why there is none. Loading registers the operators of ``torch.ops.vllm_sparse``."""
    if not _LIBRARY_FILE.exists():
        return None, (
            f"the compiled kernels ({_LIBRARY_FILE.name}) are not in this installation; install with a C++ "
            "compiler present to build them"
        )
    try:
        torch.ops.load_library(str(_LIBRARY_FILE))
        library = ctypes.CDLL(str(_LIBRARY_FILE))
        _register_fakes()
    except (OSError, RuntimeError) as error:
        return None, f"the compiled kernels do not load with torch {torch.__version__}: {error}"
    return library, None


def encoder() -> ctypes.CDLL | None:
    """The library, for the functions of ``csrc/encode.cpp``, if it has them all."""
    library, _ = _load()
    return library if library is not None and hasattr(library, "vllm_sparse_any_bits") else None


def load_failure() -> str | None:
    """Why the compiled kernels cannot be used; None if they can.

    Raises:
        UnsupportedError: ``VLLM_SPARSE_ISA`` names a level this processor cannot execute.
    """
    library, reason = _load()
    if library is not None:
        _apply_environment()
    return reason


@cache
def _apply_environment() -> None:
    wanted = os.environ.get(ENV_ISA, "").strip().lower()
    if wanted:
        set_isa(wanted)


def _require() -> ctypes.CDLL:
    library, reason = _load()
    if library is None:
        raise UnsupportedError(f"{reason}")
    return library


def supported_levels() -> tuple[Isa, ...]:
    """The levels this processor can execute, worst first."""
    mask = int(_require().vllm_sparse_supported_levels())
    return tuple(level for level in Isa if mask >> level & 1)


def _names() -> tuple[str, ...]:
    """The levels to choose from, worst first."""
    return tuple(level.name.lower() for level in supported_levels() if not level.is_for_tests)


def current_isa() -> Isa:
    """The level in use."""
    return Isa(int(_require().vllm_sparse_current_level()))


def set_isa(name: str) -> None:
    """Use the level called ``name``, one of :class:`Isa` in lower case, from now on in this process.

    Raises:
        UnsupportedError: there is no such level, or this processor cannot execute it.
    """
    names = {level.name.lower(): level for level in supported_levels()}
    if name not in names:
        raise UnsupportedError(
            f"{ENV_ISA}={name}: this processor executes {', '.join(_names())}. "
            f"Unset {ENV_ISA} to use the best."
        )
    _require().vllm_sparse_set_level(int(names[name]))


def many_tokens_from(kind: int, measure: bool = False) -> int | None:
    """From how many tokens on the level multiplies weights of this kind in another way; None if never.

    Args:
        kind: as the operators number formats.
        measure: time it again, instead of what the first call of the process found (the levels that are there
            for tests use it for any number of tokens).

    Raises:
        NumericsError: it computes something else than the level's vector loops.
    """
    function = _require().vllm_sparse_many_tokens_from
    function.restype = ctypes.c_int64
    found = int(function(ctypes.c_int64(kind), int(measure)))
    if found < 0:
        raise NumericsError(
            "the kernels for many tokens give other products than the loops for few; set "
            f"{ENV_ISA} to a lower level to do without them"
        )
    return found or None


def cpu_facts() -> CpuFacts:
    """Facts for ``vllm-sparse doctor``; never raises for a missing or broken library."""
    library, reason = _load()
    machine = platform.machine()
    if library is None:
        return CpuFacts(machine, False, reason, (), None)
    try:
        load_failure()
    except UnsupportedError as error:
        reason = str(error)
    return CpuFacts(machine, True, reason, _names(), current_isa().name.lower())
