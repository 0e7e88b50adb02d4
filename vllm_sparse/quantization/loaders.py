"""Loaders of parameters, in the form that vLLM can keep for a reload of the weights.

When a model is built vLLM notes every parameter with its loader, for as long as the model lives, to make it
anew for ``reload_weights``. A loader that is a method of its layer is untied from it for that; any other
callable that reaches the layer would keep it in memory for good, and one without a name stops the reload.
"""

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.nn import Parameter

# Two of each four bits: a legal bitmask over values that are zero or do not matter.
LEGAL_BYTE = 0b0011_0011
# `--load-format dummy` draws floats around zero and leaves integers; these cannot be just any.
_DUMMY_VALUES = {"bitmask": LEGAL_BYTE, "weight_scale": 1e-3, "input_scale": 1e-3}

Check = Callable[[Tensor, tuple[Any, ...]], None]
Order = Callable[[Any, Tensor, tuple[Any, ...]], Tensor]


def set_dummy_value(parameter: Parameter, name: str) -> None:
    """Tell vLLM what to fill the parameter called ``name`` with where no checkpoint is read."""
    if name in _DUMMY_VALUES:
        parameter.dummy_weight_value = _DUMMY_VALUES[name]  # type: ignore[attr-defined]


def checked_loader(layer: nn.Module, loader: Callable[..., Any], check: Check) -> MethodType:
    """``loader`` behind a check, as a method of ``layer``.

    Args:
        layer: owner of the parameter.
        loader: vLLM's, a method of ``layer``.
        check: called with the loaded tensor and the part it is for; must not hold ``layer``.
    """
    load = _of_layer(loader, layer)

    def load_checked(
        layer: nn.Module, param: Parameter, loaded_weight: Tensor, *shard: Any, **named: Any
    ) -> None:
        check(loaded_weight, (*shard, *named.values()))
        load(layer, param, loaded_weight, *shard, **named)

    return MethodType(load_checked, layer)


def row_loader(layer: nn.Module) -> Callable[..., Any] | None:
    """The loader that a model has put on the layer's ``weight`` in place of the layer's own, if any.

    Mamba-2 layers with one group do, over several ranks: ``in_proj`` is five parts on top of each other, of
    which every rank needs its rows. They do so for ``weight`` and scales, the only names that they know.
    """
    loader = inspect.unwrap(getattr(layer._parameters.get("weight"), "weight_loader", _of_layer))
    own = isinstance(loader, MethodType) and loader.__self__ is layer
    return None if own or loader is _of_layer else loader


def by_rows(layer: nn.Module, loader: Callable[..., Any], order: Order | None = None) -> MethodType:
    """``loader``, or in its place the one that the model has put on ``weight``; a method of ``layer``.

    For tensors with a row for each output feature.

    Args:
        layer: owner of the parameter.
        loader: vLLM's, a method of ``layer``.
        order: called with the layer, a loaded tensor and the part it is for; gives its rows in another order.
    """
    load = _of_layer(loader, layer)

    def load_rows(
        layer: nn.Module, param: Parameter, loaded_weight: Tensor, *shard: Any, **named: Any
    ) -> None:
        if order is not None:
            loaded_weight = order(layer, loaded_weight, (*shard, *named.values()))
        rows = row_loader(layer)
        if rows is not None:
            rows(param, loaded_weight)
        else:
            load(layer, param, loaded_weight, *shard, **named)

    return MethodType(load_rows, layer)


def _of_layer(loader: Callable[..., Any], layer: nn.Module) -> Callable[..., Any]:
    """``loader`` as a function that takes the layer first."""
    if isinstance(loader, MethodType) and loader.__self__ is layer:
        return loader.__func__
    return lambda _, *args, **named: loader(*args, **named)
