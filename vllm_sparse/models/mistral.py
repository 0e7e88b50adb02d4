"""Mistral with layers that differ; a Llama layer with Mistral's attention."""

from typing import ClassVar

from vllm.model_executor.models.mistral import MistralAttention

from vllm_sparse.models.decoder import SparseCausalLM
from vllm_sparse.models.llama import SparseLlamaDecoderLayer


class SparseMistralDecoderLayer(SparseLlamaDecoderLayer):
    """A Mistral layer from vLLM's own attention and feed-forward modules."""

    attention_class = MistralAttention


class SparseMistralForCausalLM(SparseCausalLM):
    """Mistral for structurally pruned checkpoints in Hugging Face's naming."""

    # Like vLLM's Mistral: no LoRA on the embeddings.
    embedding_modules: ClassVar[dict[str, str]] = {}
    decoder_layer = SparseMistralDecoderLayer
