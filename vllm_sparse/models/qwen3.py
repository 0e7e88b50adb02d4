"""Qwen3 with layers that differ: Qwen3's attention (normalised q and k) and a gated block."""

from torch import nn
from vllm.model_executor.models.qwen3 import Qwen3Attention
from vllm.transformers_utils.config import set_default_rope_theta

from vllm_sparse.models.decoder import LayerContext, SparseCausalLM, add_bias
from vllm_sparse.models.layer_config import AttentionShape
from vllm_sparse.models.llama import SparseLlamaDecoderLayer


class SparseQwen3DecoderLayer(SparseLlamaDecoderLayer):
    """A Qwen3 layer from vLLM's own attention and feed-forward modules."""

    def build_attention(self, context: LayerContext, shape: AttentionShape) -> nn.Module:
        """Stock Qwen3 attention with this layer's heads."""
        config = context.config
        set_default_rope_theta(config, default_theta=1000000)
        attention = Qwen3Attention(
            hidden_size=config.hidden_size,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            rope_parameters=config.rope_parameters,
            max_position=config.max_position_embeddings,
            head_dim=shape.head_dim,
            rms_norm_eps=config.rms_norm_eps,
            qkv_bias=shape.qkv_bias,
            cache_config=context.cache_config,
            quant_config=context.quant_config,
            prefix=f"{context.prefix}.self_attn",
        )
        if shape.o_bias:
            add_bias(attention.o_proj)
        return attention


class SparseQwen3ForCausalLM(SparseCausalLM):
    """Qwen3 for structurally pruned checkpoints."""

    decoder_layer = SparseQwen3DecoderLayer
