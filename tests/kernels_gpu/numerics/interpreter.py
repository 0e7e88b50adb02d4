"""Triton's interpreter, with its bfloat16 mended and the one PTX instruction that the kernels use.

Triton 3.9's interpreter holds bfloat16 as its bits. Its ``tl.dot`` multiplies those bits as integers, and
its conversion from float32 drops the low bits, where a GPU rounds to nearest even. Both are replaced here,
so that the kernels' own arithmetic is what the tests judge. It has no inline assembly either; ``prmt.b32``
is added, as the PTX manual defines its default mode. Reductions by a function of one's own are made faster.

The mode is read when Triton is first imported, so this module must be imported before any kernel.
"""

import os
import sys

import numpy as np

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    AVAILABLE = False
else:
    os.environ["TRITON_INTERPRET"] = "1"
    AVAILABLE = True


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bits, round to nearest even; NaN stays NaN."""
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def float_of_bits(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def prmt(low: np.ndarray, high: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """``prmt.b32``: result byte b is source byte (selector nibble b) & 7; bit 3 spreads that byte's sign."""
    low, high, selector = (
        t.view(np.uint32).astype(np.uint64) for t in np.broadcast_arrays(low, high, selector)
    )
    source = low | high << 32
    result = np.zeros_like(source)
    for byte in range(4):
        nibble = selector >> (4 * byte) & 15
        picked = source >> (8 * (nibble & 7)) & 0xFF
        sign = np.where(picked >> 7, 0xFF, 0)
        result |= np.where(nibble & 8, sign, picked).astype(np.uint64) << (8 * byte)
    return result.astype(np.uint32).view(np.int32)


class AsmResults(list):
    """What the builder returns for inline assembly."""

    def get_result(self, index):
        return self[index]


def mend() -> None:
    """Replace or add those operations; harmless when called again."""
    import triton.language as tl
    from triton.runtime import interpreter

    from vllm_sparse.kernels.triton import decode

    builder = interpreter.InterpreterBuilder
    if getattr(builder, "is_mended", False):
        return
    convert, dot = interpreter._convert_float, builder.create_dot

    def convert_float(data, source, target, rounding):
        if source == tl.float32 and target == tl.bfloat16:
            return bfloat16_bits(np.ascontiguousarray(data))
        return convert(data, source, target, rounding)

    def create_dot(self, a, b, d, *rest):
        operands = [
            interpreter.TensorHandle(float_of_bits(t.data), tl.float32)
            if t.dtype.scalar == tl.bfloat16
            else t
            for t in (a, b)
        ]
        return dot(self, *operands, d, *rest)

    def create_inline_asm(self, text, constraints, operands, types, is_pure, pack):
        if text != decode.PERMUTE:
            raise NotImplementedError(text)
        result = prmt(*(np.ascontiguousarray(operand.data) for operand in operands))
        return AsmResults([interpreter.TensorHandle(result, tl.int32)])

    def reduce(self, tensors):
        # By halves, as a GPU combines many pairs at once; the interpreter's own way goes number by number.
        if self.keep_dims:
            raise NotImplementedError("reductions that keep the dimension")
        tensors, axis = self.unravel(tensors, self.axis)
        while tensors[0].shape[axis] > 1:
            halves = [np.split(tensor.handle.data, 2, axis) for tensor in tensors]
            low, high = (
                [self.to_tensor(half, tensor.dtype) for half, tensor in zip(side, tensors, strict=True)]
                for side in zip(*halves, strict=True)
            )
            combined = self.combine_fn.fn(*low, *high)
            tensors = combined if isinstance(combined, tuple) else (combined,)
        return [self.to_tensor(tensor.handle.data.squeeze(axis), tensor.dtype) for tensor in tensors]

    interpreter._convert_float = convert_float
    interpreter.ReduceOps.generic_reduce = reduce
    builder.create_inline_asm = create_inline_asm
    builder.create_dot = create_dot
    builder.is_mended = True
