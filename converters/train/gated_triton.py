"""Triton kernels of the gated activation; see :mod:`converters.train.gated`.

A *line* is a row, or a column where the gate is stored by columns; a program takes a stretch of one line, so
that its loads and stores are consecutive in memory whatever the layout. Arithmetic is float32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from converters.train.gated import Activation

_SILU, _GELU_TANH = 0, 1
_NUMBERS = {"silu": _SILU, "gelu_tanh": _GELU_TANH}
_LONGEST = 4096


@triton.jit
def _activate(gate, ACTIVATION: tl.constexpr):
    """``act(gate)`` and its derivative, float32."""
    if ACTIVATION == 0:
        half = tl.sigmoid(gate)
        value = gate * half
        slope = half * (1.0 + gate * (1.0 - half))
    else:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        # 0.5 * (1 + tanh(x)) is sigmoid(2x).
        half = tl.sigmoid(2.0 * inner)
        value = gate * half
        inner_slope = 0.7978845608028654 * (1.0 + 0.134145 * gate * gate)
        slope = half + 2.0 * gate * half * (1.0 - half) * inner_slope
    return value, slope


@triton.jit
def _gated_forward(
    gate_ptr,
    up_ptr,
    out_ptr,
    length,
    gate_line,
    gate_step,
    up_line,
    up_step,
    out_line,
    out_step,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out = act(gate) * up`` for one stretch of one line."""
    line = tl.program_id(0).to(tl.int64)
    at = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = at < length
    gate = tl.load(gate_ptr + line * gate_line + at * gate_step, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + line * up_line + at * up_step, mask=inside, other=0.0).to(tl.float32)
    value, _ = _activate(gate, ACTIVATION)
    result = (value * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + line * out_line + at * out_step, result, mask=inside)


@triton.jit
def _gated_backward(
    grad_ptr,
    gate_ptr,
    up_ptr,
    gate_grad_ptr,
    up_grad_ptr,
    length,
    grad_line,
    grad_step,
    gate_line,
    gate_step,
    up_line,
    up_step,
    out_line,
    out_step,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of gate and up for one stretch of one line; both are laid out alike."""
    line = tl.program_id(0).to(tl.int64)
    at = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = at < length
    grad = tl.load(grad_ptr + line * grad_line + at * grad_step, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + line * gate_line + at * gate_step, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + line * up_line + at * up_step, mask=inside, other=0.0).to(tl.float32)
    value, slope = _activate(gate, ACTIVATION)
    where = line * out_line + at * out_step
    tl.store(gate_grad_ptr + where, (grad * up * slope).to(gate_grad_ptr.dtype.element_ty), mask=inside)
    tl.store(up_grad_ptr + where, (grad * value).to(up_grad_ptr.dtype.element_ty), mask=inside)


def _by_columns(gate: Tensor) -> bool:
    """Whether neighbours in memory belong to one column."""
    return gate.stride(1) != 1 and gate.stride(0) == 1


def _empty_in_order(gate: Tensor) -> Tensor:
    """Uninitialised, dense, stored by rows or columns as ``gate`` is."""
    rows, columns = gate.shape
    if _by_columns(gate):
        return torch.empty(columns, rows, dtype=gate.dtype, device=gate.device).T
    return torch.empty(rows, columns, dtype=gate.dtype, device=gate.device)


def _launch(kernel: Any, tensors: list[Tensor], outputs: list[Tensor], activation: Activation) -> None:
    by_columns = _by_columns(outputs[0])
    lines, length = outputs[0].shape[::-1] if by_columns else outputs[0].shape
    if not lines or not length:
        return
    block = min(_LONGEST, triton.next_power_of_2(length))
    strides: list[int] = []
    for tensor in (*tensors, outputs[0]):
        strides += tensor.stride()[::-1] if by_columns else tensor.stride()
    kernel[(lines, triton.cdiv(length, block))](
        *tensors,
        *outputs,
        length,
        *strides,
        ACTIVATION=_NUMBERS[activation],
        BLOCK=block,
        enable_fp_fusion=True,
        num_warps=4 if block <= 1024 else 8 if block <= 2048 else 16,
    )


def forward_kernel(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """``act(gate) * up`` of ``[rows, columns]`` with any strides; the result is stored as ``gate`` is."""
    out = _empty_in_order(gate)
    _launch(_gated_forward, [gate, up], [out], activation)
    return out


def backward_kernel(grad: Tensor, gate: Tensor, up: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up, stored as ``gate`` is."""
    outputs = [_empty_in_order(gate), _empty_in_order(gate)]
    _launch(_gated_backward, [grad, gate, up], outputs, activation)
    return outputs[0], outputs[1]
