"""Llama with layers that differ: query and KV heads, widths, skipped parts, biases."""

from __future__ import annotations

from torch import nn
from vllm.model_executor.models.llama import LlamaAttention, LlamaMLP

from vllm_sparse.models.decoder import LayerContext, SparseCausalLM, SparseDecoderLayer, add_bias
from vllm_sparse.models.layer_config import AttentionShape, FfnShape, MoeShape


class SparseLlamaDecoderLayer(SparseDecoderLayer):
    """A Llama layer from vLLM's own attention and feed-forward modules."""

    attention_class: type[LlamaAttention] = LlamaAttention

    def build_attention(self, context: LayerContext, shape: AttentionShape) -> nn.Module:
        """Stock attention with this layer's heads."""
        return self.attention_class(
            config=context.config,
            hidden_size=context.config.hidden_size,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            max_position_embeddings=context.config.max_position_embeddings,
            quant_config=context.quant_config,
            bias=shape.qkv_bias,
            bias_o_proj=shape.o_bias,
            cache_config=context.cache_config,
            prefix=f"{context.prefix}.self_attn",
        )

    def build_ffn(self, context: LayerContext, shape: FfnShape | MoeShape) -> nn.Module:
        """Stock gated feed-forward block with this layer's width."""
        mlp = LlamaMLP(
            hidden_size=context.config.hidden_size,
            intermediate_size=shape.intermediate_size,
            hidden_act=context.config.hidden_act,
            quant_config=context.quant_config,
            bias=isinstance(shape, FfnShape) and shape.up_bias,
            prefix=f"{context.prefix}.{self.ffn_name}",
        )
        if isinstance(shape, FfnShape) and shape.down_bias:
            add_bias(mlp.down_proj)
        return mlp


class SparseLlamaForCausalLM(SparseCausalLM):
    """Llama for structurally pruned checkpoints."""

    decoder_layer = SparseLlamaDecoderLayer
