"""Qwen2 with layers that differ.

vLLM's Qwen2 attention derives head_dim from the hidden width, which is wrong once heads are pruned,
so the layer takes Llama's, which computes the same with biases on q, k and v.
"""

from torch import nn
from vllm.transformers_utils.config import set_default_rope_theta

from vllm_sparse.models.decoder import LayerContext, SparseCausalLM
from vllm_sparse.models.layer_config import AttentionShape
from vllm_sparse.models.llama import SparseLlamaDecoderLayer


class SparseQwen2DecoderLayer(SparseLlamaDecoderLayer):
    """A Qwen2 layer."""

    def build_attention(self, context: LayerContext, shape: AttentionShape) -> nn.Module:
        """Llama attention under Qwen's default rotary base."""
        set_default_rope_theta(context.config, default_theta=1000000)
        return super().build_attention(context, shape)


class SparseQwen2ForCausalLM(SparseCausalLM):
    """Qwen2 for structurally pruned checkpoints."""

    decoder_layer = SparseQwen2DecoderLayer
