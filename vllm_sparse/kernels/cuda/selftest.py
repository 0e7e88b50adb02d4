"""A small product of each CUDA C++ kernel, compared before the first layer relies on them.

A library may be built for another GPU, by another compiler, or meet hardware that it was never run on. A
wrong product would be served silently; so each process compares once per GPU, while layers are loaded, which
is before any CUDA graph is captured.

What no rule chooses is compared only where it may run: blocks of threads that take tile after tile
(``Config.programs``) if a table of this GPU names them, and before tuning times them.
"""

import logging
from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from vllm_sparse.errors import UnsupportedError
from vllm_sparse.kernels.base import WeightFormat
from vllm_sparse.kernels.cuda import configs, library, mma_sp
from vllm_sparse.kernels.triton import layout as packed_layout
from vllm_sparse.kernels.triton import tables
from vllm_sparse.kernels.triton.configs import Config, Machine, Route
from vllm_sparse.kernels.triton.layout import FORMAT_NUMBER, Layout
from vllm_sparse.sparse24 import compress, topk_mask

logger = logging.getLogger(__name__)

# Odd sizes; several blocks of columns, so that every slot of the pipeline is used twice.
_ROWS, _COLUMNS = 89, 1900
# No split along K: adding the parts is a Triton kernel's work, which tests of its own cover.
_CONFIGS = (
    (7, Config(Route.MMA_SP, 64, 8, 1, 4, 3)),
    (7, Config(Route.WGMMA_SP, 64, 8, 1, 4, 4)),
    (61, Config(Route.WGMMA_SP, 128, 64, 1, 8, 4)),
    (135, Config(Route.WGMMA_SP_TMA, 128, 256, 1, 8, 3)),
)
# Two tiles one after another.
_CONFIGS_WITH_PROGRAMS = (*_CONFIGS, (135, Config(Route.WGMMA_SP_TMA, 128, 128, 1, 8, 4, programs=1)))


def _products(
    dtype: torch.dtype, device: torch.device, machine: Machine, tested: Sequence[tuple[int, Config]]
) -> Iterator[tuple[str, float]]:
    """Every configuration's name and its largest error over what rounding allows."""
    from vllm_sparse.kernels.triton import ops

    generator = torch.Generator("cpu").manual_seed(24)
    weight = torch.randn(_ROWS, _COLUMNS, generator=generator, dtype=torch.float32)
    weight = (weight * topk_mask(weight.abs())).to(dtype)
    layout = Layout(_ROWS, _COLUMNS, WeightFormat.from_dtype(dtype))
    values, bitmask = compress(weight)
    packed = packed_layout.pack(layout, values.to(device), bitmask.to(device))
    most = max(m for m, _ in tested)
    x = torch.randn(most, _COLUMNS, generator=generator, dtype=torch.float32).to(device, dtype)
    for m, config in tested:
        if configs.capability_reason(config, machine) is None:
            number = FORMAT_NUMBER[layout.weight]
            out = ops.linear(x[:m], packed, None, None, _ROWS, _COLUMNS, number, 0, 0, config)
            yield config.route.value, _excess(out, x[:m], weight.to(device))


def _excess(out: Tensor, x: Tensor, weight: Tensor) -> float:
    """Largest error over the rounding of the result and of float32 sums; NaN counts as infinite."""
    exact = x.double() @ weight.double().T
    magnitude = x.double().abs() @ weight.double().abs().T
    allowed = torch.finfo(out.dtype).eps * exact.abs() + 2e-6 * magnitude
    excess = ((out.double() - exact).abs() / allowed).max()
    return float(excess.nan_to_num(nan=float("inf")))


def failure(device: torch.device, machine: Machine, programs: bool = False) -> str | None:
    """Why a GPU's products are not to be trusted, in words for a log; None if they are right.

    Args:
        device: where to multiply.
        machine: facts about it.
        programs: whether blocks of threads that take tile after tile are tested too.
    """
    tested = _CONFIGS_WITH_PROGRAMS if programs else _CONFIGS
    # A model loader may have set another default device.
    with torch.device("cpu"):
        for dtype in (torch.bfloat16, torch.float16):
            try:
                for name, excess in _products(dtype, device, machine, tested):
                    if excess > 1:
                        return (
                            f"the self-test of {name} on {machine.name} is wrong by {excess:.3g} times what "
                            f"rounding allows ({dtype}); build the library again, or report it"
                        )
            except (UnsupportedError, RuntimeError) as error:
                return f"the self-test of the CUDA C++ kernels on {machine.name} did not run: {error}"
    return None


@cache
def run_once(index: int, machine: Machine) -> None:
    """Test the kernels on CUDA device ``index``; after a failure no layer of this process uses them."""
    if library.load_failure() is not None:
        return
    reason = failure(torch.device("cuda", index), machine, tables.has_programs(machine.name))
    if reason is not None:
        library.distrust(reason)
        mma_sp.unsupported_reason.cache_clear()
        logger.error("%s. Triton's kernels serve instead.", reason)
    else:
        logger.debug("the CUDA C++ kernels passed their self-test on %s", machine.name)
