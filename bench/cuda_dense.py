"""What 2:4 kernels are compared with on a GPU: dense products as torch and vLLM run them.

Every baseline multiplies matrices of zeros-free random bits of the right type and shape; their values do not
change their speed. A baseline that this machine or installation lacks says so instead of a time.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vllm_sparse.kernels.base import ActivationQuant, LinearSpec, WeightFormat

Call = Callable[[], object]


@dataclass(frozen=True)
class Baseline:
    """One dense way to compute a layer.

    Attributes:
        name: as the table shows it.
        vllm: whether this is what vLLM runs for the dense format.
        weight_bytes: bytes of one copy of the weight.
        make: ``(device, tokens)`` -> one call on operands of its own.
    """

    name: str
    vllm: bool
    weight_bytes: int
    make: Callable[[torch.device, int], Call]


def baselines(spec: LinearSpec) -> list[Baseline]:
    """The dense competitors of a layer, its own precision and the 16-bit product."""
    found = [_sixteen_bit(spec)]
    if spec.weight is WeightFormat.FP8_E4M3 and spec.activation_quant is ActivationQuant.FP8_PER_TOKEN:
        found += [_scaled_mm_fp8(spec), _cutlass(spec, torch.float8_e4m3fn)]
    if spec.weight is WeightFormat.INT8 and spec.activation_quant is ActivationQuant.INT8_PER_TOKEN:
        found.append(_cutlass(spec, torch.int8))
    if spec.weight is WeightFormat.INT4:
        found.append(_marlin_int4(spec))
    return found


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if dtype.itemsize == 1:
        return torch.randint(-8, 8, shape, device=device).to(torch.float32).to(dtype)
    return torch.randn(shape, device=device, dtype=dtype)


def _sixteen_bit(spec: LinearSpec) -> Baseline:
    def make(device: torch.device, tokens: int) -> Call:
        w = _random((spec.n, spec.k), spec.activation_dtype, device)
        x = _random((tokens, spec.k), spec.activation_dtype, device)
        return lambda: F.linear(x, w)

    plain = spec.weight in (WeightFormat.BF16, WeightFormat.FP16)
    return Baseline("cublas 16-bit", plain, 2 * spec.n * spec.k, make)


def _scaled_mm_fp8(spec: LinearSpec) -> Baseline:
    def make(device: torch.device, tokens: int) -> Call:
        w = _random((spec.n, spec.k), torch.float8_e4m3fn, device)
        x = _random((tokens, spec.k), torch.float8_e4m3fn, device)
        one = torch.ones((), device=device)
        return lambda: torch._scaled_mm(x, w.t(), one, one, out_dtype=spec.activation_dtype)

    return Baseline("cublas fp8", False, spec.n * spec.k, make)


def _cutlass(spec: LinearSpec, dtype: torch.dtype) -> Baseline:
    def make(device: torch.device, tokens: int) -> Call:
        from vllm import _custom_ops

        w = _random((spec.n, spec.k), dtype, device)
        x = _random((tokens, spec.k), dtype, device)
        x_scale = torch.ones(tokens, 1, device=device)
        w_scale = torch.ones(1, spec.n, device=device)
        return lambda: _custom_ops.cutlass_scaled_mm(x, w.t(), x_scale, w_scale, spec.activation_dtype)

    return Baseline(f"vllm cutlass {dtype}".replace("torch.", ""), True, spec.n * spec.k, make)


def _marlin_int4(spec: LinearSpec) -> Baseline:
    group = spec.group_size or spec.k

    def make(device: torch.device, tokens: int) -> Call:
        from vllm import _custom_ops
        from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_make_workspace_new
        from vllm.scalar_type import scalar_types

        # Up to 0.26 at least it took the order of the input columns, which is the plain one here.
        taken = inspect.signature(_custom_ops.marlin_gemm).parameters
        order = {name: None for name in ("g_idx", "perm") if name in taken}
        # Marlin's layout: 16 rows of K by 16 columns of N in 32 words; any bits are a weight.
        w = torch.randint(0, 1 << 30, (spec.k // 16, 2 * spec.n), dtype=torch.int32, device=device)
        scales = torch.ones(spec.k // group, spec.n, dtype=spec.activation_dtype, device=device)
        x = _random((tokens, spec.k), spec.activation_dtype, device)
        workspace: Any = marlin_make_workspace_new(device)

        def call() -> Tensor:
            return _custom_ops.marlin_gemm(
                a=x,
                c=None,
                b_q_weight=w,
                b_bias=None,
                b_scales=scales,
                a_scales=None,
                global_scale=None,
                b_zeros=None,
                workspace=workspace,
                b_q_type=scalar_types.uint4b8,
                size_m=tokens,
                size_n=spec.n,
                size_k=spec.k,
                use_fp32_reduce=True,
                **order,
            )

        return call

    return Baseline("vllm marlin int4", True, spec.n * spec.k // 2, make)
