"""Activations rounded as the served layers round them, in a transformers model that is evaluated."""

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from converters.checkpoint import Checkpoint
from converters.layers import Kind
from converters.readers import make_reader
from converters.serving import SparseServing, serving_of
from vllm_sparse.kernels.base import ActivationQuant
from vllm_sparse.kernels.reference import quantize_per_token
from vllm_sparse.quantization.scheme import SparseScheme

logger = logging.getLogger(__name__)


def round_activations(model: nn.Module, checkpoint: Checkpoint) -> ActivationQuant:
    """Make linears round their inputs per token where the checkpoint's config says that serving does.

    Layers that cannot be imitated (fused experts, fixed scales, low-rank branches and outliers, which see
    activations as they are) are left alone, and a warning says how many.

    Args:
        model: with the checkpoint's weights, all dense; changed in place.
        checkpoint: what the model was made from.

    Returns:
        The rounding that some layer has now, ``NONE`` if none has.
    """
    schemes = _schemes(checkpoint)
    done = ActivationQuant.NONE
    left = []
    for name, scheme in schemes.items():
        module = _linear(model, name)
        if module is None or scheme.static_quant or scheme.low_rank or scheme.outliers:
            left.append(name)
            continue
        done = scheme.activation_quant
        module.register_forward_pre_hook(_rounding(done))
    if left:
        logger.warning(
            "%d layers round their activations when served, but not in this evaluation (%s, ...)",
            len(left),
            left[0],
        )
    return done


def _schemes(checkpoint: Checkpoint) -> dict[str, SparseScheme]:
    """2:4 layers whose activations are rounded, by module name."""
    serving = serving_of(checkpoint)
    if not isinstance(serving, SparseServing) or serving.table is None:
        return {}
    found = {}
    for entry in make_reader(checkpoint).entries():
        scheme = serving.table.sparse_scheme([entry.module], "Linear") if entry.kind is Kind.LINEAR else None
        if scheme is not None and (
            scheme.static_quant or scheme.activation_quant is not ActivationQuant.NONE
        ):
            found[entry.module] = scheme
    return found


def _linear(model: nn.Module, name: str) -> nn.Linear | None:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return None
    return module if isinstance(module, nn.Linear) else None


def _rounding(quant: ActivationQuant) -> Any:
    def hook(_: nn.Module, args: Sequence[Tensor]) -> tuple[Tensor, ...]:
        x, *rest = args
        return quantize_per_token(x.float(), quant).to(x.dtype), *rest

    return hook
