"""Heads that a checkpoint of ours leaves dense, multiplied by this package's dense kernel where there is one.

A small model's head is a large part of what one token reads: a quarter of the weights for Llama-3.2-1B. The
product is bf16 with float32 sums, as vLLM's; only the weight is laid out so that it streams. The sums are not
rounded to bf16, since vLLM's sampler would only turn them back to float32, in another pass over the logits.
``VLLM_SPARSE_DENSE_HEAD=0`` leaves heads to vLLM; ``int8`` rounds them to int8 with a scale per row, which
reads half and changes logits by that rounding.
"""

import os
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

from vllm_sparse.errors import UnsupportedError, UserError
from vllm_sparse.kernels import dense, library

# Below "vllm" so that vLLM's logging configuration applies to it.
logger = init_logger("vllm.plugins.vllm_sparse")

ENV_DENSE_HEAD = "VLLM_SPARSE_DENSE_HEAD"


_SHARED = "vllm_sparse_head"
# Above it vLLM's own product is the faster one where the processor multiplies bf16 (docs/performance.md).
# Where it does not, vLLM's takes several times as long as ours at any number of tokens.
MAX_TOKENS = 16


def max_tokens() -> int | None:
    """The most tokens that this package's kernel multiplies with a dense head; None: any number."""
    return MAX_TOKENS if library.current_isa().has_bf16 else None


def head_method() -> UnquantizedEmbeddingMethod:
    """The method of a dense head.

    Raises:
        UserError: the variable has an unknown value.
    """
    chosen = os.environ.get(ENV_DENSE_HEAD, "1")
    methods = {"0": UnquantizedEmbeddingMethod, "1": DenseHeadMethod, "int8": Int8HeadMethod}
    if chosen not in methods:
        raise UserError(f"{ENV_DENSE_HEAD}={chosen!r} is unknown; allowed are {', '.join(methods)}")
    return methods[chosen]()


def embedding_method() -> UnquantizedEmbeddingMethod | None:
    """The method of an embedding: some models call a tied one as their head. None leaves it to vLLM."""
    config = get_current_vllm_config_or_none()
    if config is None or config.model_config is None:
        return None
    return (
        head_method() if getattr(config.model_config.hf_text_config, "tie_word_embeddings", False) else None
    )


def serve_heads(model: nn.Module) -> None:
    """Give a model that was built without a quantisation config the methods above: heads and tied embeddings.

    To be called before weights are processed. Heads that a quantisation config serves stay as they are.
    """
    heads = [m for m in model.modules() if isinstance(m, ParallelLMHead)]
    weights = {id(head.weight) for head in heads}
    for module in model.modules():
        plain = type(getattr(module, "quant_method", None)) is UnquantizedEmbeddingMethod
        if plain and id(getattr(module, "weight", None)) in weights:
            module.quant_method = head_method()


class DenseHeadMethod(UnquantizedEmbeddingMethod):
    """A dense output head: the dense kernel for as many tokens as it is the faster one, else vLLM's own path.

    Both have a copy of the weight in their own order, and a tied embedding needs the plain rows too. vLLM
    itself keeps three copies of a tied head, so the memory is the same.
    """

    def process_weights_after_loading(self, layer: Any) -> None:
        """Prepare both products once per weight."""
        weight: Tensor = layer.weight
        reason = dense.unsupported_reason(weight.data)
        if reason is not None:
            logger.info("dense head [%d, %d] stays with vLLM: %s", *weight.shape, reason)
            super().process_weights_after_loading(layer)
            return
        # On the parameter, because a tied head shares it with its embedding.
        shared = getattr(weight, _SHARED, None)
        if shared is None:
            super().process_weights_after_loading(layer)
            shared = (dense.pack(weight.data), layer.cpu_linear)
            setattr(weight, _SHARED, shared)
            limit = max_tokens()
            until = "" if limit is None else f" for up to {limit} tokens"
            logger.info("dense head [%d, %d] runs on the cpu kernels%s", *weight.shape, until)
        layer.head_panels, layer.cpu_linear = shared
        layer.head_max_tokens = max_tokens()

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x [tokens, k]`` times the head; float32, for many tokens ``x``'s dtype."""
        panels = getattr(layer, "head_panels", None)
        if panels is None or x.dtype != torch.bfloat16:
            return super().apply(layer, x, bias)
        if layer.head_max_tokens is not None and x.numel() > layer.head_max_tokens * x.shape[-1]:
            return super().apply(layer, x, bias)
        return dense.linear(x, panels, bias, wide=True)


class Int8HeadMethod(UnquantizedEmbeddingMethod):
    """An output head in int8, for every number of tokens. A tied embedding keeps its own bf16 rows."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Round once per weight.

        Raises:
            UnsupportedError: the kernel cannot run here; nobody should get other logits than those asked for.
        """
        weight: Tensor = layer.weight
        reason = dense.unsupported_reason(weight.data)
        if reason is not None:
            raise UnsupportedError(f"{ENV_DENSE_HEAD}=int8 cannot be served: {reason}. Use 1 or 0.")
        panels = getattr(weight, _SHARED, None)
        if panels is None:
            panels = dense.pack_int8(weight.data)
            setattr(weight, _SHARED, panels)
            logger.info("dense head [%d, %d] runs on the cpu kernels in int8", *weight.shape)
        layer.head_panels = panels

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x [tokens, k]`` times the head, float32."""
        return dense.linear(x, layer.head_panels, bias, wide=True)
