"""DeepSeek-V3 with layers that differ: V2's layers under routers that choose by a corrected score.

An expert's sigmoid score plus its own bias decides who is chosen, the score alone who weighs how much
(arXiv:2412.19437, section 2.1.2). A pruned layer keeps the biases of the experts that stay.
"""

from __future__ import annotations

from torch import nn

from vllm_sparse.models.decoder import LayerContext
from vllm_sparse.models.deepseek_v2 import SparseDeepseekV2DecoderLayer, SparseDeepseekV2ForCausalLM
from vllm_sparse.models.layer_config import FfnShape, MoeShape


class SparseDeepseekV3DecoderLayer(SparseDeepseekV2DecoderLayer):
    """V3's layer: V2's with another router."""

    def build_ffn(self, context: LayerContext, shape: FfnShape | MoeShape) -> nn.Module:
        """V2's block, told of the router where config.json leaves to the family what it is."""
        context.config.topk_method, context.config.scoring_func = "noaux_tc", "sigmoid"
        return super().build_ffn(context, shape)


class SparseDeepseekV3ForCausalLM(SparseDeepseekV2ForCausalLM):
    """DeepSeek-V3 for structurally pruned checkpoints."""

    decoder_layer = SparseDeepseekV3DecoderLayer
