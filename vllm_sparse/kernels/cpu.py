"""The CPU backend: compiled 2:4 kernels that permute activations instead of expanding weights.

The packed layout is described in ``csrc/layout.h`` and is the same for every instruction-set level. It costs
9 bits per dense 16-bit weight, 5 per int8 or fp8 weight and 3 per int4 weight.

Arithmetic: products and sums in float32 (int32 with int8 activations), one rounding at the end. Per-channel
scales are applied to the sums, so int8 and fp8 values enter exactly. Scales per group of columns are
multiplied into the weights, which are then rounded to the activations' dtype, as a dequantised dense weight
would be; with int8 activations they are multiplied into each group's integer sum, and nothing is rounded.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from vllm_sparse.errors import NumericsError, UnsupportedError
from vllm_sparse.kernels import experts, library
from vllm_sparse.kernels.base import (
    ActivationQuant,
    Backend,
    CanonicalWeight,
    GatedActivation,
    LinearSpec,
    PackedWeight,
    StackedWeight,
    WeightFormat,
)
from vllm_sparse.kernels.reference import FP8_MAX, check_canonical, token_scales
from vllm_sparse.sparse24.bitmask import validate_bitmask

# Numbered as csrc/layout.h numbers them.
_FLOAT_KIND = {torch.bfloat16: 0, torch.float16: 1}
_QUANTIZED_KIND = {WeightFormat.INT8: 2, WeightFormat.FP8_E4M3: 3, WeightFormat.INT4: 4}
_INT8_ACTIVATIONS_KIND = {WeightFormat.INT8: 5, WeightFormat.INT4: 6}
_FLOAT_FORMATS = frozenset({WeightFormat.BF16, WeightFormat.FP16, WeightFormat.FP32})
# Activation quantisation that each weight format has a kernel for.
_ACTIVATIONS = {
    WeightFormat.INT8: frozenset({ActivationQuant.NONE, ActivationQuant.INT8_PER_TOKEN}),
    WeightFormat.FP8_E4M3: frozenset({ActivationQuant.NONE, ActivationQuant.FP8_PER_TOKEN}),
    WeightFormat.INT4: frozenset({ActivationQuant.NONE, ActivationQuant.INT8_PER_TOKEN}),
}
_PANEL_ROWS = 8
_BLOCK_COLUMNS = 64
_GROUP_MULTIPLE = 32
# The kernels decode fp8 through fp16's exponent, which leaves the values divided by this.
_FP8_DECODE_FACTOR = 256.0


def kind_code(spec: LinearSpec) -> int:
    """The operators' number for this weight and its activations."""
    if spec.weight in _FLOAT_FORMATS:
        return _FLOAT_KIND[spec.activation_dtype]
    if spec.activation_quant is ActivationQuant.INT8_PER_TOKEN:
        return _INT8_ACTIVATIONS_KIND[spec.weight]
    return _QUANTIZED_KIND[spec.weight]


def _pack_scale(spec: LinearSpec, weight: CanonicalWeight) -> Tensor | None:
    """Scales in the kernels' order; see the schema of ``linear_24`` in csrc/ops.cpp."""
    if weight.scale is None:
        return None
    scale = weight.scale.to(torch.float32)
    if spec.weight is WeightFormat.FP8_E4M3:
        scale = scale * _FP8_DECODE_FACTOR
    rows = -spec.n % _PANEL_ROWS
    if spec.group_size is None:
        scale = F.pad(scale[:, 0], (0, rows))
        if spec.activation_quant is not ActivationQuant.INT8_PER_TOKEN:
            return scale.contiguous()
        return torch.stack([scale, F.pad(_offset_sums(spec, weight), (0, rows))])
    groups = _padded_groups(spec, spec.group_size)
    scale = F.pad(scale, (0, groups - scale.shape[1], 0, rows))
    scale = scale.reshape(-1, _PANEL_ROWS, groups).transpose(1, 2)
    if spec.activation_quant is not ActivationQuant.INT8_PER_TOKEN:
        return scale.contiguous()
    return torch.cat([scale.reshape(-1), F.pad(_offset_sums(spec, weight), (0, rows))])


def _padded_groups(spec: LinearSpec, group_size: int) -> int:
    """Scale groups of a row with the columns that pad it to whole blocks."""
    padded_k = -(-spec.k // _BLOCK_COLUMNS) * _BLOCK_COLUMNS
    return -(-padded_k // group_size)


def _offset_sums(spec: LinearSpec, weight: CanonicalWeight) -> Tensor:
    """What activations of 128 would add to each row's sum ``[n]``: the kernels' activations are unsigned."""
    if spec.group_size is None or weight.scale is None:
        sums = weight.values.sum(1, dtype=torch.int32)
    else:
        # Half of a group's columns are kept.
        groups = weight.values.reshape(spec.n, -1, spec.group_size // 2).sum(-1, dtype=torch.int32)
        sums = (groups.to(torch.float64) * weight.scale.to(torch.float32)).sum(1)
    return sums.to(torch.float32) * 128


def _unpack_scale(spec: LinearSpec, scale: Tensor) -> Tensor:
    """The canonical scale ``[n, groups]`` from the kernels' order."""
    padded_n = -(-spec.n // _PANEL_ROWS) * _PANEL_ROWS
    groups = 1 if spec.group_size is None else _padded_groups(spec, spec.group_size)
    # What may follow are sums, not scales.
    panels = scale.reshape(-1)[: padded_n * groups].reshape(-1, groups, _PANEL_ROWS)
    if spec.group_size is None:
        canonical = panels.reshape(-1, 1)[: spec.n]
    else:
        per_row = panels.transpose(1, 2).reshape(-1, groups)
        canonical = per_row[: spec.n, : spec.k // spec.group_size]
    return canonical / _FP8_DECODE_FACTOR if spec.weight is WeightFormat.FP8_E4M3 else canonical


class CpuBackend(Backend):
    """Compiled kernels, from AVX-512 BF16 down to plain C++."""

    name = "cpu"

    def unsupported_reason(self, spec: LinearSpec, device: torch.device) -> str | None:
        """See :class:`Backend`."""
        if device.type != "cpu":
            return f"it runs on the CPU, the weight is on {device}"
        if spec.k % 4:
            return f"{spec.k} input features are not a multiple of 4"
        if spec.activation_dtype not in _FLOAT_KIND:
            return f"it takes bfloat16 and float16 activations, not {spec.activation_dtype}"
        allowed = _ACTIVATIONS.get(spec.weight, frozenset({ActivationQuant.NONE}))
        if spec.activation_quant not in allowed:
            return f"no kernel for {spec.weight} weights with {spec.activation_quant} activations"
        if spec.group_size is not None:
            if spec.group_size % _GROUP_MULTIPLE:
                return f"scale groups of {spec.group_size} columns are not a multiple of {_GROUP_MULTIPLE}"
            if spec.activation_quant is not ActivationQuant.NONE and spec.weight is not WeightFormat.INT4:
                what = f"{spec.weight} weights with {spec.activation_quant} activations"
                return f"{what} need one scale per output channel"
        return library.load_failure()

    def pack(self, spec: LinearSpec, weight: CanonicalWeight) -> PackedWeight:
        """Pack into 8x64 blocks; float weights take the activations' dtype, as a dense layer's would.

        Raises:
            FormatError: the weight is not what ``spec`` says, or not 2:4.
            NumericsError: an fp8 weight holds NaN, or an int4 value is out of range.
            UnsupportedError: this backend cannot serve ``spec`` here.
        """
        reason = self.unsupported_reason(spec, weight.values.device)
        if reason is not None:
            raise UnsupportedError(f"the cpu backend cannot pack this 2:4 weight: {reason}")
        check_canonical(spec, weight, bitmask=False)
        values = weight.values
        if spec.weight in _FLOAT_FORMATS:
            values = values.to(spec.activation_dtype)
        elif spec.weight is WeightFormat.FP8_E4M3 and bool(values.isnan().any()):
            raise NumericsError("an fp8 weight holds NaN; the checkpoint is damaged")
        args = (values.contiguous(), weight.bitmask.contiguous(), spec.n, spec.k, kind_code(spec))
        try:
            packed = torch.ops.vllm_sparse.pack_24(*args)
        except RuntimeError:
            # Find out where, in words; what is not the bitmask's fault stays as it is.
            validate_bitmask(weight.values, weight.bitmask, (spec.n, spec.k))
            raise
        return PackedWeight(packed, _pack_scale(spec, weight))

    def linear(
        self, spec: LinearSpec, x: Tensor, packed: Tensor, scale: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """See :class:`Backend`; one op, except that fp8 activations are quantised by torch first."""
        op = torch.ops.vllm_sparse.linear_24
        arguments = (spec.n, spec.k, kind_code(spec), spec.group_size or 0)
        if spec.activation_quant is not ActivationQuant.FP8_PER_TOKEN:
            return op(x, packed, scale, bias, *arguments)
        # fp8 values are exact in 16 bits, so only the token's scale is left for after the product.
        wide = x.to(torch.float32)
        token_scale = token_scales(wide, FP8_MAX)
        quantized = (wide / token_scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        out = op(quantized.to(x.dtype), packed, scale, None, *arguments).to(torch.float32) * token_scale
        return (out if bias is None else out + bias).to(x.dtype)

    def settle(self, packed: Tensor) -> Tensor:
        """See :class:`Backend`; a copy on 2 MB pages, which weights of a few MB share."""
        stacked = experts.empty_stack(packed, 1)
        stacked[0].copy_(packed)
        self.settle_stack(stacked)
        return stacked[0]

    def settle_stack(self, stacked: Tensor) -> None:
        """See :class:`Backend`; asks again for 2 MB pages that the system did not have at first."""
        torch.ops.vllm_sparse.join_pages(stacked)

    def empty_stack(self, one: Tensor, count: int) -> Tensor:
        """See :class:`Backend`; in 2 MB pages where the system has them, as single weights are."""
        return experts.empty_stack(one, count)

    def layer_unsupported_reason(self, gate_up: LinearSpec, down: LinearSpec) -> str | None:
        """See :class:`Backend`."""
        return experts.unsupported_reason(gate_up, down)

    def experts_layer(
        self,
        gate_up: StackedWeight,
        down: StackedWeight,
        activation: GatedActivation,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
    ) -> Tensor:
        """See :class:`Backend`; one op."""
        reason = self.layer_unsupported_reason(gate_up.spec, down.spec)
        if reason is not None:
            raise UnsupportedError(f"these experts have no operator of their own: {reason}")
        kind = kind_code(down.spec)
        return experts.forward(gate_up, down, kind, activation, x, topk_weights, topk_ids)

    def unpack(self, spec: LinearSpec, packed: Tensor, scale: Tensor | None) -> Tensor:
        """See :class:`Backend`."""
        dense = torch.ops.vllm_sparse.unpack_24(packed, spec.n, spec.k, kind_code(spec))
        if scale is None:
            return dense
        canonical = _unpack_scale(spec, scale)
        grouped = dense.to(torch.float32).reshape(spec.n, canonical.shape[1], -1) * canonical.unsqueeze(-1)
        return grouped.reshape(spec.n, spec.k).to(spec.activation_dtype)
