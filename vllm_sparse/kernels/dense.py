"""Dense bf16 weights in the CPU kernels' panels, for the layers that a checkpoint leaves dense.

The same arithmetic as any dense bf16 product (float32 sums, one rounding), only read faster: a head of a
small model is a large part of what one token reads.
"""

import torch
from torch import Tensor

from vllm_sparse.errors import UnsupportedError
from vllm_sparse.kernels import library


def unsupported_reason(weight: Tensor) -> str | None:
    """Why ``weight`` ``[n, k]`` cannot be served by these kernels, in words for a log; None if it can."""
    if weight.device.type != "cpu":
        return f"it runs on the CPU, the weight is on {weight.device}"
    if weight.dtype != torch.bfloat16:
        return f"it takes bfloat16, not {weight.dtype}"
    reason = library.load_failure()
    if reason is None and library.current_isa() is not library.Isa.AVX512BF16:
        return f"it needs avx512bf16; this is {library.current_isa().name.lower()}"
    return reason


def pack(weight: Tensor) -> Tensor:
    """``weight`` ``[n, k]`` in panels, a flat uint8 tensor of its own.

    Raises:
        UnsupportedError: see :func:`unsupported_reason`.
    """
    reason = unsupported_reason(weight)
    if reason is not None:
        raise UnsupportedError(f"the dense CPU kernel cannot take this weight: {reason}")
    packed: Tensor = torch.ops.vllm_sparse.pack_dense(weight.contiguous())
    return packed


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, n: int, k: int) -> Tensor:
    """``x [..., k] @ W.T + bias`` -> ``[..., n]``, bf16."""
    out: Tensor = torch.ops.vllm_sparse.linear_dense(x, packed, bias, n, k)
    return out
