"""The cuSPARSELt backend, through torch's operators: for many tokens, and for int8 and fp8 products.

The library multiplies with sparse tensor cores, which pays from a few hundred tokens on; its compressed
form is its own (9/16 of the dense elements for 16-bit types, 10/16 for 8-bit ones) and cannot be read back,
so this backend never mixes with another on one weight. What it needs and what is done about it:

- a group may hold two non-zeros, and the compressor counts -0.0 as one: zeros are normalised first;
- N and K in multiples of 16 (32 for 8-bit types), tokens in multiples of 8 (16): padded with zeros, N and K
  to multiples of 64, up to which the library itself pads a part of the form;
- a bias exactly as long as the padded N, in the output's dtype: padded, or added afterwards;
- a one-element ``alpha`` is read back to the host, which stops a capture: never passed;
- the default algorithm may lose a factor of two: every (shape, token bin) is searched when the weight is
  packed, which is never inside a capture;
- for float16 that search fails and takes the process's CUDA context with it: never searched, algorithm 0
  serves;
- whether a product can be captured into a CUDA graph depends on the versions: tried once per device, together
  with a check of the result, before the backend offers itself.
"""

import logging
from functools import cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from vllm_sparse.kernels import operators
from vllm_sparse.kernels.base import (
    ActivationQuant,
    Backend,
    CanonicalWeight,
    LinearSpec,
    PackedWeight,
    WeightFormat,
)
from vllm_sparse.kernels.reference import FP8_MAX, INT8_MAX, check_canonical, token_scales
from vllm_sparse.sparse24.bitmask import decompress

logger = logging.getLogger(__name__)

TOKEN_BINS = (16, 64, 256, 1024, 4096, 16384)
_SIXTEEN_BITS = {torch.bfloat16: WeightFormat.BF16, torch.float16: WeightFormat.FP16}
# Stored dtype -> dtype of the raw product: exact sums, scaled afterwards.
_PRODUCT_DTYPE = {torch.int8: torch.int32, torch.float8_e4m3fn: torch.float32}
_SERVED = {
    (WeightFormat.INT8, ActivationQuant.INT8_PER_TOKEN): torch.int8,
    (WeightFormat.FP8_E4M3, ActivationQuant.FP8_PER_TOKEN): torch.float8_e4m3fn,
}
_FP8_CAPABILITY = (8, 9)
# N and K come in multiples of this, though the library takes 16 (8-bit types: 32) as well: it stores which
# positions are kept for whole tiles of 64 x 64, so that only then its form has exactly 9/16 (10/16) of the
# dense size. Read from cusparseLtSpMMACompressedSize2 of cuSPARSELt 0.8.0 on an H200.
_STEP = 64
# cusparseLtMatmulSearch of 0.8.0 ends in an illegal instruction for it (H200, torch 2.11), after which the
# process can no longer use the GPU. Timing numbered algorithms may run the same code of the library.
_NEVER_SEARCHED = torch.float16


class SparseOps(Protocol):
    """The three things asked of cuSPARSELt; torch's operators outside tests."""

    def compress(self, dense: Tensor) -> Tensor:
        """Dense 2:4 ``[n, k]`` -> the library's form."""
        ...

    def multiply(self, compressed: Tensor, x: Tensor, bias: Tensor | None, algorithm: int) -> Tensor:
        """``x [tokens, k] @ W.T`` -> ``[tokens, n]``; int32 for int8, float32 for fp8, else as ``x``."""
        ...

    def algorithms(self, compressed: Tensor, x: Tensor) -> list[int]:
        """Numbers of the algorithms worth timing for this product; never asked for float16."""
        ...


class TorchOps:
    """``torch._cslt_*``."""

    def compress(self, dense: Tensor) -> Tensor:
        """See :class:`SparseOps`."""
        return torch._cslt_compress(dense)

    def multiply(self, compressed: Tensor, x: Tensor, bias: Tensor | None, algorithm: int) -> Tensor:
        """See :class:`SparseOps`. The weight is the library's left operand, so ``x`` goes in transposed."""
        return torch._cslt_sparse_mm(
            compressed,
            x.t(),
            bias=bias,
            out_dtype=_PRODUCT_DTYPE.get(x.dtype),
            transpose_result=True,
            alg_id=algorithm,
        )

    def algorithms(self, compressed: Tensor, x: Tensor) -> list[int]:
        """See :class:`SparseOps`. Torch knows the highest number only for some versions of the library."""
        highest = torch.backends.cusparselt.get_max_alg_id()
        if highest is not None:
            return list(range(highest))
        best = torch._cslt_sparse_mm_search(
            compressed, x.t(), out_dtype=_PRODUCT_DTYPE.get(x.dtype), transpose_result=True
        )
        return [int(best)]


_ops: SparseOps = TorchOps()
# (n, k, stored dtype, token bin) -> algorithm, searched when the first such weight is packed.
_algorithms: dict[tuple[int, int, torch.dtype, int], int] = {}


def _token_step(dtype: torch.dtype) -> int:
    """Tokens come in multiples of this."""
    return 8 if dtype.itemsize == 2 else 16


def _round_up(value: int, step: int = _STEP) -> int:
    return -(-value // step) * step


def compressed_shape(n: int, k: int, dtype: torch.dtype) -> tuple[int, int]:
    """Shape of the library's form of a weight ``[n, k]``, in elements of ``dtype``, padding included."""
    sixteenths = 9 if dtype.itemsize == 2 else 10
    return _round_up(n), _round_up(k) * sixteenths // 16


def _bin(tokens: int) -> int:
    return next((bin_ for bin_ in TOKEN_BINS if tokens <= bin_), TOKEN_BINS[-1])


def _pad(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """Zero rows and columns up to ``[rows, columns]``; 8-bit types move as bytes."""
    if tuple(matrix.shape) == (rows, columns):
        return matrix.contiguous()
    raw = matrix.view(torch.uint8) if matrix.element_size() == 1 else matrix
    padded = F.pad(raw, (0, columns - matrix.shape[1], 0, rows - matrix.shape[0]))
    return padded.view(matrix.dtype)


def _without_negative_zeros(dense: Tensor) -> Tensor:
    """-0.0 becomes 0.0; all else stays as it is, bit for bit."""
    if dense.dtype == torch.int8:
        return dense
    if dense.dtype == torch.float8_e4m3fn:
        raw = dense.view(torch.uint8)
        return torch.where(raw == 0x80, 0, raw).view(dense.dtype)
    return torch.where(dense == 0, 0, dense)


def _quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Symmetric dynamic quantisation, one scale per token: ``(numbers, scale [tokens, 1])``."""
    x = x.to(torch.float32)
    top = INT8_MAX if dtype == torch.int8 else FP8_MAX
    scale = token_scales(x, top)
    ratio = x / scale
    ratio = torch.round(ratio) if dtype == torch.int8 else ratio
    return ratio.clamp(-top, top).to(dtype), scale


def _search(n: int, k: int, compressed: Tensor) -> None:
    """Time the algorithms for every token bin of this shape, once per process and shape; none for float16."""
    if compressed.dtype == _NEVER_SEARCHED:
        return
    for tokens in TOKEN_BINS:
        key = (n, k, compressed.dtype, tokens)
        if key in _algorithms:
            continue
        x = torch.zeros(tokens, _round_up(k), dtype=torch.uint8, device=compressed.device)
        x = x.view(compressed.dtype) if compressed.element_size() == 1 else x.to(compressed.dtype)
        timed = {number: _time(compressed, x, number) for number in _ops.algorithms(compressed, x)}
        timed = {number: us for number, us in timed.items() if us is not None}
        if timed:
            _algorithms[key] = min(timed, key=lambda number: timed[number] or 0.0)
            logger.debug("cuSPARSELt %dx%d %s, %d tokens: %s", n, k, compressed.dtype, tokens, timed)


def _time(compressed: Tensor, x: Tensor, algorithm: int, repeats: int = 5) -> float | None:
    """Microseconds of one product, the best of a few; None if the library refuses the algorithm."""
    try:
        _ops.multiply(compressed, x, None, algorithm)
    except RuntimeError as error:
        logger.debug("cuSPARSELt algorithm %d: %s", algorithm, error)
        return None
    if not x.is_cuda:
        return 0.0
    best = float("inf")
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        _ops.multiply(compressed, x, None, algorithm)
        stop.record()
        stop.synchronize()
        best = min(best, 1e3 * start.elapsed_time(stop))
    return best


def multiply(
    x: Tensor, packed: Tensor, scale: Tensor | None, bias: Tensor | None, n: int, k: int, quantize: bool
) -> Tensor:
    """``x [tokens, k] @ W.T + bias`` in ``x.dtype``; the operator's body."""
    tokens = x.shape[0]
    if tokens == 0:
        return x.new_empty(0, n)
    rows, columns = _round_up(n), _round_up(k)
    numbers, token_scale = _quantize(x, packed.dtype) if quantize else (x, None)
    numbers = _pad(numbers, _round_up(tokens, _token_step(packed.dtype)), columns)
    fused = bias if not quantize else None
    if fused is not None:
        fused = F.pad(fused.contiguous(), (0, rows - n))
    algorithm = _algorithms.get((n, k, packed.dtype, _bin(tokens)), 0)
    product = _ops.multiply(packed, numbers, fused, algorithm)[:tokens, :n]
    if scale is None or token_scale is None:
        return product.contiguous()
    scaled = product.to(torch.float32) * token_scale * scale
    return (scaled if bias is None else scaled + bias).to(x.dtype)


@cache
def _register_operator() -> None:
    def fake(
        x: Tensor, packed: Tensor, scale: Tensor | None, bias: Tensor | None, n: int, k: int, quantize: bool
    ) -> Tensor:
        return x.new_empty(x.shape[0], n)

    operators.define(
        "linear_24_cusparselt(Tensor x, Tensor packed, Tensor? scale, Tensor? bias, int n, int k, "
        "bool quantize) -> Tensor",
        multiply,
        fake,
    )


def self_test(device: torch.device, dtype: torch.dtype) -> str | None:
    """Multiply a small matrix with -0.0 and short groups, eagerly and from a CUDA graph; what went wrong."""
    step = 128
    generator = torch.Generator().manual_seed(24)
    dense = torch.randint(-2, 3, (step, step), generator=generator).float()
    dense[:, 2::4], dense[:, 3::4] = -0.0, 0.0
    dense[:, ::8] = 0.0
    x = torch.randint(-2, 3, (16, step), generator=generator).float()
    expected = x @ dense.T
    numbers = x.to(device).to(dtype)
    try:
        packed = _ops.compress(_without_negative_zeros(dense.to(device).to(dtype)))
        eager = _ops.multiply(packed, numbers, None, 0)
        captured = _replay(packed, numbers) if device.type == "cuda" else eager
    except RuntimeError as error:
        return f"cuSPARSELt fails its self-test for {dtype} on {device}: {str(error).splitlines()[0]}"
    for name, result in (("", eager), (" replayed from a CUDA graph", captured)):
        if not torch.equal(result.cpu().float(), expected):
            return f"cuSPARSELt gives wrong {dtype} products{name} on {device}"
    return None


def _replay(packed: Tensor, x: Tensor) -> Tensor:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        product = _ops.multiply(packed, x, None, 0)
    graph.replay()
    return product


_self_test_once = cache(self_test)


class CusparseltBackend(Backend):
    """Sparse tensor cores through cuSPARSELt."""

    name = "cusparselt"

    def __init__(self) -> None:
        _register_operator()

    def unsupported_reason(self, spec: LinearSpec, device: torch.device) -> str | None:
        """See :class:`Backend`."""
        dtype = _stored_dtype(spec)
        if dtype is None:
            return (
                f"cuSPARSELt has no product of {spec.weight} weights with {spec.activation_dtype} "
                f"activations quantised {spec.activation_quant}"
            )
        if spec.k % 4:
            return f"{spec.k} input features are not a multiple of 4"
        if spec.group_size is not None:
            return f"cuSPARSELt products take one scale per output channel, not groups of {spec.group_size}"
        if device.type != "cuda":
            return f"it runs on NVIDIA GPUs, the weight is on {device}"
        if not torch.backends.cusparselt.is_available():
            return f"torch {torch.__version__} was built without cuSPARSELt"
        capability = torch.cuda.get_device_capability(device)
        needed = _FP8_CAPABILITY if dtype == torch.float8_e4m3fn else (8, 0)
        if capability < needed:
            return (
                f"{dtype} products need compute capability {needed[0]}.{needed[1]}, this GPU has {capability}"
            )
        return _self_test_once(device, dtype)

    def pack(self, spec: LinearSpec, weight: CanonicalWeight) -> PackedWeight:
        """Compress in the library's form and search the algorithms for this shape, but for float16.

        Holds a dense copy of the weight meanwhile: the library compresses nothing else.
        """
        check_canonical(spec, weight, bitmask=False)
        dtype = _stored_dtype(spec) or weight.values.dtype
        values = weight.values if dtype.itemsize == 1 else weight.values.to(dtype)
        dense = _pad(decompress(values, weight.bitmask), _round_up(spec.n), _round_up(spec.k))
        packed = _ops.compress(_without_negative_zeros(dense))
        _search(spec.n, spec.k, packed)
        scale = None if weight.scale is None else weight.scale.to(torch.float32).reshape(1, -1).contiguous()
        return PackedWeight(packed, scale)

    def linear(
        self, spec: LinearSpec, x: Tensor, packed: Tensor, scale: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """See :class:`Backend`; one op."""
        quantize = spec.activation_quant is not ActivationQuant.NONE
        rows = x.reshape(-1, spec.k)
        out = torch.ops.vllm_sparse.linear_24_cusparselt(rows, packed, scale, bias, spec.n, spec.k, quantize)
        return out.reshape(*x.shape[:-1], spec.n)

    def unpack(self, spec: LinearSpec, packed: Tensor, scale: Tensor | None) -> Tensor:
        """See :class:`Backend`; the product with the identity, since the library's form is private."""
        identity = torch.eye(_round_up(spec.k), device=packed.device).to(packed.dtype)
        dense = _ops.multiply(packed, identity, None, 0)[: spec.k, : spec.n].t()
        if scale is not None:
            dense = dense.to(torch.float32) * scale.t()
        return dense.to(spec.activation_dtype).contiguous()


def _stored_dtype(spec: LinearSpec) -> torch.dtype | None:
    """The dtype that both operands of the product have; None if there is no such product."""
    if spec.activation_dtype not in _SIXTEEN_BITS:
        return None
    if spec.activation_quant is ActivationQuant.NONE:
        plain = spec.weight in (WeightFormat.BF16, WeightFormat.FP16, WeightFormat.FP32)
        return spec.activation_dtype if plain else None
    return _SERVED.get((spec.weight, spec.activation_quant))
