"""The reference backend: plain torch, every format, every device.

It keeps the canonical bytes (values, then bitmask) and rebuilds the dense weight in each call, so it saves
memory at rest but no time. It is the oracle for the other backends and what serves where none of them can.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from vllm_sparse.errors import FormatError, NumericsError
from vllm_sparse.kernels.base import (
    ActivationQuant,
    Backend,
    CanonicalWeight,
    LinearSpec,
    PackedWeight,
    WeightFormat,
)
from vllm_sparse.sparse24.bitmask import unpack_mask, validate_bitmask

STORAGE_DTYPE = {
    WeightFormat.BF16: torch.bfloat16,
    WeightFormat.FP16: torch.float16,
    WeightFormat.FP32: torch.float32,
    WeightFormat.INT8: torch.int8,
    WeightFormat.FP8_E4M3: torch.float8_e4m3fn,
    WeightFormat.INT4: torch.int8,
}
QUANTIZED = frozenset({WeightFormat.INT8, WeightFormat.FP8_E4M3, WeightFormat.INT4})
INT8_MAX = 127.0
FP8_MAX = 448.0


def check_canonical(spec: LinearSpec, weight: CanonicalWeight, bitmask: bool = True) -> None:
    """Check that ``weight`` is the matrix that ``spec`` describes.

    Args:
        spec: the layer.
        weight: its canonical weight.
        bitmask: also check every group of the bitmask, which takes memory of the order of the dense weight.

    Raises:
        FormatError: dtype, shape, bitmask or scale disagree with ``spec``.
        NumericsError: an int4 value outside [-8, 7].
    """
    expected = STORAGE_DTYPE[spec.weight]
    if weight.values.dtype != expected:
        raise FormatError(f"a {spec.weight} weight is stored as {expected}; found {weight.values.dtype}")
    if bitmask:
        validate_bitmask(weight.values, weight.bitmask, (spec.n, spec.k))
    elif (list(weight.values.shape), list(weight.bitmask.shape)) != (
        [spec.n, spec.k // 2],
        [spec.n, -(-spec.k // 8)],
    ):
        raise FormatError(
            f"a [{spec.n}, {spec.k}] layer needs values [{spec.n}, {spec.k // 2}] and a bitmask "
            f"[{spec.n}, {-(-spec.k // 8)}]; found {list(weight.values.shape)} and "
            f"{list(weight.bitmask.shape)}"
        )
    if (weight.scale is None) == (spec.weight in QUANTIZED):
        found = "none" if weight.scale is None else f"one of shape {list(weight.scale.shape)}"
        needed = "need a scale" if spec.weight in QUANTIZED else "carry no scale"
        raise FormatError(f"{spec.weight} weights {needed}; found {found}")
    if weight.scale is not None:
        groups = 1 if spec.group_size is None else spec.k // spec.group_size
        if spec.group_size is not None and spec.k % spec.group_size:
            raise FormatError(f"group_size {spec.group_size} does not divide the {spec.k} input features")
        if list(weight.scale.shape) != [spec.n, groups]:
            raise FormatError(
                f"scale must be [{spec.n}, {groups}] for this layer; found {list(weight.scale.shape)}"
            )
    if spec.weight is WeightFormat.INT4 and weight.values.numel():
        low, high = (int(v) for v in weight.values.aminmax())
        if low < -8 or high > 7:
            raise NumericsError(f"int4 values must lie in [-8, 7]; found {low}..{high}")


def expand(values: Tensor, mask: Tensor) -> Tensor:
    """Dense ``[n, k]`` from kept values ``[n, k/2]`` and a bool mask ``[n, k]`` with 2 bits in every 4.

    Traceable and free of index tensors: position p of a group takes its first value if no earlier
    position is kept, else its second.
    """
    n, k = mask.shape
    groups = mask.reshape(n, k // 4, 4)
    raw = values.view(torch.uint8) if values.element_size() == 1 else values
    first, second = raw.reshape(n, k // 4, 2).unbind(-1)
    kept0, kept1, kept2, kept3 = groups.unbind(-1)
    zero = torch.zeros((), dtype=raw.dtype, device=raw.device)
    columns = (
        torch.where(kept0, first, zero),
        torch.where(kept1, torch.where(kept0, second, first), zero),
        torch.where(kept2, torch.where(kept0 | kept1, second, first), zero),
        torch.where(kept3, second, zero),
    )
    return torch.stack(columns, dim=-1).reshape(n, k).view(values.dtype)


def token_scales(x: Tensor, top: float) -> Tensor:
    """Scale of each token (row) of ``x``, float32 ``[..., 1]``: its largest magnitude becomes ``top``.

    The divisor is a tensor: by a Python number torch divides on CUDA with its reciprocal, whose scales are
    off by a rounding, and a number halfway between two codes then falls to the other one.
    """
    largest = x.abs().amax(-1, keepdim=True)
    return (largest / torch.full_like(largest, top)).clamp_min(torch.finfo(torch.float32).tiny)


def quantize_per_token(x: Tensor, quant: ActivationQuant) -> Tensor:
    """``x`` (float32) after a symmetric dynamic round trip with one scale per token (row)."""
    if quant is ActivationQuant.INT8_PER_TOKEN:
        scale = token_scales(x, INT8_MAX)
        return torch.round(x / scale).clamp(-INT8_MAX, INT8_MAX) * scale
    scale = token_scales(x, FP8_MAX)
    return (x / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).to(torch.float32) * scale


class ReferenceBackend(Backend):
    """Rebuild the dense weight, then ``F.linear``."""

    name = "reference"

    def unsupported_reason(self, spec: LinearSpec, device: torch.device) -> str | None:
        """Every well-formed spec is served."""
        if spec.k % 4:
            return f"{spec.k} input features are not a multiple of 4"
        return None

    def pack(self, spec: LinearSpec, weight: CanonicalWeight) -> PackedWeight:
        """The canonical bytes in one flat uint8 tensor; int4 two to a byte, low nibble first."""
        check_canonical(spec, weight)
        values = weight.values.contiguous()
        if spec.weight is WeightFormat.INT4:
            pairs = values.view(torch.uint8).reshape(-1, 2)
            stored = (pairs[:, 0] & 0x0F) | (pairs[:, 1] << 4)
        else:
            stored = values.reshape(-1).view(torch.uint8)
        packed = torch.cat([stored, weight.bitmask.contiguous().reshape(-1)])
        scale = None if weight.scale is None else weight.scale.to(torch.float32).contiguous()
        return PackedWeight(packed, scale)

    def _dense(self, spec: LinearSpec, packed: Tensor, scale: Tensor | None) -> Tensor:
        """The weight ``[n, k]``: float32 and dequantised for quantised formats, else as stored."""
        kept = spec.n * (spec.k // 2)
        if spec.weight is WeightFormat.INT4:
            stored = packed[: kept // 2]
            pairs = torch.stack([stored & 0x0F, stored >> 4], dim=-1).view(torch.int8)
            values = ((pairs ^ 8) - 8).reshape(spec.n, -1)
            used = kept // 2
        else:
            dtype = STORAGE_DTYPE[spec.weight]
            used = kept * dtype.itemsize
            values = packed[:used].view(dtype).reshape(spec.n, spec.k // 2)
        mask = unpack_mask(packed[used:].reshape(spec.n, -1), spec.k)
        dense = expand(values, mask)
        if scale is None:
            return dense
        grouped = dense.to(torch.float32).reshape(spec.n, scale.shape[1], -1)
        return (grouped * scale.unsqueeze(-1)).reshape(spec.n, spec.k)

    def linear(
        self, spec: LinearSpec, x: Tensor, packed: Tensor, scale: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """See :class:`Backend`; traceable torch code."""
        if spec.activation_quant is ActivationQuant.NONE:
            return F.linear(x, self.unpack(spec, packed, scale).to(x.dtype), bias)
        dense = self._dense(spec, packed, scale).to(torch.float32)
        quantized = quantize_per_token(x.to(torch.float32), spec.activation_quant)
        out = F.linear(quantized, dense, None if bias is None else bias.to(torch.float32))
        return out.to(x.dtype)

    def unpack(self, spec: LinearSpec, packed: Tensor, scale: Tensor | None) -> Tensor:
        """See :class:`Backend`."""
        return self._dense(spec, packed, scale).to(spec.activation_dtype)
