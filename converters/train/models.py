"""Small Llama and Qwen3 models: transformers' own classes, shapes that every kernel here accepts."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Family = Literal["llama", "qwen3"]
# Attention kernels for CPUs and GPUs exist for these; K_MULTIPLE is what packed 2:4 kernels read at once.
HEAD_DIMS = (32, 64, 80, 96, 112, 128, 192, 256)
K_MULTIPLE = 64


class ModelShape(BaseModel):
    """Shape of a decoder. Every linear's input width is a multiple of 64."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    family: Family = "llama"
    hidden_size: int = Field(default=256, gt=0)
    intermediate_size: int = Field(default=512, gt=0)
    num_layers: int = Field(default=3, gt=0)
    num_heads: int = Field(default=8, gt=0)
    num_kv_heads: int = Field(default=4, gt=0)
    head_dim: int = 32
    max_positions: int = Field(default=2048, gt=0)
    tie_embeddings: bool = True

    @model_validator(mode="after")
    def _check(self) -> "ModelShape":
        if self.head_dim not in HEAD_DIMS:
            raise ValueError(f"head_dim {self.head_dim}: attention kernels exist for {list(HEAD_DIMS)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} heads cannot share {self.num_kv_heads} KV heads evenly")
        widths = {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_heads * head_dim": self.num_heads * self.head_dim,
        }
        for name, width in widths.items():
            if width % K_MULTIPLE:
                raise ValueError(
                    f"{name} is {width}; linears' input widths must be multiples of {K_MULTIPLE}"
                )
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of {self.num_heads} heads")
        return self


def build_model(shape: ModelShape, vocab_size: int, eos_token_id: int, seed: int) -> "PreTrainedModel":
    """A freshly initialised float32 model; the same seed gives the same weights.

    Args:
        shape: the decoder's shape.
        vocab_size: rows of the embedding.
        eos_token_id: written to the config, also as padding.
        seed: for the initial weights only; the global generator is left as it was.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[shape.family]
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_positions,
        "tie_word_embeddings": shape.tie_embeddings,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": eos_token_id,
        "initializer_range": 0.02,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config_class(**settings)).float()
