"""Symmetric weight quantisation after sparsity: zeros stay exactly zero.

Scales are per row (int8, fp8) or per group of input columns (int4), from the largest magnitude that is
left after pruning. int8 never uses -128, so that |q| cannot overflow.
"""

import torch
from torch import Tensor

from vllm_sparse.errors import UnsupportedError

INT4_GROUPS = (128, 64, 32)
_FP8_MAX = 448.0


def _scale(magnitude: Tensor, top: float) -> Tensor:
    """``magnitude / top``, and 1 where that is 0: rows of zeros, and values too small for a float32 scale.

    By a tensor, so that a GPU divides as the CPU does and writes the same bytes: see ``token_scales`` in
    :mod:`vllm_sparse.kernels.reference`.
    """
    scale = magnitude / torch.full_like(magnitude, top)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``[out, in]`` floats -> int8 values in [-127, 127] and float32 scales ``[out, 1]``."""
    values = weight.to(torch.float32)
    scale = _scale(values.abs().amax(-1, keepdim=True), 127.0)
    return torch.round(values / scale).clamp_(-127, 127).to(torch.int8), scale


def quantize_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``[out, in]`` floats -> float8_e4m3fn values and float32 scales ``[out, 1]``; no -0.0."""
    values = weight.to(torch.float32)
    scale = _scale(values.abs().amax(-1, keepdim=True), _FP8_MAX)
    raw = (values / scale).clamp_(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn)
    return clear_negative_zeros(raw), scale


def quantize_int4(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """``[out, in]`` floats -> int8 storage in [-7, 7] and float32 scales ``[out, in / group_size]``."""
    rows, cols = weight.shape
    values = weight.to(torch.float32).reshape(rows, cols // group_size, group_size)
    scale = _scale(values.abs().amax(-1, keepdim=True), 7.0)
    quantised = torch.round(values / scale).clamp_(-7, 7).to(torch.int8)
    return quantised.reshape(rows, cols), scale.squeeze(-1)


def clear_negative_zeros(weight: Tensor) -> Tensor:
    """fp8 with every -0.0 (0x80) made +0.0: byte-wise code takes 0x80 for a number."""
    raw = weight.view(torch.uint8)
    return torch.where(raw == 0x80, torch.zeros_like(raw), raw).view(weight.dtype)


def count_negative_zeros(weight: Tensor) -> int:
    """How many fp8 values are -0.0."""
    return int((weight.view(torch.uint8) == 0x80).sum())


def int4_group_size(columns: list[int]) -> int:
    """The largest supported group size that divides every width in ``columns``.

    Raises:
        UnsupportedError: none of them does.
    """
    for size in INT4_GROUPS:
        if all(width % size == 0 for width in columns):
            return size
    raise UnsupportedError(
        f"int4 needs input widths that are multiples of {INT4_GROUPS[-1]}; found {sorted(set(columns))}. "
        "Use --weights int8 or fp8, or round a pruned model's widths first: convert --to structured --align "
        f"{INT4_GROUPS[-1]}."
    )


def pack_int4(values: Tensor) -> Tensor:
    """int8 storage in [-8, 7], ``[rows, n]`` with n even -> uint8 ``[rows, n / 2]``, low nibble first."""
    nibbles = (values & 0xF).view(torch.uint8)
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """Inverse of :func:`pack_int4`."""
    pair = torch.stack((packed & 0xF, packed >> 4), dim=-1).view(torch.int8)
    return ((pair ^ 8) - 8).reshape(packed.shape[0], -1)


def spacing(values: Tensor) -> Tensor:
    """Distance of neighbouring values of the format at each of ``values``, float32, before scales.

    Args:
        values: int8 storage, or float8_e4m3fn: 2^(e - 3) in [2^e, 2^(e + 1)), 2^-9 below 2^-6.
    """
    if values.dtype != torch.float8_e4m3fn:
        return torch.ones(values.shape)
    exponent = torch.frexp(values.to(torch.float32)).exponent
    exponent = torch.where(values == 0, -9, exponent - 4)
    return torch.exp2(exponent.clamp(min=-9).to(torch.float32))
