"""What the families with pre-norm decoder layers share: a layer whose sub-layers may be missing."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.models.llama import LlamaForCausalLM, LlamaModel
from vllm.model_executor.models.utils import extract_layer_index
from vllm.model_executor.utils import set_weight_attrs

from vllm_sparse.models.layer_config import (
    AttentionShape,
    FfnShape,
    LatentShape,
    LayerShape,
    ModelShape,
    MoeShape,
)
from vllm_sparse.models.tensors import check_tensor, declared_tensors
from vllm_sparse.models.verify import model_shape, start_building
from vllm_sparse.quantization.dense_head import serve_heads

if TYPE_CHECKING:
    from vllm.config import CacheConfig, VllmConfig
    from vllm.model_executor.layers.quantization import QuantizationConfig


@dataclass(frozen=True)
class LayerContext:
    """What a family needs to build one layer's sub-modules.

    Attributes:
        vllm_config: The engine's config, shared by all layers.
        config: The Hugging Face config with this layer's own values set.
        shape: The validated shape of this layer.
        prefix: Name of the layer, as in ``model.layers.3``.
    """

    vllm_config: VllmConfig
    config: Any
    shape: LayerShape
    prefix: str

    @classmethod
    def of(cls, vllm_config: VllmConfig, prefix: str, shape: ModelShape | None = None) -> LayerContext:
        """Context of the layer whose index ``prefix`` carries."""
        config = vllm_config.model_config.hf_config
        index = extract_layer_index(prefix)
        shape = shape or model_shape(config)
        layer_config = copy.copy(config.per_layer_config[index])
        layer_shape = shape.layers[index]
        if layer_shape.attention is not None and not isinstance(layer_shape.attention, LatentShape):
            layer_config.head_dim = layer_shape.attention.head_dim
        return cls(vllm_config, layer_config, layer_shape, prefix)

    @property
    def cache_config(self) -> CacheConfig:
        """Settings of the KV cache."""
        return self.vllm_config.cache_config

    @property
    def quant_config(self) -> QuantizationConfig | None:
        """What makes linear methods; None for plain weights."""
        return self.vllm_config.quant_config


class SparseDecoderLayer(nn.Module):
    """Pre-norm layer ``x + attention(norm(x))``, then ``x + ffn(norm(x))``; either part may be missing.

    Hidden states travel as vLLM's pair ``(delta, residual)``, both [tokens, hidden]: the fused norm
    adds the delta to the residual and normalises the sum. A missing part skips its norm as well.
    """

    ffn_name = "mlp"

    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        context = LayerContext.of(vllm_config, prefix)
        config, shape = context.config, context.shape
        self.has_attention = shape.attention is not None
        self.has_ffn = shape.ffn is not None
        if shape.attention is not None:
            self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.self_attn = self.build_attention(context, shape.attention)
        if shape.ffn is not None:
            self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.add_module(self.ffn_name, self.build_ffn(context, shape.ffn))

    def build_attention(self, context: LayerContext, shape: AttentionShape) -> nn.Module:
        """Build the family's attention for this layer."""
        raise NotImplementedError

    def build_ffn(self, context: LayerContext, shape: FfnShape | MoeShape) -> nn.Module:
        """Build the family's feed-forward block for this layer."""
        raise NotImplementedError

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply the parts that exist.

        Args:
            positions: [tokens] int64.
            hidden_states: [tokens, hidden], not yet added to the residual.
            residual: [tokens, hidden]; None before the first layer.
        """
        if self.has_attention:
            hidden_states, residual = _add_and_norm(self.input_layernorm, hidden_states, residual)
            hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
        if self.has_ffn:
            hidden_states, residual = _add_and_norm(self.post_attention_layernorm, hidden_states, residual)
            hidden_states = getattr(self, self.ffn_name)(hidden_states)
        if residual is None:  # a first layer with neither part
            return torch.zeros_like(hidden_states), hidden_states
        return hidden_states, residual


def _add_and_norm(
    norm: RMSNorm, hidden_states: torch.Tensor, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if residual is None:
        return norm(hidden_states), hidden_states
    return norm(hidden_states, residual)


class SparseCausalLM(LlamaForCausalLM):
    """vLLM's Llama skeleton (embedding, layers, final norm, head) around a family's own layers."""

    model_class: type[LlamaModel] = LlamaModel
    decoder_layer: type[SparseDecoderLayer] = SparseDecoderLayer

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        self.shape = start_building(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=self.decoder_layer)
        serve_heads(self)

    def _init_model(
        self, vllm_config: VllmConfig, prefix: str = "", layer_type: type[nn.Module] = SparseDecoderLayer
    ) -> LlamaModel:
        return self.model_class(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint's tensors, each checked against the declared shape first."""
        return super().load_weights(checked(weights, self.shape))


@contextlib.contextmanager
def expert_kernels(vllm_config: VllmConfig) -> Iterator[None]:
    """While experts are built: on the CPU let vLLM choose kernels as if there were no adapters.

    With LoRA it takes its Triton experts on every platform. On the CPU adapters cannot change experts, which
    :func:`~vllm_sparse.models.verify.check_serving` has seen to.
    """
    from vllm.platforms import current_platform

    if vllm_config.lora_config is None or not current_platform.is_cpu():
        yield
        return
    without = copy.copy(vllm_config)
    without.lora_config = None
    with set_current_vllm_config(without):
        yield


def checked(
    weights: Iterable[tuple[str, torch.Tensor]], shape: ModelShape
) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass tensors through, refusing one whose shape config.json does not declare.

    Checkpoints from a local folder were checked as a whole before; this covers every other source.

    Raises:
        FormatError: Names the tensor and both shapes.
    """
    expected = dict(declared_tensors(shape))
    for name, tensor in weights:
        if name in expected:
            check_tensor(name, tuple(tensor.shape), expected[name])
        yield name, tensor


def add_bias(linear: RowParallelLinear) -> None:
    """Give a row-parallel projection, built without one, a bias of [output_size] to be loaded.

    Stock modules fix which projections have biases; FLAP adds them to those into the residual.
    """
    if linear.bias is None:
        bias = nn.Parameter(torch.empty(linear.output_size, dtype=linear.params_dtype), requires_grad=False)
        set_weight_attrs(bias, {"output_dim": 0, "weight_loader": linear.weight_loader})
        linear.bias = bias
