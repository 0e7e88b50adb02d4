"""Qwen3-MoE with layers that differ, also in the number of experts and their width."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn
from vllm.model_executor.models.llama import LlamaModel
from vllm.model_executor.models.qwen3_moe import Qwen3MoeModel, Qwen3MoeSparseMoeBlock

from vllm_sparse.models.decoder import LayerContext, SparseCausalLM, expert_kernels
from vllm_sparse.models.layer_config import FfnShape, MoeShape
from vllm_sparse.models.qwen3 import SparseQwen3DecoderLayer
from vllm_sparse.models.verify import share_fused_names

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class SparseQwen3MoeDecoderLayer(SparseQwen3DecoderLayer):
    """A Qwen3-MoE layer from vLLM's own attention and expert modules."""

    def build_ffn(self, context: LayerContext, shape: FfnShape | MoeShape) -> nn.Module:
        """Stock expert block with this layer's experts, or the dense block where there are none."""
        if isinstance(shape, FfnShape):
            return super().build_ffn(context, shape)
        with expert_kernels(context.vllm_config):
            return Qwen3MoeSparseMoeBlock(
                vllm_config=_with_layer_config(context), prefix=f"{context.prefix}.mlp"
            )


def _with_layer_config(context: LayerContext) -> VllmConfig:
    """The engine's config as this layer sees it: the stock block reads its sizes from there."""
    model_config: Any = copy.copy(context.vllm_config.model_config)
    model_config.hf_config = model_config.hf_text_config = context.config
    vllm_config = copy.copy(context.vllm_config)
    vllm_config.model_config = model_config
    return vllm_config


class SparseQwen3MoeModel(LlamaModel):
    """The layer stack under Qwen3-MoE's tensor names."""

    hf_to_vllm_mapper = Qwen3MoeModel.hf_to_vllm_mapper


class SparseQwen3MoeForCausalLM(SparseCausalLM):
    """Qwen3-MoE for structurally pruned checkpoints."""

    hf_to_vllm_mapper = Qwen3MoeModel.hf_to_vllm_mapper
    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    model_class = SparseQwen3MoeModel
    decoder_layer = SparseQwen3MoeDecoderLayer

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        if getattr(vllm_config.model_config.hf_config, "mlp_only_layers", None):
            dense = {"gate_up_proj": ["gate_proj", "up_proj"]}
            self.packed_modules_mapping = {**type(self).packed_modules_mapping, **dense}  # type: ignore[misc]
            share_fused_names(vllm_config, self.packed_modules_mapping)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
