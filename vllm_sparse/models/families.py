"""What differs between model families in config.json: key names, biases, tensor names.

One row per ``model_type``. Nothing here imports torch or vLLM, so the converter and the config
checks share it with the model classes.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Family:
    """How one Hugging Face model family spells the shape of a decoder layer.

    Attributes:
        model_type: ``model_type`` of config.json.
        architecture: Name this project registers for the family.
        stock_architecture: Name vLLM and Transformers use for the uniform model.
        heads_keys: Accepted spellings of the number of query heads, the written one first.
        kv_heads_key: Key of the number of KV heads; None where every query head has its own.
        ffn_key: Key of the dense feed-forward width; None where every layer is an MoE layer.
        experts_keys: Accepted spellings of the number of routed experts; empty for dense families.
        expert_width_key: Key of one expert's width.
        shared_experts: Whether experts that every token takes stand beside the routed ones (DeepSeek).
        correction_bias: Whether routers choose by sigmoid scores plus a bias per expert (DeepSeek-V3).
        latent_attention: Whether attention caches one latent vector for all heads (DeepSeek's MLA).
        qkv_bias_key: Config flag for biases on q, k and v; None where ``qkv_bias`` says it.
        qkv_bias: Default of that flag, or the family's constant.
        o_bias_key: Config flag for the bias on the attention output projection.
        o_bias: Default of that flag, or the family's constant.
        mlp_bias_key: Config flag for biases in the feed-forward block.
        mlp_bias: Default of that flag, or the family's constant.
        layer_prefix: Where layer ``{i}`` lives among the checkpoint's tensor names.
        attention_name: Name of the attention block inside a layer.
        hidden_keys: Accepted spellings of the residual width.
        layers_keys: Accepted spellings of the number of layers.
    """

    model_type: str
    architecture: str
    stock_architecture: str
    heads_keys: tuple[str, ...] = ("num_attention_heads",)
    kv_heads_key: str | None = "num_key_value_heads"
    ffn_key: str | None = "intermediate_size"
    experts_keys: tuple[str, ...] = ()
    expert_width_key: str | None = None
    shared_experts: bool = False
    correction_bias: bool = False
    latent_attention: bool = False
    qkv_bias_key: str | None = "attention_bias"
    qkv_bias: bool = False
    o_bias_key: str | None = "attention_bias"
    o_bias: bool = False
    mlp_bias_key: str | None = None
    mlp_bias: bool = False
    layer_prefix: str = "model.layers.{i}."
    attention_name: str = "self_attn"
    hidden_keys: tuple[str, ...] = ("hidden_size",)
    layers_keys: tuple[str, ...] = ("num_hidden_layers",)


_ALL = (
    Family("llama", "SparseLlamaForCausalLM", "LlamaForCausalLM", mlp_bias_key="mlp_bias"),
    Family("mistral", "SparseMistralForCausalLM", "MistralForCausalLM", mlp_bias_key="mlp_bias"),
    Family(
        "qwen2",
        "SparseQwen2ForCausalLM",
        "Qwen2ForCausalLM",
        qkv_bias_key=None,
        qkv_bias=True,
        o_bias_key=None,
    ),
    Family("qwen3", "SparseQwen3ForCausalLM", "Qwen3ForCausalLM"),
    Family(
        "qwen3_moe",
        "SparseQwen3MoeForCausalLM",
        "Qwen3MoeForCausalLM",
        experts_keys=("num_experts", "num_local_experts"),
        expert_width_key="moe_intermediate_size",
    ),
    Family(
        "mixtral",
        "SparseMixtralForCausalLM",
        "MixtralForCausalLM",
        ffn_key=None,
        experts_keys=("num_local_experts",),
        expert_width_key="intermediate_size",
        qkv_bias_key=None,
        o_bias_key=None,
    ),
    Family(
        "deepseek",
        "SparseDeepseekForCausalLM",
        "DeepseekForCausalLM",
        experts_keys=("n_routed_experts",),
        expert_width_key="moe_intermediate_size",
        shared_experts=True,
    ),
    Family(
        "deepseek_v2",
        "SparseDeepseekV2ForCausalLM",
        "DeepseekV2ForCausalLM",
        kv_heads_key=None,
        experts_keys=("n_routed_experts",),
        expert_width_key="moe_intermediate_size",
        shared_experts=True,
        latent_attention=True,
        qkv_bias_key=None,
        o_bias_key=None,
    ),
    Family(
        "deepseek_v3",
        "SparseDeepseekV3ForCausalLM",
        "DeepseekV3ForCausalLM",
        kv_heads_key=None,
        experts_keys=("n_routed_experts",),
        expert_width_key="moe_intermediate_size",
        shared_experts=True,
        correction_bias=True,
        latent_attention=True,
        qkv_bias_key=None,
        o_bias_key=None,
    ),
    Family(
        "opt",
        "SparseOPTForCausalLM",
        "OPTForCausalLM",
        kv_heads_key=None,
        ffn_key="ffn_dim",
        qkv_bias_key="enable_bias",
        qkv_bias=True,
        o_bias_key="enable_bias",
        o_bias=True,
        mlp_bias_key="enable_bias",
        mlp_bias=True,
        layer_prefix="model.decoder.layers.{i}.",
    ),
    Family(
        "gpt2",
        "SparseGPT2LMHeadModel",
        "GPT2LMHeadModel",
        heads_keys=("n_head", "num_attention_heads"),
        kv_heads_key=None,
        ffn_key="n_inner",
        qkv_bias_key=None,
        qkv_bias=True,
        o_bias_key=None,
        o_bias=True,
        mlp_bias=True,
        layer_prefix="transformer.h.{i}.",
        attention_name="attn",
        hidden_keys=("n_embd", "hidden_size"),
        layers_keys=("n_layer", "num_hidden_layers"),
    ),
)

#: ``model_type`` → family.
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ALL}
