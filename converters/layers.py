"""What a tensor's name says about its layer, for the naming schemes of Hugging Face decoder models."""

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

WEIGHT = ".weight"

# Modules that vLLM runs as one matrix; their 2:4 or dense storage must agree.
FUSED = {
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "gate_proj": "gate_up",
    "up_proj": "gate_up",
    "w1": "gate_up",
    "w3": "gate_up",
    "q_a_proj": "qkv_a",
    "kv_a_proj_with_mqa": "qkv_a",
}
_EMBEDDINGS = re.compile(r"wte|wpe|\w*embed\w*")
_HEADS = {"lm_head", "embed_out", "score", "classifier"}
# Of the layers with which DeepSeek-V3, GLM-4-MoE and others draft further tokens: their copy of the head, and
# the matrix that joins hidden states and embeddings, in vLLM a layer without quantisation.
_DRAFTING_HEAD = ".shared_head.head"
_NO_VLLM_LINEARS = {"eh_proj"}
_ROUTERS = {"gate", "router", "shared_expert_gate", "wg"}
_EXPERT = re.compile(r"^(?P<experts>.*\.experts)\.\d+\.")
# Hugging Face's Conv1D stores [in, out] instead of [out, in].
_CONV1D_FAMILIES = {"gpt2", "openai-gpt", "imagegpt"}
_CONV1D_MODULES = {"c_attn", "c_proj", "c_fc", "q_attn"}


class Kind(StrEnum):
    """Role of a tensor."""

    LINEAR = "linear"
    HEAD = "head"
    EMBEDDING = "embedding"
    ROUTER = "router"
    OTHER = "other"


def module_of(name: str) -> str:
    """A weight's module: the name without ``.weight``."""
    return name[: -len(WEIGHT)] if name.endswith(WEIGHT) else name


def kind_of(name: str, rank: int) -> Kind:
    """The role of tensor ``name`` with ``rank`` dimensions.

    Only matrices called ``*.weight`` can be linears; embeddings, heads and routers stay dense.
    """
    if rank != 2 or not name.endswith(WEIGHT):
        return Kind.OTHER
    module = module_of(name)
    last = module.rpartition(".")[2]
    if last in _HEADS or module == "output" or module.endswith(_DRAFTING_HEAD):
        return Kind.HEAD
    if _EMBEDDINGS.fullmatch(last):
        return Kind.EMBEDDING
    if last in _ROUTERS or module.endswith(".router.layer"):  # Granite's
        return Kind.ROUTER
    if "norm" in last or last.startswith(("ln_", "conv")) or last in _NO_VLLM_LINEARS:
        return Kind.OTHER
    return Kind.LINEAR


def fusion_group(module: str) -> str:
    """A key shared by the modules that vLLM stores and multiplies together."""
    expert = _EXPERT.match(module)
    if expert:
        return expert["experts"]
    parent, _, last = module.rpartition(".")
    return f"{parent}.{FUSED.get(last, last)}"


def is_conv1d(module: str, config: Mapping[str, Any]) -> bool:
    """Whether the module stores its weight as [in, out] (GPT-2's Conv1D)."""
    family = config.get("model_type")
    return (
        isinstance(family, str)
        and family in _CONV1D_FAMILIES
        and module.rpartition(".")[2] in _CONV1D_MODULES
    )
