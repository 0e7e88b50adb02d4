"""Checks of the outliers of ``sparse24`` version 2: a CSR matrix beside a 2:4 weight (docs/format.md)."""

import torch
from torch import Tensor

from converters.readers.base import OUTLIERS, Entry
from converters.safetensors_io import TensorSpec
from vllm_sparse.errors import FormatError

VALUE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_outlier_specs(entry: Entry, values: TensorSpec, columns: TensorSpec, offsets: TensorSpec) -> None:
    """Check dtypes and shapes, known from headers.

    Raises:
        FormatError: naming the tensor.
    """
    count = values.shape[0] if len(values.shape) == 1 else -1
    for info, dtypes, shape in (
        (values, VALUE_DTYPES, (count,)),
        (columns, (torch.int32,), (count,)),
        (offsets, (torch.int64,), (entry.shape[0] + 1,)),
    ):
        if info.dtype not in dtypes or info.shape != shape:
            allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise FormatError(
                f"{info.name!r} is {info.dtype} {list(info.shape)}; outliers of a {list(entry.shape)} weight "
                f"need {allowed} {'[nnz]' if info is not offsets else list(shape)}, columns as many as values"
            )


def check_outliers(entry: Entry, values: Tensor, columns: Tensor, offsets: Tensor) -> None:
    """Check that the three tensors are one CSR matrix of the weight's shape.

    Raises:
        FormatError: offsets or columns that cannot be.
    """
    count = values.numel()
    name = f"{entry.module}.{OUTLIERS[2]}"
    if int(offsets[0]) != 0 or int(offsets[-1]) != count or bool((offsets.diff() < 0).any()):
        raise FormatError(f"{name!r} must rise from 0 to the number of values, {count}")
    if count == 0:
        return
    name = f"{entry.module}.{OUTLIERS[1]}"
    if int(columns.min()) < 0 or int(columns.max()) >= entry.shape[1]:
        raise FormatError(f"{name!r} names a column outside 0..{entry.shape[1] - 1}")
    row = torch.repeat_interleave(torch.arange(entry.shape[0]), offsets.diff())
    same_row = row[1:] == row[:-1]
    if bool((same_row & (columns.diff() <= 0)).any()):
        raise FormatError(f"{name!r} must be strictly ascending within each row")
