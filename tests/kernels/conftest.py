"""Shared pieces of the kernel tests: 2:4 weights, adversarial ones among them, and float64 references."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from torch import Tensor

from vllm_sparse.kernels import library
from vllm_sparse.kernels.base import ActivationQuant, Backend, CanonicalWeight, LinearSpec, WeightFormat
from vllm_sparse.sparse24 import compress, topk_mask

FORMAT = {
    torch.bfloat16: WeightFormat.BF16,
    torch.float16: WeightFormat.FP16,
    torch.float32: WeightFormat.FP32,
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """A 2:4 layer with its dense twin."""

    spec: LinearSpec
    weight: CanonicalWeight
    dense: Tensor


def random_24(n: int, k: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator)
    return w * topk_mask(w.abs())


def from_dense(dense: Tensor) -> Layer:
    values, bitmask = compress(dense)
    spec = LinearSpec(dense.shape[0], dense.shape[1], FORMAT[dense.dtype], dense.dtype)
    return Layer(spec, CanonicalWeight(values, bitmask), dense)


def float_layer(n: int, k: int, dtype: torch.dtype, seed: int = 0) -> Layer:
    return from_dense(random_24(n, k, seed).to(dtype))


def quantized_layer(
    kind: WeightFormat,
    n: int,
    k: int,
    dtype: torch.dtype,
    group: int | None = None,
    quant: ActivationQuant = ActivationQuant.NONE,
) -> tuple[LinearSpec, CanonicalWeight, Tensor]:
    """A spec, its canonical weight and the exact float64 dequantised weight."""
    w = random_24(n, k, seed=n + k)
    if kind is WeightFormat.INT8:
        q = (w * 60).round().clamp(-128, 127).to(torch.int8)
    elif kind is WeightFormat.INT4:
        q = (w * 4).round().clamp(-8, 7).to(torch.int8)
    else:
        q = (w * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    values, bitmask = compress(q)
    scale = torch.rand(n, 1 if group is None else k // group) * 0.01 + 0.001
    dense = (q.double().reshape(n, scale.shape[1], -1) * scale.double().unsqueeze(-1)).reshape(n, k)
    spec = LinearSpec(n, k, kind, dtype, activation_quant=quant, group_size=group)
    return spec, CanonicalWeight(values, bitmask, scale), dense


def assert_close_to_exact(out: Tensor, x: Tensor, dense: Tensor, bias: Tensor | None = None) -> None:
    """``out`` must equal the float64 product up to fp32 summation and one rounding to its dtype."""
    exact = x.double() @ dense.double().T
    magnitude = x.double().abs() @ dense.double().abs().T
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    tolerance = torch.finfo(out.dtype).eps * exact.abs() + 2e-6 * magnitude
    # Below the smallest normal number a result may be rounded to the subnormal grid or flushed.
    tolerance = tolerance + torch.finfo(out.dtype).tiny
    error = (out.double() - exact).abs()
    assert bool((error <= tolerance).all()), f"worst excess {float((error - tolerance).max())}"


def assert_integers_are_exact(
    backend: Backend, layer: tuple[LinearSpec, CanonicalWeight, Tensor], tokens: Iterable[int]
) -> None:
    """Integers whose largest is 127 are their own int8 activations: only sums and the output are rounded."""
    spec, weight, exact = layer
    dtype = spec.activation_dtype
    assert backend.unsupported_reason(spec, torch.device("cpu")) is None
    packed = backend.pack(spec, weight)
    assert torch.equal(backend.unpack(spec, packed.packed, packed.scale), exact.to(dtype))
    for m in tokens:
        x = torch.randint(-127, 128, (m, spec.k)).to(dtype)
        if m:
            x[:, 0] = 127
        bias = torch.randn(spec.n).to(dtype)
        assert_close_to_exact(backend.linear(spec, x, packed.packed, packed.scale, bias), x, exact, bias)


def _levels() -> list[str]:
    if library.cpu_facts().built:
        return [level.name.lower() for level in library.supported_levels()]
    return []


LEVELS = _levels()


@pytest.fixture(params=LEVELS or [pytest.param("none", marks=pytest.mark.skip("kernels not built"))])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction-set level that this processor executes, forced."""
    before = library.current_isa().name.lower()
    library.set_isa(request.param)
    yield request.param
    library.set_isa(before)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
