"""Experts stored densely whose values are 2:4: packed after loading, else served by vLLM's own kernels."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from vllm_sparse import sparse24
from vllm_sparse.kernels.base import CanonicalWeight, LinearSpec, WeightFormat
from vllm_sparse.quantization.expert_layer import PackedExperts
from vllm_sparse.quantization.experts import (
    PROJECTIONS,
    ExpertStack,
    apply_experts,
    serve_packed,
    unservable_reason,
)
from vllm_sparse.quantization.report import LoadReport


class DenseStored24ExpertsMethod(UnquantizedFusedMoEMethod):
    """Dense ``w13_weight`` and ``w2_weight``, looked at once they are loaded."""

    supports_pre_processed_weights = False

    def __init__(self, layer: Any, prefix: str, report: LoadReport) -> None:
        super().__init__(layer.moe_config)
        self.prefix = prefix
        self.report = report
        self.packed = False

    @property
    def is_monolithic(self) -> bool:
        """Packed experts take chosen experts, not router logits."""
        return not self.packed and super().is_monolithic

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        """As for ordinary experts."""
        super().create_weights(layer, *args, **kwargs)
        self.report.created()

    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack if all experts are 2:4, otherwise keep vLLM's dense path and report the fallback."""
        reason = unservable_reason(layer) or _not_24(layer)
        if reason is not None:
            self.report.fallback(self.prefix, reason, layer.w13_weight.nbytes + layer.w2_weight.nbytes)
            super().process_weights_after_loading(layer)
            return
        gate_up, down = (self._pack(layer, name) for name in PROJECTIONS)
        serve_packed(layer, gate_up, down, self.report)
        self.packed = True

    def _pack(self, layer: Any, name: str) -> PackedExperts:
        weight: Tensor = getattr(layer, f"{name}_weight").data
        experts, n, k = weight.shape
        spec = LinearSpec(n, k, WeightFormat.from_dtype(weight.dtype), weight.dtype)
        stack = ExpertStack(spec, weight.device, experts)
        for expert in range(experts):
            stack.add(expert, CanonicalWeight(*sparse24.compress(weight[expert])))
        setattr(
            layer,
            f"{name}_weight",
            Parameter(torch.empty(0, dtype=weight.dtype, device=weight.device), requires_grad=False),
        )
        return stack.finish(layer, name, self.report)

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Any:
        """One operator call, or vLLM's kernels for a layer that fell back."""
        if self.packed:
            return apply_experts(layer, x, topk_weights, topk_ids)
        return super().apply(layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input)


def _not_24(layer: Any) -> str | None:
    for name in PROJECTIONS:
        weight = getattr(layer, f"{name}_weight").data
        if weight.shape[-1] % 4:
            return f"{name}: K is not a multiple of 4"
        for expert in range(weight.shape[0]):
            if not sparse24.is_24(weight[expert]):
                return f"the weights of expert {expert} ({name}) are not 2:4"
    return None
