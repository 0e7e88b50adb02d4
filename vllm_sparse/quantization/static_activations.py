"""Activations quantised with one scale per tensor that the checkpoint brings (W8A8 static, symmetric).

The scale is a constant, so it needs no kernel of its own: x becomes its rounded numbers times a power of two,
which 16-bit floats hold exactly, and what remains of the scale (a factor in [1, 2)) goes into the weight's
scale once, after loading. The power of two keeps both factors far from the ends of fp16's range.

Layers are typed ``Any``: they are vLLM modules, and the scale lives on them as buffers.
"""

from typing import Any

import torch
from torch import Tensor

from vllm_sparse.errors import FormatError
from vllm_sparse.quantization.part_scales import PartScalesParameter
from vllm_sparse.quantization.spec import StaticQuant

INT8_LOW, INT8_HIGH = -128.0, 127.0
FP8_LIMIT = 448.0
TENSOR = "input_scale"


def create_weights(layer: Any, parts: int, loader: Any) -> None:
    """Register ``input_scale``, one per fused part."""
    parameter = PartScalesParameter(data=torch.zeros(parts, dtype=torch.float32), weight_loader=loader)
    layer.register_parameter(TENSOR, parameter)


def finish(layer: Any, prefix: str) -> Tensor:
    """Keep the scale on ``layer`` for :func:`quantize`; returns the factor for the weight's scale.

    Parts of a fused layer see the same activations; where their scales differ the largest serves them all, as
    in vLLM's own static W8A8.

    Raises:
        FormatError: the scale is missing, not finite or not positive.
    """
    largest, step = split_scale(layer.input_scale.data, f"{prefix}.{TENSOR}")
    delattr(layer, TENSOR)
    # Persistent, as vLLM leaves others as they are when weights are reloaded.
    layer.register_buffer("activation_scale", largest)
    layer.register_buffer("activation_step", step)
    return largest / step


def split_scale(scale: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """The largest of ``scale`` and its power of two; their ratio lies in [1, 2).

    Raises:
        FormatError: a value is not finite and positive.
    """
    if not bool(torch.isfinite(scale).all()) or not bool((scale > 0).all()):
        raise FormatError(
            f"{where} holds values that are not finite and positive, or was never loaded; config.json says "
            "that activations are quantised with a fixed scale"
        )
    largest = scale.max().to(torch.float32)
    step = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 1)
    return largest, step


def quantize(x: Tensor, scale: Tensor, step: Tensor, quant: StaticQuant) -> Tensor:
    """``x`` rounded to its 8-bit numbers times ``step``, in the dtype of ``x``.

    Args:
        x: activations.
        scale: of one number; a scalar tensor.
        step: the power of two in ``scale``; a scalar tensor.
        quant: kind of the numbers.
    """
    numbers = x.to(torch.float32) / scale
    if quant is StaticQuant.INT8:
        numbers = numbers.round().clamp(INT8_LOW, INT8_HIGH)
    else:
        numbers = numbers.clamp(-FP8_LIMIT, FP8_LIMIT).to(torch.float8_e4m3fn).to(torch.float32)
    return (numbers * step).to(x.dtype)
