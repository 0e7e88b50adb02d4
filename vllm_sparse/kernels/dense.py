"""Dense bf16 and int8 weights in the CPU kernels' panels, for the layers that a checkpoint leaves dense.

The same arithmetic as any dense bf16 product (float32 sums, one rounding), only read faster: a head of a
small model is a large part of what one token reads. int8 (a scale per row, activations stay bf16) reads half.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_sparse.errors import UnsupportedError
from vllm_sparse.kernels import library

_PANEL_ROWS = 8
_QUANTISED_ROWS = 4096


def unsupported_reason(weight: Tensor) -> str | None:
    """Why ``weight`` ``[n, k]`` cannot be served by these kernels, in words for a log; None if it can."""
    if weight.device.type != "cpu":
        return f"it runs on the CPU, the weight is on {weight.device}"
    if weight.dtype != torch.bfloat16:
        return f"it takes bfloat16, not {weight.dtype}"
    reason = library.load_failure()
    if reason is None and not library.current_isa().has_dense:
        return f"it needs avx2; this is {library.current_isa().name.lower()}"
    return reason


@dataclass(frozen=True)
class Panels:
    """A dense weight as the kernels read it.

    Attributes:
        packed: the panels, flat uint8.
        scale: float32, one per row and padded to 8, of int8 weights; None for bf16.
        n: output features.
        k: input features.
    """

    packed: Tensor
    scale: Tensor | None
    n: int
    k: int


def _checked(weight: Tensor) -> Tensor:
    reason = unsupported_reason(weight)
    if reason is not None:
        raise UnsupportedError(f"the dense CPU kernel cannot take this weight: {reason}")
    return weight.contiguous()


def pack(weight: Tensor) -> Panels:
    """``weight`` ``[n, k]`` in panels of its own, bf16.

    Raises:
        UnsupportedError: see :func:`unsupported_reason`.
    """
    return Panels(torch.ops.vllm_sparse.pack_dense(_checked(weight)), None, *weight.shape)


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``weight`` ``[n, k]`` as int8 and float32 scales ``[n]``: round to nearest of ``w / scale``, symmetric.

    Row by row in blocks, so that the float32 copy stays small.
    """
    codes = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(weight.shape[0], dtype=torch.float32)
    for start in range(0, weight.shape[0], _QUANTISED_ROWS):
        rows = weight[start : start + _QUANTISED_ROWS].float()
        scale = rows.abs().amax(dim=1) / 127
        scales[start : start + _QUANTISED_ROWS] = scale
        divisor = scale.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)
        codes[start : start + _QUANTISED_ROWS] = (rows / divisor).round().clamp(-127, 127).to(torch.int8)
    return codes, scales


def pack_int8(weight: Tensor) -> Panels:
    """``weight`` ``[n, k]``, bf16, rounded to int8 with a scale per row, in panels.

    Raises:
        UnsupportedError: see :func:`unsupported_reason`.
    """
    codes, scales = quantise(_checked(weight))
    n, k = weight.shape
    padded = torch.zeros(-(-n // _PANEL_ROWS) * _PANEL_ROWS, dtype=torch.float32)
    padded[:n] = scales
    return Panels(torch.ops.vllm_sparse.pack_dense(codes), padded, n, k)


def linear(x: Tensor, panels: Panels, bias: Tensor | None, wide: bool = False) -> Tensor:
    """``x [..., k] @ W.T + bias`` -> ``[..., n]``, bf16; with ``wide`` the float32 sums, unrounded."""
    out: Tensor = torch.ops.vllm_sparse.linear_dense(
        x, panels.packed, panels.scale, bias, panels.n, panels.k, wide
    )
    return out
