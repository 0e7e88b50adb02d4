"""DeepSeek-V2 with layers that differ: query heads over one shared latent, widths and experts.

The latent that the KV cache holds has one size for the whole model, so that pruning heads makes projections
smaller and the cache not; vLLM groups layers by their number of heads by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.models import deepseek_v2 as stock

from vllm_sparse.errors import UnsupportedError
from vllm_sparse.models.decoder import LayerContext, add_bias
from vllm_sparse.models.deepseek import SparseDeepseekDecoderLayer, SparseDeepseekForCausalLM
from vllm_sparse.models.layer_config import AttentionShape, LatentShape


class _LatentAttention(stock.DeepseekV2MLAAttention):
    """Stock's attention over the cached latent, without the argument of another family."""

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(positions, hidden_states, None)


class _ExpandedAttention(stock.DeepseekV2Attention):
    """The same with keys and values expanded before they are cached (``VLLM_MLA_DISABLE=1``)."""

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(positions, hidden_states, None)


def _rotate_natively_on_cpu(rotary_emb: Any) -> None:
    """Avoid vLLM's CPU kernel for neighbouring pairs, wrong for queries [tokens, heads > 1, rotary dims].

    Scaled positions (YaRN, as DeepSeek's own checkpoints have) never take that kernel; plain ones would.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and not rotary_emb.is_neox_style:
        rotary_emb._forward_method = rotary_emb.forward_native


class SparseDeepseekV2DecoderLayer(SparseDeepseekDecoderLayer):
    """V2's layer: latent attention, and vLLM's DeepSeek experts or a dense block."""

    def build_attention(self, context: LayerContext, shape: AttentionShape) -> nn.Module:
        """Stock attention with this layer's heads."""
        if not isinstance(shape, LatentShape):
            raise UnsupportedError(f"{context.prefix}: DeepSeek-V2 has latent attention only.")
        latent = context.vllm_config.model_config.use_mla
        attention_class: Any = _LatentAttention if latent else _ExpandedAttention
        attention = attention_class(
            vllm_config=context.vllm_config,
            config=context.config,
            hidden_size=context.config.hidden_size,
            num_heads=shape.num_heads,
            qk_nope_head_dim=shape.qk_nope_dim,
            qk_rope_head_dim=shape.rope_dim,
            v_head_dim=shape.v_dim,
            q_lora_rank=shape.q_rank,
            kv_lora_rank=shape.kv_rank,
            max_position_embeddings=context.config.max_position_embeddings,
            cache_config=context.cache_config,
            quant_config=context.quant_config,
            prefix=f"{context.prefix}.self_attn",
        )
        _rotate_natively_on_cpu(attention.rotary_emb)
        if shape.o_bias:
            add_bias(attention.o_proj)
        return attention


class SparseDeepseekV2ForCausalLM(SparseDeepseekForCausalLM):
    """DeepSeek-V2 for structurally pruned checkpoints."""

    decoder_layer = SparseDeepseekV2DecoderLayer
