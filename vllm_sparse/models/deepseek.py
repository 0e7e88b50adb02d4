"""DeepSeek-MoE (V1) with layers that differ: heads, dense widths, routed experts and all expert widths."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.nn import functional
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.models import deepseek_v2 as stock

from vllm_sparse.models.decoder import LayerContext, SparseDecoderLayer, checked, expert_kernels
from vllm_sparse.models.layer_config import FfnShape, MoeShape
from vllm_sparse.models.llama import SparseLlamaDecoderLayer
from vllm_sparse.models.substitute import substituted
from vllm_sparse.models.verify import share_fused_names, start_building
from vllm_sparse.quantization.dense_head import serve_heads

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class _TorchLinearMethod(UnquantizedLinearMethod):
    """``F.linear`` of the weight as it was loaded."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Leave the weight alone."""

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``x [tokens, k]`` times the weight."""
        return functional.linear(x, layer.weight, bias)


def _route_by_torch_on_cpu(gate: Any) -> None:
    """Avoid vLLM's CPU product of a router, which writes into an empty argument and returns nothing.

    torch.compile (2.13) may then read the scores before they are written (docs/structured.md).
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        gate.quant_method = _TorchLinearMethod()


class SparseDeepseekDecoderLayer(SparseLlamaDecoderLayer):
    """V1's layer: Llama's attention, and vLLM's DeepSeek experts or a dense block."""

    # Stock's model asks each layer; the option behind it is off wherever these classes serve.
    use_sequence_parallel_moe = False

    def __init__(
        self, vllm_config: VllmConfig, prefix: str = "", config: Any = None, **_: torch.Tensor | None
    ) -> None:
        del config  # the engine's own, which the context carries
        super().__init__(vllm_config, prefix)
        if not self.has_ffn:
            self.mlp = None  # stock's model looks for experts there

    def build_ffn(self, context: LayerContext, shape: FfnShape | MoeShape) -> nn.Module:
        """Stock expert block with this layer's experts, or the dense block where there are none."""
        if isinstance(shape, FfnShape):
            return super().build_ffn(context, shape)
        config = context.config
        # Null means the same as one group in stock's own config classes.
        config.n_group, config.topk_group = config.n_group or 1, config.topk_group or 1
        config.n_shared_experts = config.n_shared_experts or None
        shared = substituted(stock, "DeepseekV2MLP", _mlp_of_width(shape.shared_width))
        with shared, expert_kernels(context.vllm_config):
            block = stock.DeepseekV2MoE(
                config=config,
                parallel_config=context.vllm_config.parallel_config,
                quant_config=context.quant_config,
                prefix=f"{context.prefix}.{self.ffn_name}",
                apply_routed_scale_to_output=not stock.rocm_aiter_ops.is_fused_moe_enabled(),
            )
        _route_by_torch_on_cpu(block.gate)
        return block

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        llama_4_scaling: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply the parts that exist; see :class:`SparseDecoderLayer`."""
        del llama_4_scaling  # of another family
        return super().forward(positions, hidden_states, residual)


def _mlp_of_width(width: int) -> type[nn.Module]:
    """Stock's shared experts at a width of their own, which its expert block derives from the routed ones."""

    class SharedExperts(stock.DeepseekV2MLP):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**{**settings, "intermediate_size": width})

    return SharedExperts


class SparseDeepseekForCausalLM(stock.DeepseekV2ForCausalLM):
    """DeepSeek-MoE (V1) for structurally pruned checkpoints."""

    decoder_layer: ClassVar[type[SparseDecoderLayer]] = SparseDeepseekDecoderLayer

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        self.shape = start_building(vllm_config)
        # Stock adds to this mapping, and would add to every model's.
        self.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
        share_fused_names(vllm_config, self.packed_modules_mapping)
        with substituted(stock, "DeepseekV2DecoderLayer", self.decoder_layer):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        serve_heads(self)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint's tensors, each checked against the declared shape first."""
        return super().load_weights(checked(weights, self.shape))
