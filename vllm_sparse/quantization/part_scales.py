"""Scales that hold for a whole matrix, one for each part of a fused layer, the same on every rank."""

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

from vllm.model_executor.parameter import PerTensorScaleParameter


class PartScalesParameter(PerTensorScaleParameter):
    """``[parts]`` float32; keeps its layer's loader where the model would put one that splits rows.

    Mamba-2 layers with one group do so over several ranks, with ``weight_scale`` and ``input_scale`` whether
    they have rows or not, and every rank but the first would find nothing in them.
    """

    @property
    def weight_loader(self) -> Callable[..., Any]:
        """A method of the layer, or what vLLM wraps around it for a reload."""
        return self._weight_loader

    @weight_loader.setter
    def weight_loader(self, value: Callable[..., Any]) -> None:
        if isinstance(inspect.unwrap(value), MethodType):
            self._weight_loader = value
