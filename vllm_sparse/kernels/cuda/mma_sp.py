"""Launching the CUDA C++ kernels: from tensors to the C interface."""

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_sparse.kernels.base import WeightFormat
from vllm_sparse.kernels.cuda import configs, library
from vllm_sparse.kernels.triton.configs import CUDA_ROUTES, Config, Machine, Route
from vllm_sparse.kernels.triton.layout import FORMAT_NUMBER, Layout

if TYPE_CHECKING:
    from vllm_sparse.kernels.triton.ops import Call

_SCALE_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# The library numbers both 16-bit formats 0: the activations' type tells them apart.
_FORMATS = {weight: 0 if number == 1 else number for weight, number in FORMAT_NUMBER.items()}


@cache
def unsupported_reason(layout: Layout, group: int, config: Config, machine: Machine) -> str | None:
    """Why the kernel cannot do a product in this configuration here, in words for a log; None if it can."""
    reason = (
        configs.format_reason(layout.weight, group)
        or configs.instance_reason(config, layout.weight)
        or configs.capability_reason(config, machine)
    )
    if reason is None:
        needed = configs.shared_bytes(config, layout.weight)
        if needed > machine.shared_bytes:
            reason = f"it needs {needed} bytes of shared memory, {machine.name} has {machine.shared_bytes}"
    return reason or library.load_failure()


def takes_eight_bits(config: Config, weight: WeightFormat, fp8: bool) -> bool:
    """Whether a configuration multiplies activations that are quantised to e4m3 (or else int8) in 8 bits."""
    own = WeightFormat.FP8_E4M3 if fp8 else WeightFormat.INT8
    return config.route is Route.WGMMA_SP_TMA and weight is own


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def launch(call: "Call", config: Config, y: Tensor) -> None:
    """Queue one product on the current stream.

    Args:
        call: operands; rows of ``x`` start 8-byte aligned, 16-byte for ``wgmma_sp_tma``.
        config: of one of ``CUDA_ROUTES``.
        y: ``[m, n]`` in 16 bits; ``[split_k, m, n]`` float32 if ``config`` splits without a cluster.

    Raises:
        UnsupportedError: see :func:`unsupported_reason`.
    """
    layout = call.layout
    bias = None if call.bias is None else call.bias.to(call.dtype)
    problem = library.Problem(
        x=_address(call.x),
        packed=_address(call.packed),
        scale=_address(call.scale),
        token_scale=_address(call.token_scale),
        bias=_address(bias),
        y=_address(y),
        stride_x=call.x.stride(0),
        metadata_offset=layout.value_bytes,
        m=call.m,
        n=layout.n,
        k=layout.k,
        row_blocks=layout.row_blocks,
        k_blocks=layout.k_blocks,
        blocks_per_split=-(-layout.k_blocks // config.split_k),
        group=call.group,
        scale_type=0 if call.scale is None else _SCALE_TYPES[call.scale.dtype],
        partial=config.split_k > 1 and not config.cluster,
        splits=config.split_k,
        cluster=config.cluster,
        stages=config.stages,
        slots=configs.weight_slots(config, layout.weight),
        programs=config.programs,
    )
    shape = library.Launch(
        half=call.dtype == torch.float16,
        eight_bits=call.x.element_size() == 1,
        format=_FORMATS[layout.weight],
        token_tiles=config.tokens // 8,
        row_tiles=configs.rows_per_warp(config) // 16,
        warps=config.warps,
        kernel=CUDA_ROUTES.index(config.route),
    )
    if not call.x.is_cuda:
        # The emulated library of the tests.
        library.start(problem, shape, 0)
        return
    with torch.cuda.device(call.x.device):
        library.start(problem, shape, torch.cuda.current_stream().cuda_stream)
