"""What every reader yields: a checkpoint's tensors in one canonical form, one at a time."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from converters.checkpoint import Checkpoint
from converters.layers import Kind, module_of
from converters.safetensors_io import TensorSpec
from vllm_sparse.errors import NumericsError
from vllm_sparse.kernels.base import WeightFormat
from vllm_sparse.sparse24.scan import any_nonfinite

# A branch B (A x) beside a weight; without A it sums blocks of inputs.
LOW_RANK_A = "low_rank_a"
LOW_RANK_B = "low_rank_b"
# A sparse matrix beside a weight, in CSR: values, columns, row offsets.
OUTLIERS = ("outlier_values", "outlier_columns", "outlier_row_offsets")


@dataclass(frozen=True)
class Entry:
    """One logical tensor, known from headers alone.

    Attributes:
        name: canonical name; a module's weight is ``M.weight`` however it is stored.
        shape: dense shape, linears as (out, in).
        dtype: dtype of the stored values (int4 is held as int8).
        kind: the layer's role.
        parts: the tensors on disk that make it up.
        shard: the shard its first part is in.
        stored: how it is stored: ``dense``, ``sparse-24-bitmask``, ...
        claims_24: the checkpoint says that the weight is 2:4.
        conv1d: on disk as (in, out), as GPT-2's Conv1D has it.
        quantized: the values need a scale to become numbers.
        group_size: input columns sharing a scale; None is one scale per row or tensor.
        companions: further tensors of the module as a writer emits them (scales above all), shapes known.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: Kind
    parts: tuple[str, ...]
    shard: str
    stored: str = "dense"
    claims_24: bool = False
    conv1d: bool = False
    quantized: WeightFormat | None = None
    group_size: int | None = None
    companions: tuple[TensorSpec, ...] = ()

    @property
    def module(self) -> str:
        """The name without ``.weight``."""
        return module_of(self.name)

    @property
    def numel(self) -> int:
        """Dense elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass
class Loaded:
    """An entry's data.

    Attributes:
        weight: dense values in ``entry.shape``, pruned positions zero.
        companions: the module's further tensors by name, as ``entry.companions`` announced them.
        notes: what was repaired on the way, for the manifest.
    """

    weight: Tensor
    companions: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def scale(self, entry: Entry) -> Tensor | None:
        """Weight scales ``[out, 1]``, ``[out, groups]`` or one element; None for plain floats."""
        return self.companions.get(f"{entry.module}.weight_scale")

    def low_rank(self, entry: Entry) -> Tensor | None:
        """The product ``B A`` ``[out, in]`` in float32 of a static low-rank branch; None without one."""
        b = self.companions.get(f"{entry.module}.{LOW_RANK_B}")
        if b is None:
            return None
        a = self.companions.get(f"{entry.module}.{LOW_RANK_A}")
        if a is None:
            return b.to(torch.float32).repeat_interleave(entry.shape[1] // b.shape[1], dim=1)
        return b.to(torch.float32) @ a.to(torch.float32)

    def outliers(self, entry: Entry) -> Tensor | None:
        """The outliers as a dense ``[out, in]`` float32 matrix; None without any."""
        found = [self.companions.get(f"{entry.module}.{part}") for part in OUTLIERS]
        values, columns, offsets = found
        if values is None or columns is None or offsets is None:
            return None
        rows, cols = entry.shape
        dense = torch.zeros(rows, cols)
        row = torch.repeat_interleave(torch.arange(rows), offsets.diff())
        dense[row, columns.to(torch.int64)] = values.to(torch.float32)
        return dense


class Reader(Protocol):
    """A source of canonical tensors.

    Attributes:
        format: what it reads.
        checkpoint: where from.
        validated: every entry has been loaded once without an error, so that looking for NaN and Inf again
            would only cost time.
    """

    format: str
    checkpoint: Checkpoint
    validated: bool

    def entries(self) -> Sequence[Entry]:
        """Every logical tensor, in the order of the shards; headers only.

        Raises:
            FormatError: parts are missing, disagree with each other or with config.json.
        """

    def load(self, entry: Entry) -> Loaded:
        """Read and validate one entry.

        Raises:
            FormatError: the parts do not describe one weight.
            NumericsError: NaN or Inf in weights or scales.
        """


def check_finite(tensor: Tensor, name: str) -> None:
    """Refuse NaN and Inf.

    Raises:
        NumericsError: naming the tensor.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    if any_nonfinite(tensor):
        raise NumericsError(
            f"tensor {name!r} holds NaN or Inf; the checkpoint is broken. Fetch or export it again."
        )


def dequantize(weight: Tensor, scale: Tensor | None, group_size: int | None = None) -> Tensor:
    """Quantised values times their scale, in float32; plain floats come back unchanged.

    Args:
        weight: ``[out, in]``.
        scale: one element, ``[out]``, ``[out, 1]`` or ``[out, in / group_size]``.
        group_size: input columns per scale.
    """
    if scale is None:
        return weight
    values = weight.to(torch.float32)
    factor = scale.to(torch.float32)
    if factor.numel() == 1:
        return values * factor.reshape(())
    factor = factor.reshape(weight.shape[0], -1)
    if factor.shape[1] == 1:
        return values * factor
    step = group_size or weight.shape[1] // factor.shape[1]
    return (values.reshape(weight.shape[0], -1, step) * factor.unsqueeze(-1)).reshape(weight.shape)


def dense_numbers(entry: Entry, loaded: Loaded) -> Tensor:
    """The matrix a layer multiplies by, in float32 if it is quantised or has something beside it."""
    numbers = dequantize(loaded.weight, loaded.scale(entry), entry.group_size)
    for more in (loaded.low_rank(entry), loaded.outliers(entry)):
        if more is not None:
            numbers = numbers.to(torch.float32) + more
    return numbers
