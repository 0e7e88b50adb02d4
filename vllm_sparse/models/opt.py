"""OPT with layers that differ.

Stock OPT fixes ``head_dim`` to hidden / heads and its layer class by name, so the attention is
composed anew from the same parts, and the layer is put in place while the model is built.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import get_act_fn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.models import opt as stock

from vllm_sparse.errors import UnsupportedError
from vllm_sparse.models.decoder import LayerContext, checked
from vllm_sparse.models.layer_config import AttentionShape, FfnShape, MoeShape
from vllm_sparse.models.substitute import substituted
from vllm_sparse.models.verify import start_building
from vllm_sparse.quantization.dense_head import serve_heads

if TYPE_CHECKING:
    from transformers import OPTConfig
    from vllm.config import CacheConfig, VllmConfig
    from vllm.model_executor.layers.quantization import QuantizationConfig

# Older vLLM uses torch's here.
LayerNorm: type[nn.Module] = getattr(stock, "LayerNorm", nn.LayerNorm)


class SparseOPTAttention(stock.OPTAttention):
    """OPT's attention with any number of heads of a given dimension."""

    def __init__(self, context: LayerContext, shape: AttentionShape) -> None:
        nn.Module.__init__(self)
        prefix, quant_config = f"{context.prefix}.self_attn", context.quant_config
        hidden_size = context.config.hidden_size
        self.qkv_proj = QKVParallelLinear(
            hidden_size,
            shape.head_dim,
            shape.num_heads,
            bias=shape.qkv_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.out_proj = RowParallelLinear(
            shape.num_heads * shape.head_dim,
            hidden_size,
            bias=shape.o_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.out_proj",
        )
        self.attn = Attention(
            shape.num_heads // get_tensor_model_parallel_world_size(),
            shape.head_dim,
            scale=shape.head_dim**-0.5,
            cache_config=context.cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
        )


class SparseOPTDecoderLayer(nn.Module):
    """OPT layer with norms before its parts; either part may be missing."""

    def __init__(
        self,
        config: OPTConfig,
        cache_config: CacheConfig | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        del cache_config, quant_config  # the engine's own, which the context carries
        context = LayerContext.of(get_current_vllm_config(), prefix)
        shape = context.shape
        self.norm_first: bool = config.do_layer_norm_before
        if not self.norm_first and (shape.attention is None or shape.ffn is None):
            raise UnsupportedError(
                f"{prefix}: an OPT layer that normalises after its parts (do_layer_norm_before: false) has "
                "no definition without them. Keep both parts."
            )
        self.has_attention = shape.attention is not None
        self.has_ffn = shape.ffn is not None
        if shape.attention is not None:
            self.self_attn_layer_norm = self._norm(config)
            self.self_attn = SparseOPTAttention(context, shape.attention)
        if shape.ffn is not None:
            self.final_layer_norm = self._norm(config)
            self._build_ffn(context, shape.ffn)

    @staticmethod
    def _norm(config: OPTConfig) -> nn.Module:
        return LayerNorm(config.hidden_size, elementwise_affine=config.layer_norm_elementwise_affine)

    def _build_ffn(self, context: LayerContext, shape: FfnShape | MoeShape) -> None:
        hidden_size, width = context.config.hidden_size, shape.intermediate_size
        bias = isinstance(shape, FfnShape) and shape.up_bias
        down_bias = isinstance(shape, FfnShape) and shape.down_bias
        quant_config, prefix = context.quant_config, context.prefix
        self.fc1 = ColumnParallelLinear(
            hidden_size, width, bias=bias, quant_config=quant_config, prefix=f"{prefix}.fc1"
        )
        self.activation_fn = get_act_fn(context.config.activation_function)
        self.fc2 = RowParallelLinear(
            width, hidden_size, bias=down_bias, quant_config=quant_config, prefix=f"{prefix}.fc2"
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Apply the parts that exist to [tokens, hidden]."""
        if self.has_attention:
            normed = self.self_attn_layer_norm(hidden_states) if self.norm_first else hidden_states
            hidden_states = hidden_states + self.self_attn(hidden_states=normed)
            if not self.norm_first:
                hidden_states = self.self_attn_layer_norm(hidden_states)
        if self.has_ffn:
            normed = self.final_layer_norm(hidden_states) if self.norm_first else hidden_states
            inner, _ = self.fc1(normed)
            outer, _ = self.fc2(self.activation_fn(inner))
            hidden_states = hidden_states + outer
            if not self.norm_first:
                hidden_states = self.final_layer_norm(hidden_states)
        return hidden_states


class SparseOPTForCausalLM(stock.OPTForCausalLM):
    """OPT for structurally pruned checkpoints."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        self.shape = start_building(vllm_config)
        with substituted(stock, "OPTDecoderLayer", SparseOPTDecoderLayer):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        serve_heads(self)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint's tensors, each checked against the declared shape first."""
        return super().load_weights(checked(weights, self.shape))
