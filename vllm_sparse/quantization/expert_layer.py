"""What a layer of packed 2:4 experts computes, and the operator that torch.compile sees.

Three ways through the experts, with the same result up to rounding: *in one call*, where the backend has an
operator for the whole layer and the checkpoint no fixed activation scales (the CPU kernels); *by expert*,
which sorts the chosen (token, expert) pairs and multiplies each expert once by its tokens, and needs the
counts on the host; *pairwise*, which gives all pairs to one call of an operator that reads expert numbers on
the device, so nothing waits and a CUDA graph can capture it. Backends with neither operator always go by
expert.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from vllm_sparse.kernels.base import Backend, GatedActivation, LinearSpec, StackedWeight
from vllm_sparse.quantization import static_activations
from vllm_sparse.quantization.spec import StaticQuant

ACTIVATIONS = {
    MoEActivation.SILU: GatedActivation.SILU,
    MoEActivation.GELU: GatedActivation.GELU,
    MoEActivation.GELU_TANH: GatedActivation.GELU_TANH,
}
_FUNCTIONS: dict[GatedActivation, Callable[[Tensor], Tensor]] = {
    GatedActivation.SILU: F.silu,
    GatedActivation.GELU: F.gelu,
    GatedActivation.GELU_TANH: partial(F.gelu, approximate="tanh"),
}
# Up to this many pairs for each expert of the layer all pairs go to one call; beyond it an expert's product
# is large enough to be worth waiting for the counts. A rule, not a measurement.
PAIRS_PER_EXPERT = 64


@dataclass(frozen=True)
class StaticScale:
    """A fixed scale for the input of a projection, as :mod:`static_activations` splits it."""

    scale: Tensor
    step: Tensor
    quant: StaticQuant

    def quantize(self, x: Tensor) -> Tensor:
        """``x`` as the packed weights expect it."""
        return static_activations.quantize(x, self.scale, self.step, self.quant)


@dataclass(frozen=True)
class PackedExperts:
    """One projection of all experts of a layer: the same shape, packed by the same backend.

    Its tensors are parameters of a module and looked up there at every use. A reload of weights packs anew,
    copies the result into the first parameters and puts those back, so whoever held on to tensors would
    hold a second copy of them.

    Attributes:
        module: the layer.
        name: of the projection; its parameters are ``{name}_packed`` and ``{name}_packed_scale``.
        spec: one expert.
        backend: what multiplies.
        static: fixed scale of the input, if the checkpoint brings one.
    """

    module: nn.Module = field(repr=False)
    name: str
    spec: LinearSpec
    backend: Backend
    static: StaticScale | None = None

    def keep(self, packed: Tensor, scales: Tensor | None) -> "PackedExperts":
        """Make tensors ``[experts, ...]`` the module's."""
        for suffix, tensor in (("packed", packed), ("packed_scale", scales)):
            if tensor is not None:
                self.module.register_parameter(
                    f"{self.name}_{suffix}", Parameter(tensor, requires_grad=False)
                )
        return self

    @property
    def packed(self) -> Tensor:
        """``[experts, ...]``."""
        tensor: Tensor = getattr(self.module, f"{self.name}_packed")
        return tensor

    @property
    def scales(self) -> Tensor | None:
        """``[experts, ...]``, if the format has scales."""
        return getattr(self.module, f"{self.name}_packed_scale", None)

    @property
    def count(self) -> int:
        """Number of experts on this rank."""
        return self.packed.shape[0]

    @property
    def stacked(self) -> StackedWeight:
        """The weights as the backend's operators take them."""
        return StackedWeight(self.spec, self.packed, self.scales)

    def seen(self, x: Tensor) -> Tensor:
        """``x`` after the fixed-scale quantisation, if there is one."""
        return x if self.static is None else self.static.quantize(x)

    def linear(self, expert: int, x: Tensor) -> Tensor:
        """``x [tokens, k]`` through one expert."""
        scales = self.scales
        scale = None if scales is None else scales[expert]
        return self.backend.linear(self.spec, self.seen(x), self.packed[expert], scale, None)

    def pairwise(self, x: Tensor, expert_ids: Tensor) -> Tensor:
        """``x [tokens, k]`` through ``expert_ids [tokens, top_k]`` -> ``[tokens, top_k, n]``: one launch."""
        return self.backend.experts_linear(self.spec, self.seen(x), self.packed, self.scales, expert_ids)


def _not_in_one_call(gate_up: PackedExperts, down: PackedExperts) -> str | None:
    """Why a layer cannot be one call of its backend; None if it can."""
    if gate_up.backend is not down.backend:
        return f"the projections run on two backends, {gate_up.backend.name} and {down.backend.name}"
    if gate_up.static is not None or down.static is not None:
        return "fixed activation scales are applied between the projections"
    return gate_up.backend.layer_unsupported_reason(gate_up.spec, down.spec)


class ExpertLayer:
    """Both projections of a layer, and what stands between them.

    Attributes:
        not_in_one_call: why the backend's operator for the whole layer is not used; None if it is.
    """

    def __init__(self, gate_up: PackedExperts, down: PackedExperts, activation: MoEActivation) -> None:
        self.gate_up = gate_up
        self.down = down
        self.activation = ACTIVATIONS[activation]
        self.act = _FUNCTIONS[self.activation]
        self.not_in_one_call = _not_in_one_call(gate_up, down)
        self._pairwise_ready = gate_up.backend.has_experts_operator and down.backend.has_experts_operator

    def forward(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """Sum of the chosen experts' outputs, weighted, accumulated in float32.

        Args:
            x: ``[tokens, hidden]``.
            topk_weights: ``[tokens, top_k]``.
            topk_ids: ``[tokens, top_k]``, this rank's expert numbers; -1 is an expert of another rank.
        """
        if self.not_in_one_call is None:
            return self.gate_up.backend.experts_layer(
                self.gate_up.stacked, self.down.stacked, self.activation, x, topk_weights, topk_ids
            )
        if self._goes_pairwise(x, topk_ids.numel()):
            return self._pairwise(x, topk_weights, topk_ids)
        return self._by_expert(x, topk_weights, topk_ids)

    def describe(self) -> str:
        """How tokens go through the experts, for the log."""
        if self.not_in_one_call is None:
            return "in one call for each layer"
        if self._pairwise_ready:
            return "in one call for each projection at small batches, expert by expert above"
        return f"expert by expert: {self.not_in_one_call}"

    def _goes_pairwise(self, x: Tensor, pairs: int) -> bool:
        if not self._pairwise_ready:
            return False
        few = pairs <= PAIRS_PER_EXPERT * self.gate_up.count
        return few or (x.is_cuda and torch.cuda.is_current_stream_capturing())

    def _pairwise(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        tokens, top_k = topk_ids.shape
        elsewhere = topk_ids < 0
        ids = topk_ids.masked_fill(elsewhere, 0).to(torch.int32)
        gate, up = self.gate_up.pairwise(x, ids).flatten(0, 1).chunk(2, dim=-1)
        results = self.down.pairwise(self.act(gate) * up, ids.reshape(-1, 1)).reshape(tokens, top_k, -1)
        weights = topk_weights.float().masked_fill(elsewhere, 0.0)
        return (results.float() * weights.unsqueeze(-1)).sum(1).to(x.dtype)

    def _by_expert(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        top_k = topk_ids.shape[1]
        flat = topk_ids.flatten().long()
        order = flat.argsort(stable=True)
        # Experts of other ranks are counted first and skipped.
        elsewhere, *counts = torch.bincount(flat + 1, minlength=self.gate_up.count + 1).tolist()
        weights = topk_weights.flatten().float()
        out = torch.zeros(x.shape[0], self.down.spec.n, dtype=torch.float32, device=x.device)
        start = elsewhere
        for expert, count in enumerate(counts):
            if count == 0:
                continue
            chosen = order[start : start + count]
            start += count
            rows = chosen // top_k
            gate, up = self.gate_up.linear(expert, x[rows]).chunk(2, dim=-1)
            result = self.down.linear(expert, self.act(gate) * up)
            out.index_add_(0, rows, result.float() * weights[chosen].unsqueeze(1))
        return out.to(x.dtype)


def run(name: str, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
    """One operator call for the layer that vLLM knows by ``name``; see :meth:`ExpertLayer.forward`."""
    out: Tensor = torch.ops.vllm_sparse.experts_24(x, topk_weights, topk_ids, name)
    return out


@cache
def define_operator() -> Any:
    """The opaque operator that torch.compile sees; its body chooses experts by data.

    It finds the layer by name in vLLM's forward context, as vLLM's own MoE operator does, so that every
    engine of a process meets its own weights.
    """

    @torch.library.custom_op("vllm_sparse::experts_24", mutates_args=())
    def experts_24(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, layer: str) -> Tensor:
        runner = get_forward_context().no_compile_layers[layer]
        return runner.routed_experts.sparse_experts.forward(x, topk_weights, topk_ids)

    @experts_24.register_fake
    def _(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, layer: str) -> Tensor:
        return torch.empty_like(x)

    return torch.ops.vllm_sparse.experts_24
