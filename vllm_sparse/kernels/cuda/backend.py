"""The backend ``cuda``: sparse tensor cores on the Triton kernels' weights.

Up to 64 tokens, on compute capability 9.0 for any number; the Triton kernels do the rest.

It serves where it is asked for by name. Without that the Triton backend takes the same kernel, per shape and
token count, where a measured table says that it is faster.
"""

import torch
from torch import Tensor

from vllm_sparse.kernels.base import CanonicalWeight, LinearSpec, PackedWeight
from vllm_sparse.kernels.cuda import configs, library
from vllm_sparse.kernels.triton import layout as packed_layout
from vllm_sparse.kernels.triton.backend import QUANT_NUMBER, TritonBackend


class CudaBackend(TritonBackend):
    """``mma.sp`` from the Triton kernels' packed layout."""

    name = "cuda"

    def unsupported_reason(self, spec: LinearSpec, device: torch.device) -> str | None:
        """See :class:`Backend`."""
        return (
            super().unsupported_reason(spec, device)
            or configs.format_reason(self._layout(spec).weight, spec.group_size or 0)
            or library.load_failure()
        )

    def pack(self, spec: LinearSpec, weight: CanonicalWeight) -> PackedWeight:
        """See :meth:`TritonBackend.pack`."""
        # Defines the operator.
        from vllm_sparse.kernels.cuda import ops  # noqa: F401

        return super().pack(spec, weight)

    def linear(
        self, spec: LinearSpec, x: Tensor, packed: Tensor, scale: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """See :class:`Backend`; one op."""
        return torch.ops.vllm_sparse.linear_24_cuda(
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
