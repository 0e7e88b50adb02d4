"""Two forms of one 16-bit weight: ours for few tokens, cuSPARSELt's for many. Asked for by name only.

``VLLM_SPARSE_PREFILL=cusparselt`` adds it to the backend ``triton`` or ``cuda``. The buffer is flat uint8:

- from 0: the packed layout of those backends (:mod:`vllm_sparse.kernels.triton.layout`);
- from the next multiple of 256: cuSPARSELt's form, ``[n, k * 9/16]`` of the activations' dtype, N and K
  padded as that backend pads them;
- zeros up to a multiple of 256, so that the forms stay aligned where experts are stacked.

Together they are 1.125 times the dense weight's bytes. From how many tokens on cuSPARSELt multiplies is
measured once per process, device and shape, on a random weight, before the first such weight is packed. Ranks
of tensor parallelism measure for themselves and may differ; their results then differ in rounding only. A
shape for which cuSPARSELt does not gain keeps one form and a buffer of exactly its size.

The operator looks the number of tokens up when it runs: a graph that torch.compile kept from another process
holds no number measured there, and either operator is right on either buffer.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from vllm_sparse.kernels import cusparselt, operators
from vllm_sparse.kernels.base import (
    ActivationQuant,
    Backend,
    CanonicalWeight,
    LinearSpec,
    PackedWeight,
    WeightFormat,
)
from vllm_sparse.kernels.cusparselt import CusparseltBackend
from vllm_sparse.kernels.reference import QUANTIZED, STORAGE_DTYPE
from vllm_sparse.kernels.triton.backend import TritonBackend
from vllm_sparse.kernels.triton.layout import FORMAT_NUMBER, Layout

# Below "vllm" so that vLLM's logging configuration applies to it.
logger = logging.getLogger("vllm.plugins.vllm_sparse")

# Where both are timed. Up to 64 tokens the decode kernels serve, whatever is measured beyond.
TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_ALIGNMENT = 256
# Positions 0 and 1 of both groups of a byte.
_LEGAL_BYTE = 0b0011_0011
_FORMAT_OF_NUMBER = {number: weight for weight, number in FORMAT_NUMBER.items()}


@dataclass(frozen=True)
class Times:
    """Microseconds of one product at one number of tokens, by the two ways."""

    tokens: int
    few: float
    many: float


@dataclass(frozen=True)
class Crossover:
    """What was found for one shape.

    Attributes:
        tokens: from how many on cuSPARSELt multiplies; None is never.
        reason: why never.
    """

    tokens: int | None
    reason: str | None = None


@dataclass(frozen=True)
class Forms:
    """Where the two forms of a weight lie in one buffer.

    Attributes:
        layout: of the first form.
        dtype: of the second one's elements.
    """

    layout: Layout
    dtype: torch.dtype

    @property
    def second(self) -> slice:
        """Bytes of the second form."""
        start = _round_up(self.layout.total_bytes)
        rows, columns = self.second_shape
        return slice(start, start + rows * columns * self.dtype.itemsize)

    @property
    def second_shape(self) -> tuple[int, int]:
        """Its shape in elements."""
        return cusparselt.compressed_shape(self.layout.n, self.layout.k, self.dtype)

    @property
    def total_bytes(self) -> int:
        """Size of the whole buffer."""
        return _round_up(self.second.stop)

    def join(self, first: Tensor, second: Tensor) -> Tensor:
        """Both forms in one new buffer; RuntimeError if the second is of another size than is expected."""
        # Zeros, as what lies between the forms is part of the model's tensors too.
        buffer = first.new_zeros(self.total_bytes)
        buffer[: first.numel()] = first
        buffer[self.second] = second.contiguous().view(-1).view(torch.uint8)
        return buffer

    def second_of(self, buffer: Tensor) -> Tensor:
        """View of the second form: contiguous, and of exactly its shape, whose rows tell torch N."""
        return buffer[self.second].view(self.dtype).view(self.second_shape)


def _round_up(value: int) -> int:
    return -(-value // _ALIGNMENT) * _ALIGNMENT


# (n, k, dtype, device index, whether the backend for few tokens is "cuda") -> what was measured.
_Key = tuple[int, int, torch.dtype, int, bool]
_crossovers: dict[_Key, Crossover] = {}


def crossover(times: Sequence[Times]) -> int | None:
    """The smallest number of tokens from which on cuSPARSELt is always faster; None if it is not at the last.

    Between two measured numbers the smaller one's choice stands.
    """
    found = None
    for item in reversed(times):
        if item.many >= item.few:
            break
        found = item.tokens
    return found


def multiply(
    x: Tensor, packed: Tensor, bias: Tensor | None, n: int, k: int, weight: int, cuda: bool
) -> Tensor:
    """The operator's body: ``x [..., k] @ W.T + bias``; the way depends on the number of tokens alone."""
    found = _crossovers.get((n, k, x.dtype, x.get_device(), cuda))
    forms = Forms(Layout(n, k, _FORMAT_OF_NUMBER[weight]), x.dtype)
    tokens = x.numel() // k
    measured = found is not None and found.tokens is not None and tokens >= found.tokens
    # The size, as a buffer may come without the second form whatever this process has measured.
    if measured and packed.numel() == forms.total_bytes:
        rows = cusparselt.multiply(x.reshape(-1, k), forms.second_of(packed), None, bias, n, k, False)
        return rows.view(*x.shape[:-1], n)
    ops = torch.ops.vllm_sparse
    few = ops.linear_24_cuda if cuda else ops.linear_24_triton
    out: Tensor = few(x, packed[: forms.layout.total_bytes], None, bias, n, k, weight, 0, 0)
    return out


@cache
def _register_operator() -> None:
    def fake(
        x: Tensor, packed: Tensor, bias: Tensor | None, n: int, k: int, weight: int, cuda: bool
    ) -> Tensor:
        return x.new_empty([*x.shape[:-1], n])

    operators.define(
        "linear_24_prefill(Tensor x, Tensor packed, Tensor? bias, int n, int k, int weight, bool cuda) "
        "-> Tensor",
        multiply,
        fake,
    )


def _time(call: Callable[[], Tensor], rounds: int = 3, calls: int = 4) -> float:
    """Microseconds of a call on the current CUDA stream, the best of a few rounds.

    A round makes several calls at once, so that what the host does for one hides behind the one before, as in
    a model's forward pass. Where the host takes longer than the GPU, its time counts, as outside a graph.
    """
    call()
    best = float("inf")
    for _ in range(rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        stop.record()
        stop.synchronize()
        best = min(best, 1e3 * start.elapsed_time(stop) / calls)
    return best


class PrefillBackend(Backend):
    """The Triton or CUDA backend, and from a measured number of tokens on cuSPARSELt.

    Args:
        few: packs and serves few tokens.
        many: packs and serves many.
    """

    has_experts_operator = True

    def __init__(self, few: TritonBackend, many: CusparseltBackend) -> None:
        self.few = few
        self.many = many
        self.name = f"{few.name}+{many.name}"
        _register_operator()

    def unsupported_reason(self, spec: LinearSpec, device: torch.device) -> str | None:
        """See :class:`Backend`."""
        if spec.weight in QUANTIZED or spec.activation_quant is not ActivationQuant.NONE:
            return (
                "a second form for cuSPARSELt is kept of 16-bit weights with 16-bit activations, not of "
                f"{spec.weight} weights with activations quantised {spec.activation_quant}"
            )
        return self.few.unsupported_reason(spec, device) or self.many.unsupported_reason(spec, device)

    def slower_reason(self, spec: LinearSpec, device: torch.device) -> str | None:
        """See :class:`Backend`; measures where that has not been done."""
        return self._crossover(spec, device).reason

    def advice(self, spec: LinearSpec) -> str | None:
        """See :class:`Backend`: what the kernels for few tokens lack."""
        return self.few.advice(spec)

    def pack(self, spec: LinearSpec, weight: CanonicalWeight) -> PackedWeight:
        """Pack twice, or once where cuSPARSELt does not gain.

        Holds the two forms twice for a moment, but no more dense copies than cuSPARSELt's backend does, and
        those before anything else.

        Raises:
            FormatError: the weight is not what ``spec`` says.
        """
        if self._crossover(spec, weight.values.device).tokens is None:
            return self.few.pack(spec, weight)
        return PackedWeight(self._both(spec, weight))

    def _both(self, spec: LinearSpec, weight: CanonicalWeight) -> Tensor:
        second = self.many.pack(spec, weight).packed
        return _forms(spec).join(self.few.pack(spec, weight).packed, second)

    def linear(
        self, spec: LinearSpec, x: Tensor, packed: Tensor, scale: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """See :class:`Backend`; one op."""
        weight = FORMAT_NUMBER[_forms(spec).layout.weight]
        return torch.ops.vllm_sparse.linear_24_prefill(
            x, packed, bias, spec.n, spec.k, weight, self.few.name == "cuda"
        )

    def experts_linear(
        self, spec: LinearSpec, x: Tensor, packed: Tensor, scale: Tensor | None, expert_ids: Tensor
    ) -> Tensor:
        """See :class:`Backend`; from the first form."""
        first = packed[:, : _forms(spec).layout.total_bytes]
        return self.few.experts_linear(spec, x, first, scale, expert_ids)

    def unpack(self, spec: LinearSpec, packed: Tensor, scale: Tensor | None) -> Tensor:
        """See :class:`Backend`; from the first form."""
        return self.few.unpack(spec, packed[: _forms(spec).layout.total_bytes], scale)

    def _crossover(self, spec: LinearSpec, device: torch.device) -> Crossover:
        """From how many tokens on cuSPARSELt pays for this shape on this device; measured once."""
        key = (spec.n, spec.k, spec.activation_dtype, _index(device), self.few.name == "cuda")
        if key not in _crossovers:
            _crossovers[key] = self._measure(spec, device, key)
        return _crossovers[key]

    def _measure(self, spec: LinearSpec, device: torch.device, key: _Key) -> Crossover:
        shape = f"2:4 {spec.weight.value} [{spec.n}, {spec.k}]"
        try:
            times = self._times(spec, device)
        except RuntimeError as error:
            # Out of memory, mostly; the layer can be served without.
            what = str(error).partition("\n")[0]
            return Crossover(None, f"it could not be timed: {what}")
        found = crossover(times)
        listed = ", ".join(f"{item.tokens}: {item.many:.0f}/{item.few:.0f}" for item in times)
        logger.info(
            "%s takes cuSPARSELt %s (tokens: microseconds by cuSPARSELt/by the %s kernels: %s)",
            shape,
            "at no number of tokens" if found is None else f"from {found} tokens on",
            self.few.name,
            listed,
        )
        if found is not None:
            return Crossover(found)
        last = times[-1]
        return Crossover(
            None,
            f"at {last.tokens} tokens cuSPARSELt took {last.many:.0f} us, the {self.few.name} kernels "
            f"{last.few:.0f} us",
        )

    def _times(self, spec: LinearSpec, device: torch.device) -> list[Times]:
        generator = torch.Generator(device).manual_seed(24)
        buffer = self._both(spec, _random_weight(spec, device, generator))
        forms = _forms(spec)
        first, second = buffer[: forms.layout.total_bytes], forms.second_of(buffer)
        times = []
        for tokens in TOKENS:
            x = torch.empty(tokens, spec.k, dtype=spec.activation_dtype, device=device)
            x.normal_(generator=generator)
            few = _time(partial(self.few.linear, spec, x, first, None, None))
            many = _time(partial(cusparselt.multiply, x, second, None, None, spec.n, spec.k, False))
            times.append(Times(tokens, few, many))
        return times


def _random_weight(spec: LinearSpec, device: torch.device, generator: torch.Generator) -> CanonicalWeight:
    """Random values, as a GPU's power and so its clock depend on them; one pattern throughout."""
    values = torch.empty(spec.n, spec.k // 2, dtype=STORAGE_DTYPE[spec.weight], device=device)
    values.normal_(generator=generator)
    bitmask = torch.full((spec.n, -(-spec.k // 8)), _LEGAL_BYTE, dtype=torch.uint8, device=device)
    if spec.k % 8:
        bitmask[:, -1] &= 0x0F
    return CanonicalWeight(values, bitmask)


def _forms(spec: LinearSpec) -> Forms:
    """Float weights are packed in the activations' dtype, by either backend."""
    weight = WeightFormat.from_dtype(spec.activation_dtype)
    return Forms(Layout(spec.n, spec.k, weight), spec.activation_dtype)


def _index(device: torch.device) -> int:
    """As a tensor's ``get_device`` says it."""
    if device.type != "cuda":
        return -1
    return torch.cuda.current_device() if device.index is None else device.index
