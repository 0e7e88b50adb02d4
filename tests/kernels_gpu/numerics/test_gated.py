"""The fused gated activation against torch, forward and backward, in every memory order."""

import pytest
import torch
from torch import Tensor

from converters.train.gated import FusedGated, gated_reference

from .conftest import DEVICE


def laid_out(values: Tensor, order: str) -> Tensor:
    """The same values stored by rows, by columns, or as part of a wider matrix."""
    if order == "columns":
        return values.T.contiguous().T
    if order == "half":
        return torch.cat([values, values], dim=1)[:, : values.shape[1]]
    return values.contiguous()


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(
    "orders", [("rows", "rows"), ("columns", "columns"), ("half", "rows"), ("columns", "rows")]
)
@pytest.mark.parametrize("shape", [(5, 7), (33, 96)])
def test_fused_equals_torch(activation, orders: tuple[str, str], shape: tuple[int, int]):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) * 2 for _ in range(3)]
    gate, up = (laid_out(value, order).to(DEVICE) for value, order in zip(values[:2], orders, strict=True))
    if orders[0] == "columns":
        assert gate.stride(1) != 1
    upstream = values[2].to(DEVICE)
    results = []
    for function in (FusedGated.apply, gated_reference):
        # The reference is float64: torch's own float32 tanh loses digits where 1 + tanh is small.
        wide = torch.float64 if function is gated_reference else torch.float32
        g = laid_out(gate.detach().to(wide), orders[0]).requires_grad_()
        u = laid_out(up.detach().to(wide), orders[1]).requires_grad_()
        out = function(g, u, activation)
        out.backward(upstream.to(wide))
        results.append((out.detach(), g.grad, u.grad))
    for fused, exact in zip(*results, strict=True):
        assert torch.allclose(fused.double(), exact, atol=2e-6, rtol=2e-6)
    if orders[0] == "columns":
        assert results[0][0].stride(0) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_rounded_once(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(1)
    gate, up = (torch.randn(16, 64, generator=generator).to(DEVICE, dtype) for _ in range(2))
    out = FusedGated.apply(gate, up, "silu")
    exact = gated_reference(gate.double(), up.double(), "silu")
    assert torch.all((out.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps * 0.51 + 1e-6)
