"""What the CPU kernels are compared with: dense products by own panels, by torch and by vLLM.

Every baseline multiplies random weights of the right type and shape. One that this machine or installation
lacks is left out by :func:`baselines`.
"""

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vllm_sparse.errors import UnsupportedError
from vllm_sparse.kernels import dense, library

logger = logging.getLogger(__name__)

Call = Callable[[], object]
_GROUP = 128


@dataclass(frozen=True)
class Baseline:
    """One dense way to compute a layer.

    Attributes:
        format: what its weights are: bf16, float32, int8 (with int8 activations) or int4.
        backend: as the table shows it.
        vllm: whether this is what vLLM runs for that format on a CPU.
        weight_bits: resident bits per weight.
        make: ``(n, k)`` -> a function of the activations, with a weight of its own.
    """

    format: str
    backend: str
    vllm: bool
    weight_bits: float
    make: Callable[[int, int], Callable[[Tensor], object]]


def _bf16_weight(n: int, k: int) -> Tensor:
    return torch.randn(n, k, dtype=torch.bfloat16)


def on_huge_pages(values: Tensor) -> Tensor:
    """A copy in memory that may use 2 MB pages, so that dense weights stream as 2:4 ones do."""
    if library.load_failure() is not None:
        return values.contiguous()
    data = torch.ops.vllm_sparse.empty_huge(values, values.numel() * values.element_size())
    copy = data.view(values.dtype).reshape(values.shape)
    return copy.copy_(values)


def _torch_linear(n: int, k: int) -> Callable[[Tensor], object]:
    w = on_huge_pages(_bf16_weight(n, k))
    return lambda x: F.linear(x, w)


def _float32_linear(n: int, k: int) -> Callable[[Tensor], object]:
    """A float32 layer; its activations would be float32 already, but converting them is a small part."""
    w = on_huge_pages(torch.randn(n, k))
    return lambda x: F.linear(x.to(torch.float32), w)


def _panels(n: int, k: int) -> Callable[[Tensor], object]:
    panels = dense.pack(_bf16_weight(n, k))
    return lambda x: dense.linear(x, panels, None)


def _onednn(n: int, k: int) -> Callable[[Tensor], object]:
    from vllm import _custom_ops as ops

    handle = ops.create_onednn_mm(_bf16_weight(n, k).t())
    return lambda x: ops.onednn_mm(handle, x, None)


def _onednn_float32(n: int, k: int) -> Callable[[Tensor], object]:
    """vLLM's product of a dense model that is served in float32."""
    from vllm import _custom_ops as ops

    handle = ops.create_onednn_mm(torch.randn(n, k).t())
    return lambda x: ops.onednn_mm(handle, x.to(torch.float32), None)


def _onednn_int8(n: int, k: int) -> Callable[[Tensor], object]:
    """vLLM's W8A8 with dynamic per-token activations, quantisation included."""
    from vllm import _custom_ops as ops

    w = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    scale = torch.rand(n, 1) * 0.01
    handle = ops.create_onednn_scaled_mm(w.t(), scale, torch.bfloat16, True, False)

    def run(x: Tensor) -> Tensor:
        quantized, token_scale, zero_point = ops.onednn_scaled_int8_quant(x)
        out = torch.empty(x.shape[0], n, dtype=x.dtype)
        return ops.onednn_scaled_mm(handle, quantized, out, token_scale, zero_point, None, None)

    return run


def _wna16(n: int, k: int) -> Callable[[Tensor], object]:
    """vLLM's W4A16 with groups of 128; 16 output channels to a block of int32 words."""
    from vllm import _custom_ops as ops

    packed = torch.randint(-(2**31), 2**31 - 1, (n // 16, 2 * k), dtype=torch.int32)
    scales = torch.rand(k // _GROUP, n).to(torch.bfloat16)
    hint = "amx" if torch.cpu._is_amx_tile_supported() else "vec"
    return lambda x: ops.cpu_gemm_wna16(x, packed, scales, None, None, 8, hint)


def has_bf16_instructions() -> bool:
    """Whether this processor has bf16 instructions, whatever level is forced."""
    return library.load_failure() is None and any(level.has_bf16 for level in library.supported_levels())


def _works(baseline: Baseline) -> bool:
    """Try a small layer: a library that is there may still lack the operator on this processor."""
    try:
        baseline.make(256, 256)(torch.randn(1, 256, dtype=torch.bfloat16))
    except (ImportError, AttributeError, RuntimeError, NotImplementedError) as error:
        logger.warning("no %s baseline for %s: %s", baseline.backend, baseline.format, error)
        return False
    return True


def baselines(formats: set[str]) -> list[Baseline]:
    """The dense competitors that run here: unquantised ones always, others if their format is asked for.

    Without bf16 instructions dense bf16 products of more than a token are slow, and who serves a dense model
    there takes float32: then that competes too.

    Args:
        formats: ``bf16``, ``int8``, ``int4``.
    """
    found = [Baseline("bf16", "torch", False, 16, _torch_linear)]
    if not has_bf16_instructions():
        found.append(Baseline("float32", "torch-float32", False, 32, _float32_linear))
    try:
        own = dense.unsupported_reason(_bf16_weight(8, 32)) is None
    except UnsupportedError:
        own = False
    if own:
        found.append(Baseline("bf16", "panels", False, 16, _panels))
    if importlib.util.find_spec("vllm") is not None:
        found.append(Baseline("bf16", "vllm-onednn", True, 16, _onednn))
        if not has_bf16_instructions():
            found.append(Baseline("float32", "vllm-onednn-float32", False, 32, _onednn_float32))
        if "int8" in formats:
            found.append(Baseline("int8", "vllm-onednn", True, 8, _onednn_int8))
        if "int4" in formats:
            found.append(Baseline("int4", "vllm-wna16", True, 4 + 16 / _GROUP, _wna16))
    return [baseline for baseline in found if _works(baseline)]
