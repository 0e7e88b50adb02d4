"""What every kernel backend implements, and the words they share.

A backend takes a canonical 2:4 weight (kept values + bitmask, as on disk), packs it once into its own
layout, and multiplies activations by the packed form. Packed layouts live in memory only and are never
written to disk.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import IntEnum, StrEnum

import torch
from torch import Tensor

from vllm_sparse.errors import UnsupportedError


class WeightFormat(StrEnum):
    """Storage of the kept weights."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"
    INT8 = "int8"
    FP8_E4M3 = "fp8_e4m3"
    INT4 = "int4"

    @classmethod
    def from_dtype(cls, dtype: torch.dtype) -> "WeightFormat":
        """The format whose values torch stores as ``dtype``; KeyError if there is none."""
        return _FORMAT_OF_DTYPE[dtype]


_FORMAT_OF_DTYPE = {
    torch.bfloat16: WeightFormat.BF16,
    torch.float16: WeightFormat.FP16,
    torch.float32: WeightFormat.FP32,
    torch.int8: WeightFormat.INT8,
    torch.float8_e4m3fn: WeightFormat.FP8_E4M3,
}


class ActivationQuant(StrEnum):
    """What happens to the activations before the product."""

    NONE = "none"
    INT8_PER_TOKEN = "int8_per_token"  # noqa: S105 - a quantisation scheme, not a password
    FP8_PER_TOKEN = "fp8_per_token"  # noqa: S105


@dataclass(frozen=True)
class LinearSpec:
    """One linear layer as one rank sees it.

    Attributes:
        n: output features.
        k: input features, a multiple of 4.
        weight: storage of the kept values.
        activation_dtype: dtype of the input and of the output.
        activation_quant: dynamic activation quantisation the checkpoint asks for.
        group_size: dense columns that share a scale; None is one scale per output channel.
    """

    n: int
    k: int
    weight: WeightFormat
    activation_dtype: torch.dtype
    activation_quant: ActivationQuant = ActivationQuant.NONE
    group_size: int | None = None


@dataclass(frozen=True)
class CanonicalWeight:
    """A 2:4 weight as ``formats`` define it.

    Attributes:
        values: ``[n, k/2]`` kept values, left to right (int4: int8 storage in [-8, 7]).
        bitmask: ``[n, ceil(k/8)]`` uint8, little-endian bits.
        scale: float32 ``[n, 1]`` (per channel) or ``[n, k/group_size]``; None for float weights.
    """

    values: Tensor
    bitmask: Tensor
    scale: Tensor | None = None


@dataclass(frozen=True)
class PackedWeight:
    """What a backend keeps resident: two plain tensors, so that modules can own them as parameters.

    Attributes:
        packed: the kernel's layout.
        scale: side data in the kernel's layout (scales, correction sums), if it has any.
    """

    packed: Tensor
    scale: Tensor | None = None


class GatedActivation(IntEnum):
    """What stands between the projections of an expert, numbered as csrc/experts.h numbers it."""

    SILU = 0
    GELU = 1
    GELU_TANH = 2


@dataclass(frozen=True)
class StackedWeight:
    """One projection of all experts of a layer, packed by one backend.

    Attributes:
        spec: one expert.
        packed: ``[experts, ...]``.
        scale: ``[experts, ...]``, if the format has scales.
    """

    spec: LinearSpec
    packed: Tensor
    scale: Tensor | None = None


class Backend(ABC):
    """One way to multiply by a 2:4 weight."""

    name: str
    # Whether `experts_linear` is there: products by experts chosen on the device, without the host.
    has_experts_operator: bool = False

    @abstractmethod
    def unsupported_reason(self, spec: LinearSpec, device: torch.device) -> str | None:
        """Why this backend cannot serve ``spec`` on ``device``, in words for a log; None if it can."""

    def advice(self, spec: LinearSpec) -> str | None:
        """What this backend lacks on this machine to serve ``spec`` fast, for a warning; None if nothing."""
        del spec
        return None

    def slower_reason(self, spec: LinearSpec, device: torch.device) -> str | None:
        """Why, measured on ``device``, another backend should serve ``spec``; None if nothing says so."""
        del spec, device
        return None

    @abstractmethod
    def pack(self, spec: LinearSpec, weight: CanonicalWeight) -> PackedWeight:
        """Convert once, after loading. Must not hold more than one extra copy of this weight."""

    @abstractmethod
    def linear(
        self, spec: LinearSpec, x: Tensor, packed: Tensor, scale: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """``x [..., k] @ W.T + bias`` -> ``[..., n]`` in ``x.dtype``.

        Called under torch.compile: one op with a fake implementation, or traceable torch code.
        """

    def experts_linear(
        self, spec: LinearSpec, x: Tensor, packed: Tensor, scale: Tensor | None, expert_ids: Tensor
    ) -> Tensor:
        """Every token by each of its experts, in one launch that waits for nothing.

        Args:
            spec: one expert.
            x: ``[tokens, k]``.
            packed: ``[experts, ...]``, the experts' packed weights stacked.
            scale: ``[experts, ...]`` likewise.
            expert_ids: ``[tokens, top_k]`` int32, each below the number of experts.

        Returns:
            ``[tokens, top_k, n]`` in ``x.dtype``.

        Raises:
            UnsupportedError: this backend has no such operator.
        """
        raise UnsupportedError(f"the {self.name} backend has no operator over several experts")

    def settle(self, packed: Tensor) -> Tensor:
        """A packed weight in the memory where it is to stay; the given one may be dropped then."""
        return packed

    def settle_stack(self, stacked: Tensor) -> None:  # noqa: B027 - most backends have nothing to do
        """To be called when memory of :meth:`empty_stack` is full."""

    def empty_stack(self, one: Tensor, count: int) -> Tensor:
        """Uninitialised memory ``[count, ...]`` for that many experts' packed weights like ``one``."""
        return one.new_empty((count, *one.shape))

    def layer_unsupported_reason(self, gate_up: LinearSpec, down: LinearSpec) -> str | None:
        """Why :meth:`experts_layer` cannot serve experts of these projections; None if it can."""
        return f"the {self.name} backend has no operator for a whole layer of experts"

    def experts_layer(
        self,
        gate_up: StackedWeight,
        down: StackedWeight,
        activation: GatedActivation,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
    ) -> Tensor:
        """Sum over each token's experts of ``weight * down(act(gate(x)) * up(x))``, accumulated in float32.

        Args:
            gate_up: ``[2 * width, hidden]`` per expert, gate's rows first.
            down: ``[hidden, width]`` per expert.
            activation: between the projections.
            x: ``[tokens, hidden]``.
            topk_weights: ``[tokens, top_k]``.
            topk_ids: ``[tokens, top_k]``; negative ones are experts of other ranks, which add nothing.

        Returns:
            ``[tokens, hidden]`` in ``x.dtype``.

        Raises:
            UnsupportedError: :meth:`layer_unsupported_reason` has a reason.
        """
        reason = self.layer_unsupported_reason(gate_up.spec, down.spec)
        raise UnsupportedError(f"these experts have no operator of their own: {reason}")

    @abstractmethod
    def unpack(self, spec: LinearSpec, packed: Tensor, scale: Tensor | None) -> Tensor:
        """The dense (dequantised) weight ``[n, k]`` in ``spec.activation_dtype``.

        For checks and LoRA merges.
        """
