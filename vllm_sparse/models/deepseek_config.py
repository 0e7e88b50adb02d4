"""The config class of DeepSeek-MoE (V1), which Transformers leaves to the checkpoint's own code.

With it ``model_type: deepseek`` is read without running anything that came with the weights.
"""

from typing import Any

from transformers import AutoConfig, PretrainedConfig


class DeepseekConfig(PretrainedConfig):
    """Values of a V1 checkpoint's config.json; defaults are those of deepseek-moe-16b's own class."""

    model_type = "deepseek"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 102400
    hidden_size: int = 4096
    intermediate_size: int = 11008
    moe_intermediate_size: int = 1407
    num_hidden_layers: int = 30
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int | None = None
    n_shared_experts: int | None = None
    n_routed_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_layer_freq: int = 1
    first_k_dense_replace: int = 0
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"
    n_group: int = 1
    topk_group: int = 1
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0


def register_config() -> None:
    """Tell Transformers, and so vLLM, about ``model_type: deepseek``; safe to call any number of times."""
    AutoConfig.register(DeepseekConfig.model_type, DeepseekConfig, exist_ok=True)
