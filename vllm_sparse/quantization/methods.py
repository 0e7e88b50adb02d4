"""Which method serves a module; apart from the config so that registering stays cheap."""

import re
from typing import TYPE_CHECKING, Any

from torch import nn
from vllm.config import CompilationMode, get_current_vllm_config_or_none
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.platforms import current_platform

from vllm_sparse.errors import UnsupportedError
from vllm_sparse.models.families import FAMILIES
from vllm_sparse.quantization import prepared
from vllm_sparse.quantization.dense_head import embedding_method, head_method
from vllm_sparse.quantization.dense_parts import DenseByConfigLinearMethod
from vllm_sparse.quantization.dense_stored_experts import DenseStored24ExpertsMethod
from vllm_sparse.quantization.experts import Sparse24ExpertsMethod, check_servable_scheme
from vllm_sparse.quantization.linear import DenseStored24LinearMethod, Sparse24BitmaskLinearMethod
from vllm_sparse.quantization.matching import unfused_names
from vllm_sparse.quantization.scheme import Schemes, SparseScheme, Storage

if TYPE_CHECKING:
    from vllm_sparse.quantization.config import Sparse24Config

ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
#: Latent attention takes this dense weight apart at load; from packed storage it multiplies it out instead,
#: but only where the layer's method is not that of a dense layer.
TAKEN_APART = "kv_b_proj"
#: Latent attention whose queries come from a latent too (DeepSeek-V3 and larger V2) has this layer.
LATENT_QUERIES = "fused_qkv_a_proj"

#: Load formats that leave no checkpoint to pack from, and what they do instead.
PAST_THE_CHECKPOINT = {
    "sharded_state": "stores weights as the kernels have them",
    "runai_streamer_sharded": "stores weights as the kernels have them",
    "tensorizer": "puts weights into the model without the step that prepares them for kernels",
}
#: Heads of layers that draft further tokens (DeepSeek-V3, GLM-4-MoE), as vLLM names them.
DRAFTING_HEAD = re.compile(r"(\.layers\.\d+)\.head$")


def method_for(config: "Sparse24Config", layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
    """The method for one module; None leaves embeddings, attention and norms alone.

    Raises:
        UnsupportedError: the module is a kind that cannot be served sparse yet.
    """
    if isinstance(layer, RoutedExperts):
        return _expert_method(config, layer, prefix)
    if isinstance(layer, ParallelLMHead):
        return _linear_method(config, layer, _head_name(prefix), "Linear") or head_method()
    if isinstance(layer, LinearBase):
        _check_compiled(prefix)
        _check_load_format()
        method = _linear_method(config, layer, prefix, type(layer).__name__)
        if method is not None:
            return method
        return DenseByConfigLinearMethod(prefix) if config.stores_bitmasks else UnquantizedLinearMethod()
    if isinstance(layer, VocabParallelEmbedding):
        return embedding_method()
    if not config.quantises_kv_cache:
        return None
    return config.stock.get_quant_method(layer, prefix)


def _head_name(prefix: str) -> str:
    """What a checkpoint calls a head: that of a layer which drafts (MTP) has another name in vLLM."""
    return DRAFTING_HEAD.sub(r"\1.shared_head.head", prefix)


def is_pooling() -> bool:
    """Whether the model that is being built gives embeddings, classes or scores."""
    current = get_current_vllm_config_or_none()
    return (
        current is not None
        and current.model_config is not None
        and (current.model_config.runner_type == "pooling")
    )


def layers_of_target() -> int:
    """How many layers the model has that a head drafts for; vLLM numbers the head's on from there."""
    current = get_current_vllm_config_or_none()
    if current is None or current.model_config is None:
        return 0
    return int(current.model_config.get_num_layers(current.parallel_config))


def _check_compiled(prefix: str) -> None:
    """Refuse what gives wrong numbers: vLLM's DeepSeek-V3 class, compiled on a CPU (docs/structured.md)."""
    config = get_current_vllm_config_or_none()
    if prefix.rpartition(".")[2] != LATENT_QUERIES or config is None or not current_platform.is_cpu():
        return
    if config.model_config.architecture in {family.architecture for family in FAMILIES.values()}:
        return  # the classes for structurally pruned models route in another way
    if config.compilation_config.mode not in (None, CompilationMode.NONE):
        raise UnsupportedError(
            f"{prefix}: a model with {LATENT_QUERIES} gives wrong results on a CPU in compiled mode, which "
            "may read a router's scores before they are written; eager mode is right. Add --enforce-eager."
        )


def _check_load_format() -> None:
    """Refuse what fails without saying why.

    Raises:
        UnsupportedError: weights are read past the form in which 2:4 checkpoints store them.
    """
    current = get_current_vllm_config_or_none()
    found = None if current is None else str(current.load_config.load_format)
    if found in PAST_THE_CHECKPOINT:
        raise UnsupportedError(
            f"--load-format {found} {PAST_THE_CHECKPOINT[found]}, from which 2:4 models are not loaded. "
            "Serve the checkpoint itself, without --load-format."
        )


def _linear_method(
    config: "Sparse24Config", layer: nn.Module, prefix: str, class_name: str
) -> QuantizeMethodBase | None:
    is_head = isinstance(layer, ParallelLMHead)
    if config.table is None:
        # A router decides by its exact values and is never pruned; data that looks 2:4 would be chance.
        if is_head or prefix.rpartition(".")[2] in (*ROUTERS, TAKEN_APART):
            return None
        return DenseStored24LinearMethod(prefix, config.report)
    names = unfused_names(prefix, config.packed_modules_mapping)
    scheme, ignored = _scheme(config.table, names, class_name)
    if scheme is None:
        config.report.dense_by_config()
        return _dense_method(config, layer, prefix, names, class_name)
    if scheme.storage is Storage.DENSE_WITH_ZEROS:
        if is_head or prefix.rpartition(".")[2] == TAKEN_APART:
            return None
        return DenseStored24LinearMethod(prefix, config.report)
    prepared.check(scheme, prefix, config.family)
    order = prepared.row_order(prefix, config.family)
    return Sparse24BitmaskLinearMethod(scheme, prefix, config.report, names, ignored, order)


def _scheme(table: Schemes, names: list[str], class_name: str) -> tuple[SparseScheme | None, list[str]]:
    """What a layer is, and those of its fused parts that the config leaves plain dense beside 2:4 ones.

    Raises:
        FormatError: its parts disagree in another way.
    """
    each = {name: table.sparse_scheme([name], class_name) for name in names}
    schemes = {scheme for scheme in each.values() if scheme is not None}
    ignored = [name for name, scheme in each.items() if scheme is None]
    plain = all(table.quantisation([name], class_name) is None for name in ignored)
    if ignored and plain and len(schemes) == 1:
        scheme = schemes.pop()
        if scheme.storage is Storage.BITMASK:
            return scheme, ignored
    return table.sparse_scheme(names, class_name), []


def _dense_method(
    config: "Sparse24Config", layer: nn.Module, prefix: str, names: list[str], class_name: str
) -> QuantizeMethodBase | None:
    """vLLM's own method for a layer that is quantised without being 2:4; None if it is neither."""
    if config.table is None or config.table.quantisation(names, class_name) is None:
        return None
    return config.stock.get_quant_method(layer, prefix)


def _expert_method(config: "Sparse24Config", layer: Any, prefix: str) -> QuantizeMethodBase | None:
    if config.table is None:
        return DenseStored24ExpertsMethod(layer, prefix, config.report)
    parts = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
    experts = range(layer.moe_config.num_logical_experts)
    # One layer runs all its experts alike, so a list that names some of them only is an error.
    names = [f"{prefix}.{expert}.{part}" for expert in experts for part in parts if part is not None]
    scheme = config.table.sparse_scheme(names, "Linear")
    if scheme is None:
        config.report.dense_by_config()
        return _dense_method(config, layer, prefix, names, "Linear")
    if scheme.storage is Storage.DENSE_WITH_ZEROS:
        return DenseStored24ExpertsMethod(layer, prefix, config.report)
    check_servable_scheme(scheme, prefix)
    return Sparse24ExpertsMethod(scheme, layer, prefix, config.report)
