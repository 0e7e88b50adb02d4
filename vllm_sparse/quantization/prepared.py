"""Linears that vLLM's model classes prepare while they load them, knowing only tensors of vLLM's own names.

- Llama 4 reorders the rows of q and k in ``weight``, ``weight_packed`` and ``weight_scale``: values and
  bitmask are put in the same order here, by the model's own function.
- BLOOM reorders the rows of whatever belongs to ``query_key_value``. Of packed layers that is right, but for
  tensors that have no row for each output feature: ``shape``, which is therefore not loaded, and those that
  :func:`check` refuses.
- Falcon does so for parameters with an ``output_dim``, which outliers have not.
- Whisper and others leave out the bias of k, and zeros come only with a dense weight (:func:`zero_bias`).
"""

import weakref
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from vllm_sparse.errors import UnsupportedError
from vllm_sparse.quantization.loaders import Order
from vllm_sparse.quantization.scheme import ScaleLayout, SparseScheme

#: Layers whose rows change their order, by a part of the names that model classes of the family have.
REORDERED = {"llama4": "qkv_proj", "bloom": "query_key_value", "falcon": "query_key_value"}
#: Llama 4's picture encoder has layers of the same name, whose rows stay where they are.
VISION = "vision_model."
#: Tensors without a row for each output feature that the model's class would reorder all the same.
DROPPED = {"bloom": ".query_key_value.shape"}


def family_of(hf_config: Any) -> str | None:
    """Which of the families in :data:`REORDERED` a model is of, by its architectures and model type."""
    text_config = getattr(hf_config, "text_config", None)
    said = [
        *(getattr(hf_config, "architectures", None) or []),
        *(getattr(config, "model_type", None) for config in (hf_config, text_config)),
    ]
    names = " ".join(str(name) for name in said).lower()
    return next((family for family in REORDERED if family in names), None)


def check(scheme: SparseScheme, prefix: str, family: str | None) -> None:
    """Refuse what would load wrong numbers, or fail without saying why.

    Args:
        scheme: of the layer.
        prefix: its name.
        family: of the model; see :func:`family_of`.

    Raises:
        UnsupportedError: names the layer, and what of it does not follow its rows.
    """
    if family is None or not _is_reordered(prefix, family):
        return
    what = _left_behind(scheme, family)
    if what is not None:
        raise UnsupportedError(
            f"{prefix}: vLLM's class for {family} puts this layer's rows in another order while it loads "
            f"them, which {what} cannot follow. Write the checkpoint dense (vllm-sparse convert SRC DST --to "
            "dense) and serve it with --quantization sparse24, which packs it after loading; or leave this "
            "layer dense."
        )


def _is_reordered(prefix: str, family: str) -> bool:
    return prefix.rpartition(".")[2] == REORDERED[family] and not prefix.startswith(VISION)


def _left_behind(scheme: SparseScheme, family: str) -> str | None:
    if scheme.outliers:
        return "outliers beside it"
    if family == "falcon":
        return None
    if scheme.low_rank is not None:
        return "a low-rank branch beside it"
    if family != "bloom":
        return None
    quant = scheme.weight_quant
    if scheme.static_quant is not None or (quant is not None and quant.scale is ScaleLayout.TENSOR):
        return "scales per tensor"
    return None


def row_order(prefix: str, family: str | None) -> Order | None:
    """What puts the rows of values and bitmask in the order of a dense weight's, if anything has to."""
    return _rotary_rows if family == "llama4" and _is_reordered(prefix, family) else None


def _rotary_rows(layer: Any, loaded: Tensor, shard: tuple[Any, ...]) -> Tensor:
    """Rows of q or k, ``[n, any]``, as Llama 4's class orders them; those of v as they are."""
    from vllm.model_executor.models.llama4 import Llama4ForCausalLM

    heads = SimpleNamespace(
        num_attention_heads=layer.total_num_heads, num_key_value_heads=layer.total_num_kv_heads
    )
    (part,) = shard
    # vLLM loads with the served device as default, the tensor may be elsewhere.
    rows = torch.arange(loaded.shape[0], device=loaded.device).unsqueeze(1)
    _, order = Llama4ForCausalLM.permute_qk_weight_for_rotary(
        SimpleNamespace(config=heads), f"{part}_proj.weight", rows
    )
    return loaded[order.squeeze(1)]


def zero_bias(layer: Any) -> None:
    """Have the bias that vLLM is about to make start from zeros instead of what lies in memory.

    Of a fused layer some parts may bring none: Whisper's keys have no bias, beside queries and values that
    have.
    """
    load = type(layer).weight_loader
    begun: weakref.ref[Parameter] | None = None

    def load_bias(layer: Any, param: Parameter, loaded_weight: Tensor, *shard: Any, **named: Any) -> None:
        nonlocal begun
        # A reload of weights makes another parameter.
        if begun is None or begun() is not param:
            param.data.zero_()
            begun = weakref.ref(param)
        load(layer, param, loaded_weight, *shard, **named)

    layer.weight_loader = MethodType(load_bias, layer)
