"""The CPU backend: compiled 2:4 kernels that permute activations instead of expanding weights.

The packed layout is described in ``csrc/layout.h``; it costs 9 bits per dense 16-bit weight and is the same
for every instruction-set level.
"""

import torch
from torch import Tensor

from vllm_sparse.kernels import library
from vllm_sparse.kernels.base import (
    ActivationQuant,
    Backend,
    CanonicalWeight,
    LinearSpec,
    PackedWeight,
    WeightFormat,
)
from vllm_sparse.kernels.reference import check_canonical
from vllm_sparse.sparse24.bitmask import validate_bitmask

# Numbered as csrc/layout.h numbers them.
_KIND_OF_DTYPE = {torch.bfloat16: 0, torch.float16: 1}
_FLOAT_FORMATS = frozenset({WeightFormat.BF16, WeightFormat.FP16, WeightFormat.FP32})


class CpuBackend(Backend):
    """Compiled kernels, from AVX-512 BF16 down to plain C++."""

    name = "cpu"

    def unsupported_reason(self, spec: LinearSpec, device: torch.device) -> str | None:
        """See :class:`Backend`."""
        if device.type != "cpu":
            return f"it runs on the CPU, the weight is on {device}"
        if spec.k % 4:
            return f"{spec.k} input features are not a multiple of 4"
        if spec.activation_dtype not in _KIND_OF_DTYPE:
            return f"it takes bfloat16 and float16 activations, not {spec.activation_dtype}"
        if spec.weight not in _FLOAT_FORMATS or spec.activation_quant is not ActivationQuant.NONE:
            return f"no kernel for {spec.weight} weights with activation quantisation {spec.activation_quant}"
        return library.load_failure()

    def pack(self, spec: LinearSpec, weight: CanonicalWeight) -> PackedWeight:
        """Pack into 8x64 blocks; float weights take the activations' dtype, as a dense layer's would."""
        check_canonical(spec, weight, bitmask=False)
        values = weight.values.to(spec.activation_dtype).contiguous()
        kind = _KIND_OF_DTYPE[spec.activation_dtype]
        try:
            packed = torch.ops.vllm_sparse.pack_24(values, weight.bitmask.contiguous(), spec.n, spec.k, kind)
        except RuntimeError:
            # Find out where, in words; what is not the bitmask's fault stays as it is.
            validate_bitmask(weight.values, weight.bitmask, (spec.n, spec.k))
            raise
        return PackedWeight(packed)

    def linear(
        self, spec: LinearSpec, x: Tensor, packed: Tensor, scale: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """See :class:`Backend`; one op."""
        kind = _KIND_OF_DTYPE[spec.activation_dtype]
        return torch.ops.vllm_sparse.linear_24(x, packed, bias, spec.n, spec.k, kind)

    def unpack(self, spec: LinearSpec, packed: Tensor, scale: Tensor | None) -> Tensor:
        """See :class:`Backend`."""
        kind = _KIND_OF_DTYPE[spec.activation_dtype]
        return torch.ops.vllm_sparse.unpack_24(packed, spec.n, spec.k, kind)
