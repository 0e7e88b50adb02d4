"""Numerical tests of the GPU kernels: on a GPU where there is one, else in Triton's interpreter.

The interpreter is a mode of the whole process, so these files are collected only in a process started for
them: ``test_numerics.py`` starts it. ``TRITON_INTERPRET=1 pytest tests/kernels_gpu/numerics`` does the same.
"""

import dataclasses
import os

import pytest
import torch
from torch import Tensor

from vllm_sparse.kernels.base import ActivationQuant, CanonicalWeight, LinearSpec, WeightFormat
from vllm_sparse.sparse24 import compress, topk_mask

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
if INTERPRETED:
    from . import interpreter

    interpreter.mend()
elif not torch.cuda.is_available():
    collect_ignore_glob = ["test_*"]

PLAIN = {torch.bfloat16: WeightFormat.BF16, torch.float16: WeightFormat.FP16}


@dataclasses.dataclass(frozen=True)
class Layer:
    """A packed-to-be layer and its dense twin in float64."""

    spec: LinearSpec
    weight: CanonicalWeight
    exact: Tensor


def random_24(n: int, k: int, seed: int = 0) -> Tensor:
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    return w * topk_mask(w.abs())


def make_layer(
    w: Tensor,
    weight: WeightFormat,
    dtype: torch.dtype,
    group: int | None = None,
    quant: ActivationQuant = ActivationQuant.NONE,
) -> Layer:
    """Quantise a float 2:4 matrix as ``weight`` asks and describe it."""
    n, k = w.shape
    spec = LinearSpec(n, k, weight, dtype, quant, group)
    if weight in PLAIN.values():
        stored = w.to(dtype)
        values, bitmask = compress(stored)
        return Layer(spec, CanonicalWeight(values.to(DEVICE), bitmask.to(DEVICE)), stored.double())
    grouped = w.reshape(n, 1 if group is None else k // group, -1)
    top = {WeightFormat.INT8: 127.0, WeightFormat.FP8_E4M3: 448.0, WeightFormat.INT4: 7.0}[weight]
    scale = (grouped.abs().amax(-1) / top).clamp_min(1e-6)
    ratio = (grouped / scale.unsqueeze(-1)).reshape(n, k)
    stored = (
        ratio.to(torch.float8_e4m3fn) if weight is WeightFormat.FP8_E4M3 else ratio.round().to(torch.int8)
    )
    values, bitmask = compress(stored)
    numbers = stored.to(torch.float32).double().reshape(grouped.shape)
    exact = (numbers * scale.double().unsqueeze(-1)).reshape(n, k)
    return Layer(spec, CanonicalWeight(values.to(DEVICE), bitmask.to(DEVICE), scale.to(DEVICE)), exact)


def assert_close_to_exact(
    out: Tensor,
    x: Tensor,
    exact_weight: Tensor,
    bias: Tensor | None = None,
    weight_rounding: float = 0.0,
    product_rounding: float = 0.0,
) -> None:
    """``out`` equals the float64 product up to float32 summation and one rounding to its dtype.

    ``weight_rounding`` is the relative rounding of each weight that the route is allowed (scales applied in
    16 bits), ``product_rounding`` that of the product before the bias (dense libraries).
    """
    x = x.cpu().double()
    exact = product = x @ exact_weight.T
    magnitude = x.abs() @ exact_weight.abs().T
    if bias is not None:
        exact, magnitude = exact + bias.cpu().double(), magnitude + bias.cpu().double().abs()
    tolerance = torch.finfo(out.dtype).eps * exact.abs() + (2e-6 + weight_rounding) * magnitude
    tolerance = tolerance + product_rounding * product.abs()
    tolerance = tolerance + torch.finfo(out.dtype).tiny
    error = (out.cpu().double() - exact).abs()
    assert bool((error <= tolerance).all()), f"worst excess {float((error - tolerance).max())}"


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    torch.manual_seed(1)
