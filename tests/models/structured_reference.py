"""Plain torch forward passes of the supported families, straight from checkpoint tensors.

Written against the architectures' definitions, not against any model class, in
float64, one query head at a time. Shapes are read off config.json
by the few lines below, so a mistake in the plugin's own parser cannot hide here.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

Tensors = dict[str, torch.Tensor]


@dataclass
class Layer:
    """One layer's own view of config.json."""

    config: dict[str, Any]
    own: dict[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.own.get(key, self.config.get(key))

    @property
    def skip(self) -> list[str]:
        return self.own.get("skip", [])


def layers_of(config: dict[str, Any]) -> list[Layer]:
    own = {int(key): value for key, value in config.get("per_layer_config", {}).items()}
    count = config.get("num_hidden_layers") or config["n_layer"]
    return [Layer(config, own.get(i, {})) for i in range(count)]


def linear(tensors: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))


def conv1d(tensors: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
    return x @ tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def layer_norm(tensors: Tensors, name: str, x: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps)


def rotate(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary embedding of x [tokens, heads, dim], halves paired (GPT-NeoX style)."""
    tokens, _, dim = x.shape
    inverse = theta ** (-torch.arange(0, dim, 2, dtype=x.dtype) / dim)
    angle = torch.arange(tokens, dtype=x.dtype)[:, None, None] * inverse
    first, second = x.chunk(2, -1)
    return torch.cat(
        [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1
    )


def rotate_pairs(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary embedding of x [tokens, heads, dim], neighbours paired (GPT-J style)."""
    tokens, _, dim = x.shape
    angle = torch.arange(tokens, dtype=x.dtype)[:, None, None] * theta ** (
        -torch.arange(0, dim, 2, dtype=x.dtype) / dim
    )
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack(
        [even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin()], -1
    ).flatten(-2)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """Causal attention, one query head at a time; q [tokens, heads, dim], k and v [tokens, kv, dim]."""
    tokens, heads, dim = q.shape
    group = heads // k.shape[1]
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    if window is not None:
        mask &= ~torch.ones(tokens, tokens, dtype=torch.bool).tril(-window)
    out = []
    for head in range(heads):
        scores = q[:, head] @ k[:, head // group].T / math.sqrt(dim)
        out.append(scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v[:, head // group])
    return torch.cat(out, -1)


def gated_attention(tensors: Tensors, name: str, layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """Attention of the Llama, Mistral, Qwen and Mixtral families."""
    dim = layer["head_dim"]
    theta = (layer["rope_parameters"] or {}).get("rope_theta", 10000.0)
    q, k, v = (linear(tensors, f"{name}.{p}_proj", x).unflatten(-1, (-1, dim)) for p in "qkv")
    if layer["model_type"].startswith("qwen3"):
        q = rms_norm(q, tensors[f"{name}.q_norm.weight"], layer["rms_norm_eps"])
        k = rms_norm(k, tensors[f"{name}.k_norm.weight"], layer["rms_norm_eps"])
    out = attend(rotate(q, theta), rotate(k, theta), v, layer["sliding_window"])
    return linear(tensors, f"{name}.o_proj", out)


def latent_attention(tensors: Tensors, name: str, layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """DeepSeek-V2's attention, keys and values expanded from the latent (arXiv:2405.04434, section 2.1)."""
    nope, rope, rank = layer["qk_nope_head_dim"], layer["qk_rope_head_dim"], layer["kv_lora_rank"]
    theta, eps = (layer["rope_parameters"] or {}).get("rope_theta", 10000.0), layer["rms_norm_eps"]
    if layer["q_lora_rank"] is None:
        q = linear(tensors, f"{name}.q_proj", x)
    else:
        low = rms_norm(linear(tensors, f"{name}.q_a_proj", x), tensors[f"{name}.q_a_layernorm.weight"], eps)
        q = linear(tensors, f"{name}.q_b_proj", low)
    q = q.unflatten(-1, (-1, nope + rope))
    latent, shared = linear(tensors, f"{name}.kv_a_proj_with_mqa", x).split([rank, rope], -1)
    latent = rms_norm(latent, tensors[f"{name}.kv_a_layernorm.weight"], eps)
    kv = linear(tensors, f"{name}.kv_b_proj", latent).unflatten(-1, (-1, nope + layer["v_head_dim"]))
    k, v = kv.split([nope, layer["v_head_dim"]], -1)
    q = torch.cat([q[..., :nope], rotate_pairs(q[..., nope:], theta)], -1)
    shared = rotate_pairs(shared[:, None], theta).expand(-1, k.shape[1], -1)
    return linear(tensors, f"{name}.o_proj", attend(q, torch.cat([k, shared], -1), v))


def gated_mlp(tensors: Tensors, names: tuple[str, str, str], x: torch.Tensor) -> torch.Tensor:
    gate, up, down = names
    return linear(tensors, down, F.silu(linear(tensors, gate, x)) * linear(tensors, up, x))


def within_best_groups(probabilities: torch.Tensor, groups: int, kept: int) -> torch.Tensor:
    """Zero outside the groups whose best expert is best."""
    grouped = probabilities.unflatten(-1, (groups, -1))
    best = grouped.max(-1).values.topk(kept, -1).indices
    mask = torch.zeros(grouped.shape[:2], dtype=torch.bool).scatter(1, best, True)
    return (grouped * mask[..., None]).flatten(1)


def route(tensors: Tensors, block: str, layer: Layer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and numbers of the chosen experts, both [tokens, chosen]."""
    scores = linear(tensors, f"{block}.gate", x)
    top_k = layer["num_experts_per_tok"]
    if layer["topk_method"] == "noaux_tc":
        scores = scores.sigmoid()
        corrected = scores + tensors[f"{block}.gate.e_score_correction_bias"]
        grouped = corrected.unflatten(-1, (layer["n_group"], -1))
        ranks = grouped.topk(2, -1).values.sum(-1)
        outside = torch.ones_like(ranks, dtype=torch.bool)
        outside.scatter_(1, ranks.topk(layer["topk_group"], -1).indices, False)
        chosen = grouped.masked_fill(outside[..., None], -torch.inf).flatten(1).topk(top_k, -1).indices
        weights = scores.gather(1, chosen)
    else:
        scores = scores.softmax(-1)
        if layer["topk_method"] == "group_limited_greedy":
            scores = within_best_groups(scores, layer["n_group"], layer["topk_group"])
        weights, chosen = scores.topk(top_k, -1)
    if layer["norm_topk_prob"] or layer["model_type"] == "mixtral":
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * (layer["routed_scaling_factor"] or 1.0), chosen


def experts(
    tensors: Tensors, block: str, parts: tuple[str, str, str], layer: Layer, x: torch.Tensor
) -> torch.Tensor:
    """Mixture token by token; DeepSeek adds experts that every token takes."""
    weights, chosen = route(tensors, block, layer, x)
    out = torch.zeros_like(x)
    if f"{block}.shared_experts.up_proj.weight" in tensors:
        out = gated_mlp(tensors, tuple(f"{block}.shared_experts.{part}" for part in parts), x)
    for token in range(x.shape[0]):
        for weight, expert in zip(weights[token], chosen[token].tolist(), strict=True):
            names = tuple(f"{block}.experts.{expert}.{part}" for part in parts)
            out[token] += weight * gated_mlp(tensors, names, x[token])
    return out


def pre_norm_model(tensors: Tensors, config: dict[str, Any], ids: torch.Tensor) -> torch.Tensor:
    """Logits of Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE, Mixtral and DeepSeek; ids [tokens]."""
    eps = config["rms_norm_eps"]
    x = tensors["model.embed_tokens.weight"][ids]
    for i, layer in enumerate(layers_of(config)):
        name = f"model.layers.{i}"
        if "attention" not in layer.skip:
            y = rms_norm(x, tensors[f"{name}.input_layernorm.weight"], eps)
            attention = latent_attention if config.get("kv_lora_rank") else gated_attention
            x = x + attention(tensors, f"{name}.self_attn", layer, y)
        if "mlp" not in layer.skip:
            y = rms_norm(x, tensors[f"{name}.post_attention_layernorm.weight"], eps)
            if f"{name}.block_sparse_moe.gate.weight" in tensors:
                x = x + experts(tensors, f"{name}.block_sparse_moe", ("w1", "w3", "w2"), layer, y)
            elif f"{name}.mlp.gate.weight" in tensors:
                x = x + experts(tensors, f"{name}.mlp", ("gate_proj", "up_proj", "down_proj"), layer, y)
            else:
                names = tuple(f"{name}.mlp.{part}_proj" for part in ("gate", "up", "down"))
                x = x + gated_mlp(tensors, names, y)
    x = rms_norm(x, tensors["model.norm.weight"], eps)
    return x @ tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"]).T


def opt_model(tensors: Tensors, config: dict[str, Any], ids: torch.Tensor) -> torch.Tensor:
    """Logits of OPT with norms before the blocks; positions are offset by 2."""
    positions = torch.arange(len(ids)) + 2
    x = (
        tensors["model.decoder.embed_tokens.weight"][ids]
        + tensors["model.decoder.embed_positions.weight"][positions]
    )
    for i, layer in enumerate(layers_of(config)):
        name = f"model.decoder.layers.{i}"
        if "attention" not in layer.skip:
            y = layer_norm(tensors, f"{name}.self_attn_layer_norm", x)
            q, k, v = (
                linear(tensors, f"{name}.self_attn.{p}_proj", y).unflatten(-1, (-1, layer["head_dim"]))
                for p in "qkv"
            )
            x = x + linear(tensors, f"{name}.self_attn.out_proj", attend(q, k, v))
        if "mlp" not in layer.skip:
            y = layer_norm(tensors, f"{name}.final_layer_norm", x)
            x = x + linear(tensors, f"{name}.fc2", F.relu(linear(tensors, f"{name}.fc1", y)))
    x = layer_norm(tensors, "model.decoder.final_layer_norm", x)
    return x @ tensors["model.decoder.embed_tokens.weight"].T


def gpt2_model(tensors: Tensors, config: dict[str, Any], ids: torch.Tensor) -> torch.Tensor:
    """Logits of GPT-2, whose projections are stored (in, out)."""
    x = tensors["transformer.wte.weight"][ids] + tensors["transformer.wpe.weight"][: len(ids)]
    for i, layer in enumerate(layers_of(config)):
        name = f"transformer.h.{i}"
        if "attention" not in layer.skip:
            y = layer_norm(tensors, f"{name}.ln_1", x)
            qkv = conv1d(tensors, f"{name}.attn.c_attn", y).unflatten(-1, (3, -1, layer["head_dim"]))
            x = x + conv1d(tensors, f"{name}.attn.c_proj", attend(*qkv.unbind(1)))
        if "mlp" not in layer.skip:
            y = layer_norm(tensors, f"{name}.ln_2", x)
            y = F.gelu(conv1d(tensors, f"{name}.mlp.c_fc", y), approximate="tanh")
            x = x + conv1d(tensors, f"{name}.mlp.c_proj", y)
    return layer_norm(tensors, "transformer.ln_f", x) @ tensors["transformer.wte.weight"].T


def logprobs(tensors: Tensors, config: dict[str, Any], ids: list[int]) -> torch.Tensor:
    """Log-probabilities [tokens, vocabulary] in float64 after each prefix of ids."""
    double = {name: tensor.double() for name, tensor in tensors.items()}
    model = {"opt": opt_model, "gpt2": gpt2_model}.get(config["model_type"], pre_norm_model)
    return model(double, config, torch.tensor(ids)).log_softmax(-1)
