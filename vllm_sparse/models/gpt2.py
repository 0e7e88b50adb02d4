"""GPT-2 with layers that differ.

Stock GPT-2 fixes ``head_dim`` to hidden / heads and its layer class by name, so the attention is
composed anew from the same parts, and the layer is put in place while the model is built.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.models import gpt2 as stock

from vllm_sparse.models.decoder import LayerContext, checked
from vllm_sparse.models.layer_config import AttentionShape
from vllm_sparse.models.substitute import substituted
from vllm_sparse.models.verify import start_building
from vllm_sparse.quantization.dense_head import serve_heads

if TYPE_CHECKING:
    from transformers import GPT2Config
    from vllm.config import CacheConfig, VllmConfig
    from vllm.model_executor.layers.quantization import QuantizationConfig

# Older vLLM uses torch's here.
LayerNorm: type[nn.Module] = getattr(stock, "LayerNorm", nn.LayerNorm)


class SparseGPT2Attention(stock.GPT2Attention):
    """GPT-2's attention with any number of heads of a given dimension."""

    def __init__(self, context: LayerContext, shape: AttentionShape) -> None:
        nn.Module.__init__(self)
        prefix, quant_config = f"{context.prefix}.attn", context.quant_config
        hidden_size = context.config.hidden_size
        self.c_attn = QKVParallelLinear(
            hidden_size,
            shape.head_dim,
            shape.num_heads,
            bias=True,
            quant_config=quant_config,
            prefix=f"{prefix}.c_attn",
        )
        self.c_proj = RowParallelLinear(
            shape.num_heads * shape.head_dim,
            hidden_size,
            bias=True,
            quant_config=quant_config,
            prefix=f"{prefix}.c_proj",
        )
        self.attn = Attention(
            shape.num_heads // get_tensor_model_parallel_world_size(),
            shape.head_dim,
            scale=shape.head_dim**-0.5,
            cache_config=context.cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
        )


class SparseGPT2Block(nn.Module):
    """GPT-2 block either of whose parts may be missing."""

    def __init__(
        self,
        config: GPT2Config,
        cache_config: CacheConfig | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        del cache_config, quant_config  # the engine's own, which the context carries
        context = LayerContext.of(get_current_vllm_config(), prefix)
        shape = context.shape
        self.has_attention = shape.attention is not None
        self.has_ffn = shape.ffn is not None
        if shape.attention is not None:
            self.ln_1 = LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
            self.attn = SparseGPT2Attention(context, shape.attention)
        if shape.ffn is not None:
            self.ln_2 = LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
            width = shape.ffn.intermediate_size
            self.mlp = stock.GPT2MLP(width, context.config, context.quant_config, prefix=f"{prefix}.mlp")

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Apply the parts that exist to [tokens, hidden]."""
        if self.has_attention:
            hidden_states = hidden_states + self.attn(hidden_states=self.ln_1(hidden_states))
        if self.has_ffn:
            hidden_states = hidden_states + self.mlp(self.ln_2(hidden_states))
        return hidden_states


class SparseGPT2LMHeadModel(stock.GPT2LMHeadModel):
    """GPT-2 for structurally pruned checkpoints."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        self.shape = start_building(vllm_config)
        with substituted(stock, "GPT2Block", SparseGPT2Block):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        serve_heads(self)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint's tensors, each checked against the declared shape first."""
        return super().load_weights(checked(weights, self.shape))
