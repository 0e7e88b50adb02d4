"""The Triton backend: every weight format from one packed layout, on NVIDIA GPUs from Ampere on."""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from vllm_sparse.errors import NumericsError
from vllm_sparse.kernels.base import (
    ActivationQuant,
    Backend,
    CanonicalWeight,
    LinearSpec,
    PackedWeight,
    WeightFormat,
)
from vllm_sparse.kernels.reference import check_canonical
from vllm_sparse.kernels.triton import layout as packed_layout
from vllm_sparse.kernels.triton.layout import Layout

_ACTIVATIONS = {torch.bfloat16: WeightFormat.BF16, torch.float16: WeightFormat.FP16}
_FLOAT_FORMATS = frozenset({WeightFormat.BF16, WeightFormat.FP16, WeightFormat.FP32})
_MINIMUM_CAPABILITY = (8, 0)
QUANT_NUMBER = {
    ActivationQuant.NONE: 0,
    ActivationQuant.INT8_PER_TOKEN: 1,
    ActivationQuant.FP8_PER_TOKEN: 2,
}


class TritonBackend(Backend):
    """Packed select for a few tokens, expand-and-dot for more, expand once and cuBLAS for many."""

    name = "triton"
    has_experts_operator = True

    def unsupported_reason(self, spec: LinearSpec, device: torch.device) -> str | None:
        """See :class:`Backend`. Under ``TRITON_INTERPRET=1`` CPU tensors are served, slowly, for tests."""
        if spec.k % 4:
            return f"{spec.k} input features are not a multiple of 4"
        if spec.activation_dtype not in _ACTIVATIONS:
            return f"it takes bfloat16 and float16 activations, not {spec.activation_dtype}"
        if spec.group_size is not None and (spec.group_size % 4 or spec.weight in _FLOAT_FORMATS):
            return (
                f"scale groups must be a multiple of 4 columns of a quantised weight, not {spec.group_size}"
            )
        return _device_reason(device)

    def advice(self, spec: LinearSpec) -> str | None:
        """See :class:`Backend`: the CUDA C++ kernels, which read the same weights."""
        # Here rather than above because that module needs this package's.
        from vllm_sparse.kernels.cuda import configs, library

        if interpreted() or configs.format_reason(self._layout(spec).weight, spec.group_size or 0):
            return None
        return library.advice() if _cuda_kernels_would_serve() else None

    def _layout(self, spec: LinearSpec) -> Layout:
        weight = _ACTIVATIONS[spec.activation_dtype] if spec.weight in _FLOAT_FORMATS else spec.weight
        return Layout(spec.n, spec.k, weight)

    def pack(self, spec: LinearSpec, weight: CanonicalWeight) -> PackedWeight:
        """Pack; float weights take the activations' dtype, as a dense layer's would.

        Raises:
            FormatError: the weight is not what ``spec`` says.
            NumericsError: an fp8 weight holds NaN, which the kernels' decoding has no code for.
        """
        # Defines the operators; here rather than above because it needs Triton.
        from vllm_sparse.kernels.triton import experts, ops  # noqa: F401

        check_canonical(spec, weight, bitmask=False)
        values = weight.values
        if spec.weight in _FLOAT_FORMATS:
            values = values.to(spec.activation_dtype)
        if spec.weight is WeightFormat.FP8_E4M3:
            _refuse_nan(values)
        packed = packed_layout.pack(self._layout(spec), values, weight.bitmask)
        if packed.is_cuda:
            from vllm_sparse.kernels.cuda import selftest

            selftest.run_once(packed.get_device(), ops.machine_of(packed.get_device()))
        return PackedWeight(packed, None if weight.scale is None else _packed_scale(weight.scale))

    def linear(
        self, spec: LinearSpec, x: Tensor, packed: Tensor, scale: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """See :class:`Backend`; one op."""
        return torch.ops.vllm_sparse.linear_24_triton(
            x,
            packed,
            scale,
            bias,
            spec.n,
            spec.k,
            packed_layout.FORMAT_NUMBER[self._layout(spec).weight],
            spec.group_size or 0,
            QUANT_NUMBER[spec.activation_quant],
        )

    def experts_linear(
        self, spec: LinearSpec, x: Tensor, packed: Tensor, scale: Tensor | None, expert_ids: Tensor
    ) -> Tensor:
        """See :class:`Backend`; one op."""
        return torch.ops.vllm_sparse.experts_linear_24_triton(
            x,
            packed,
            scale,
            expert_ids,
            spec.n,
            spec.k,
            packed_layout.FORMAT_NUMBER[self._layout(spec).weight],
            spec.group_size or 0,
            QUANT_NUMBER[spec.activation_quant],
        )

    def unpack(self, spec: LinearSpec, packed: Tensor, scale: Tensor | None) -> Tensor:
        """See :class:`Backend`; plain torch."""
        dense = packed_layout.unpack(self._layout(spec), packed)
        if scale is None:
            return dense
        groups = scale.shape[0]
        grouped = dense.to(torch.float32).reshape(spec.n, groups, -1) * scale.to(torch.float32).t().unsqueeze(
            -1
        )
        return grouped.reshape(spec.n, spec.k).to(spec.activation_dtype)


def _cuda_kernels_would_serve() -> bool:
    """Whether the CUDA C++ kernels are what serves on this machine's GPU, if they are built."""
    if not torch.cuda.is_available():
        return False
    from vllm_sparse.kernels.cuda import configs
    from vllm_sparse.kernels.triton import ops, tables

    machine = ops.machine_of(torch.cuda.current_device())
    return configs.serves_without_a_table(machine) or tables.table_path(machine.name).exists()


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors: a mode for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _device_reason(device: torch.device) -> str | None:
    if device.type == "cpu" and not interpreted():
        return "it runs on NVIDIA GPUs, the weight is on the CPU"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.cuda is None:
        return f"it runs on NVIDIA GPUs, the weight is on {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < _MINIMUM_CAPABILITY:
        found = ".".join(map(str, capability))
        return f"it needs compute capability 8.0 or later, {torch.cuda.get_device_name(device)} has {found}"
    return None


def _refuse_nan(values: Tensor) -> None:
    bad = (values.view(torch.uint8) & 0x7F) == 0x7F
    if bool(bad.any()):
        row = int(torch.nonzero(bad)[0, 0])
        raise NumericsError(f"the fp8 weight holds {int(bad.sum())} NaN values (first in row {row})")


def _packed_scale(scale: Tensor) -> Tensor:
    """``[n, groups]`` -> ``[groups, n]``, in half the bytes where that loses nothing."""
    scale = scale.to(torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        if scale.shape[1] > 1 and torch.equal(scale.to(dtype).to(torch.float32), scale):
            scale = scale.to(dtype)
            break
    return scale.t().contiguous()
