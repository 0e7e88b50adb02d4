"""Parts of a fused layer that the checkpoint stores dense beside others that it stores 2:4.

vLLM multiplies q, k and v, and gate and up, as one matrix. Where only some of them are 2:4 (k_proj on the
ignore list, or a file that does not keep to its config.json), each part is served as it is stored: one
product of the packed rows, one of the dense rows, side by side.

Layers are typed ``Any``: they are vLLM modules, and the dense rows live on them as a module of their own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from vllm.model_executor.layers.linear import (
    ReplicatedLinear,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.parameter import BasevLLMParameter
from vllm.model_executor.utils import set_weight_attrs

from vllm_sparse.errors import FormatError
from vllm_sparse.quantization.loaders import Check, checked_loader

TENSOR = "weight"
PACKED_TENSORS = ("compressed", "bitmask", "shape")
_CONVERT = "`vllm-sparse convert SRC DST` writes a checkpoint that agrees with its config.json."


class DensePartsParameter(BasevLLMParameter):
    """Takes this rank's rows of parts that arrive dense; without any it holds no memory.

    Attributes:
        prefix: the layer's name.
        widths: output features of each part, on this rank.
        parts: first row of a part in the layer -> its weight ``[width, k]``.
        output_dim: of its rows, which Falcon's class puts in another order before they come here.
    """

    output_dim = 0

    def __init__(
        self, data: Tensor, weight_loader: Callable[..., None], prefix: str, widths: list[int]
    ) -> None:
        super().__init__(data=data, weight_loader=weight_loader)
        self.prefix = prefix
        self.widths = widths
        self.parts: dict[int, Tensor] = {}

    def keep(self, first_row: int, size: int, part: Tensor) -> None:
        """Copy one part's share.

        Raises:
            FormatError: it is no matrix of floats of the layer's shape; names the layer.
        """
        expected = [size, self.data.shape[1]]
        if list(part.shape) != expected or not part.is_floating_point() or part.dtype.itemsize < 2:
            raise FormatError(
                f"{self.prefix}: the checkpoint stores a dense {part.dtype} weight {list(part.shape)} for a "
                f"layer that config.json says is 2:4; beside 2:4 parts a bf16, fp16 or fp32 matrix "
                f"{expected} can be served. {_CONVERT}"
            )
        self.parts[first_row] = self.data.new_empty(size, expected[1]).copy_(part)

    def load_column_parallel_weight(self, loaded_weight: Tensor) -> None:
        """The only part, this rank's rows."""
        size = sum(self.widths)
        self.keep(0, size, self._rows(loaded_weight, self.tp_rank, size))

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        """The only part, this rank's columns."""
        k, size = self.data.shape[1], sum(self.widths)
        self.keep(0, size, loaded_weight[:, self.tp_rank * k : (self.tp_rank + 1) * k])

    def load_merged_column_weight(self, loaded_weight: Tensor, **kwargs: Any) -> None:
        """One part of gate and up."""
        size = kwargs["shard_size"]
        self.keep(kwargs["shard_offset"], size, self._rows(loaded_weight, self.tp_rank, size))

    def load_qkv_weight(self, loaded_weight: Tensor, **kwargs: Any) -> None:
        """One of q, k, v; a key or value head may be on several ranks."""
        size = kwargs["shard_size"]
        rank = self.tp_rank if kwargs["shard_id"] == "q" else self.tp_rank // kwargs["num_heads"]
        self.keep(kwargs["shard_offset"], size, self._rows(loaded_weight, rank, size))

    @staticmethod
    def _rows(loaded: Tensor, rank: int, size: int) -> Tensor:
        # A slice, not narrow: rows that are not there are found by their number, with the layer's name.
        return loaded[rank * size : (rank + 1) * size]


def create_weights(
    layer: Any,
    prefix: str,
    k: int,
    parts: list[int],
    dtype: torch.dtype,
    loader: Callable[..., None],
    check: Check,
) -> None:
    """Register ``weight``, which stays empty unless a part of the layer arrives dense.

    Args:
        layer: the linear module.
        prefix: its name.
        k: this rank's input features.
        parts: output features of each fused part, on this rank.
        dtype: of the dense weights.
        loader: vLLM's weight loader.
        check: called before a part is loaded.
    """
    if isinstance(layer, ReplicatedLinear):
        loader = MethodType(_load_whole, layer)
    load = checked_loader(layer, loader, check)
    data = torch.empty(0, k, dtype=dtype)
    parameter = DensePartsParameter(data=data, weight_loader=load, prefix=prefix, widths=parts)
    layer.register_parameter(TENSOR, parameter)


def _load_whole(layer: Any, param: DensePartsParameter, loaded_weight: Tensor) -> None:
    """In place of the loader of layers that are not split, which copies into the parameter itself."""
    del layer
    param.keep(0, sum(param.widths), loaded_weight)


@dataclass(frozen=True)
class Parts:
    """What of a layer arrived dense.

    Attributes:
        widths: output features of each part, on this rank.
        dense: for each part its dense weight, or None where it is stored 2:4.
    """

    widths: list[int]
    dense: list[Tensor | None]

    @property
    def all_packed(self) -> bool:
        """Nothing arrived dense."""
        return all(part is None for part in self.dense)

    @property
    def all_dense(self) -> bool:
        """Everything did."""
        return all(part is not None for part in self.dense)

    def numbers(self, dense: bool) -> list[int]:
        """Numbers of the parts that are stored dense, or of those that are stored 2:4."""
        return [number for number, part in enumerate(self.dense) if (part is not None) == dense]

    def weight(self) -> Tensor:
        """The dense parts below each other."""
        return torch.cat([part for part in self.dense if part is not None])

    def rows(self, tensor: Tensor, dense: bool = False) -> Tensor:
        """Of a tensor with one row for each output feature, those of the parts stored 2:4 (or dense)."""
        pieces = tensor.split(self.widths)
        chosen = [pieces[number] for number in self.numbers(dense)]
        return tensor if len(chosen) == len(pieces) else torch.cat(chosen)

    def scales(self, stored: Tensor, by_part: bool, dense: bool = False) -> Tensor:
        """Of scales with a row for each output feature, or an element for each part, the same."""
        return stored[self.numbers(dense)] if by_part else self.rows(stored, dense)


def take(layer: Any, bitmask: Tensor) -> Parts:
    """What arrived dense, taken off the layer.

    Args:
        layer: the linear module.
        bitmask: ``[n, k/8]``, zero where nothing was loaded.

    Raises:
        FormatError: a part came dense and 2:4; names the layer.
    """
    widths: list[int] = layer.logical_widths
    parameter = getattr(layer, TENSOR, None)
    if not isinstance(parameter, DensePartsParameter):
        return Parts(widths, [None] * len(widths))
    delattr(layer, TENSOR)
    dense, first = [], 0
    for width in widths:
        dense.append(parameter.parts.get(first))
        if dense[-1] is not None and bool(bitmask[first : first + width].any()):
            raise FormatError(
                f"{parameter.prefix}: the checkpoint stores the same rows dense (weight) and 2:4 "
                f"(compressed, bitmask). {_CONVERT}"
            )
        first += width
    # vLLM keeps what hangs on a parameter, to make it anew for a reload.
    parameter.parts.clear()
    return Parts(widths, dense)


class DenseRows(nn.Module):
    """The dense rows of a partly 2:4 layer, multiplied by vLLM's own method for dense weights."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.weight = Parameter(parts.weight(), requires_grad=False)
        self.is_packed = [part is None for part in parts.dense]
        self.packed_widths = [parts.widths[number] for number in parts.numbers(dense=False)]
        self.dense_widths = [len(part) for part in parts.dense if part is not None]
        self.method = UnquantizedLinearMethod()
        self.method.process_weights_after_loading(self)

    def forward(self, packed: Tensor, x: Tensor) -> Tensor:
        """The layer's whole output ``[..., n]``.

        Args:
            packed: ``[..., rows]``, the output of its packed rows.
            x: ``[..., k]``.
        """
        pieces = iter(packed.split(self.packed_widths, dim=-1))
        dense = iter(self.method.apply(self, x).split(self.dense_widths, dim=-1))
        return torch.cat([next(pieces if kept else dense) for kept in self.is_packed], dim=-1)


@register_weight_loader_v2_supported_method
class DenseByConfigLinearMethod(UnquantizedLinearMethod):
    """A layer that config.json leaves dense, and which says so when the checkpoint stores it 2:4."""

    supports_pre_processed_weights = False

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        """As for an ordinary dense layer."""
        super().create_weights(layer, *args, **kwargs)
        for name in PACKED_TENSORS:
            refused = Parameter(torch.empty(0), requires_grad=False)
            set_weight_attrs(refused, {"weight_loader": self._refuse})
            layer.register_parameter(name, refused)

    def _refuse(self, *_: Any, **__: Any) -> None:
        raise FormatError(
            f"{self.prefix}: the checkpoint stores it, or a part of it, 2:4 (compressed, bitmask), but "
            "config.json leaves it dense. Take it off sparsity_config.ignore, or put it among "
            f"sparsity_config.targets. {_CONVERT}"
        )

    def process_weights_after_loading(self, layer: Any) -> None:
        """As for an ordinary dense layer."""
        for name in PACKED_TENSORS:
            delattr(layer, name)
        super().process_weights_after_loading(layer)
