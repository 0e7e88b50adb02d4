"""Mixtral with layers that differ, also in the number of experts and their width."""

from typing import ClassVar

from torch import nn
from vllm.model_executor.models.llama import LlamaModel
from vllm.model_executor.models.mixtral import MixtralAttention, MixtralModel, MixtralMoE

from vllm_sparse.errors import UnsupportedError
from vllm_sparse.models.decoder import (
    LayerContext,
    SparseCausalLM,
    SparseDecoderLayer,
    add_bias,
    expert_kernels,
)
from vllm_sparse.models.layer_config import AttentionShape, FfnShape, MoeShape


class SparseMixtralDecoderLayer(SparseDecoderLayer):
    """A Mixtral layer from vLLM's own attention and expert modules."""

    ffn_name = "block_sparse_moe"

    def build_attention(self, context: LayerContext, shape: AttentionShape) -> nn.Module:
        """Stock attention with this layer's heads."""
        attention = MixtralAttention(
            config=context.config,
            hidden_size=context.config.hidden_size,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            max_position=context.config.max_position_embeddings,
            cache_config=context.cache_config,
            quant_config=context.quant_config,
            prefix=f"{context.prefix}.self_attn",
        )
        if shape.o_bias:
            add_bias(attention.o_proj)
        return attention

    def build_ffn(self, context: LayerContext, shape: FfnShape | MoeShape) -> nn.Module:
        """Stock expert block with this layer's experts."""
        if isinstance(shape, FfnShape):
            raise UnsupportedError(f"{context.prefix}: Mixtral has no dense feed-forward layers.")
        with expert_kernels(context.vllm_config):
            return MixtralMoE(
                num_experts=shape.num_experts,
                top_k=shape.top_k,
                hidden_size=context.config.hidden_size,
                intermediate_size=shape.intermediate_size,
                quant_config=context.quant_config,
                prefix=f"{context.prefix}.{self.ffn_name}",
            )


class SparseMixtralModel(LlamaModel):
    """The layer stack under Mixtral's tensor names."""

    hf_to_vllm_mapper = MixtralModel.hf_to_vllm_mapper


class SparseMixtralForCausalLM(SparseCausalLM):
    """Mixtral for structurally pruned checkpoints."""

    hf_to_vllm_mapper = MixtralModel.hf_to_vllm_mapper
    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    model_class = SparseMixtralModel
    decoder_layer = SparseMixtralDecoderLayer
