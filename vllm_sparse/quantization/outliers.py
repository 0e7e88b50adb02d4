"""Sparse outliers beside a packed weight: ``y = W x + S x``, S in compressed sparse rows (docs/format.md).

The product is torch's own CSR product (MKL on CPUs, cuSPARSE on GPUs), behind one operator so that
torch.compile sees no sparse tensor. How many entries a rank gets is known only when all three tensors are
there, so loading keeps them as they come and :func:`pack` cuts out this rank's rows and columns.

Layers are typed ``Any``: they are vLLM modules, and the matrix lives on them as parameters.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear

from vllm_sparse.errors import FormatError, UnsupportedError
from vllm_sparse.sparse24.csr import CsrMatrix

TENSORS = ("outlier_values", "outlier_columns", "outlier_row_offsets")
_QKV = ("q", "k", "v")
# What was loaded, by part of a fused layer.
Pieces = dict[int | str | None, Tensor]


def create_weights(layer: Any) -> None:
    """Register the three tensors, empty until loaded."""
    for name, dtype in zip(TENSORS, (torch.float32, torch.int32, torch.int64), strict=True):
        parameter = Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        pieces: Pieces = {}
        parameter.pieces = pieces  # type: ignore[attr-defined]
        parameter.weight_loader = _keep_in(pieces)  # type: ignore[attr-defined]
        # Nothing is copied into it, so that a reload takes no layer for complete before all has been read.
        parameter.weight_loader_numel = 1  # type: ignore[attr-defined]
        layer.register_parameter(name, parameter)


def _keep_in(pieces: Pieces) -> Callable[..., None]:
    def keep(param: Parameter, loaded_weight: Tensor, shard_id: int | str | None = None) -> None:
        # A copy: loaders may reuse the buffer behind a tensor they hand over.
        pieces[shard_id] = loaded_weight.detach().clone()

    return keep


def pack(layer: Any, prefix: str, k: int, input_size: int) -> None:
    """Replace the loaded tensors by this rank's part of S.

    Args:
        layer: the linear module.
        prefix: its name, for messages.
        k: this rank's input features.
        input_size: input features over all ranks.

    Raises:
        FormatError: tensors are missing or do not describe a matrix of the layer's shape.
        UnsupportedError: weights are reloaded whose number of outliers is another one.
    """
    device = layer.outlier_values.device
    found = [getattr(layer, name).pieces for name in TENSORS]
    for name in TENSORS:
        delattr(layer, name)
    first_column = layer.tp_rank * k if k != input_size else 0
    parts = []
    for key, start, count, whole in _row_ranges(layer, fused=None in found[0]):
        try:
            values, columns, row_offsets = (pieces[key] for pieces in found)
        except KeyError:
            part = "" if key is None else f" (part {key!r} of a fused layer)"
            raise FormatError(
                f"{prefix}: config.json promises outliers, but the checkpoint does not have all of "
                f"{', '.join(TENSORS)} for it{part}"
            ) from None
        matrix = CsrMatrix(values, columns, row_offsets, input_size)
        try:
            matrix.validate(whole)
        except FormatError as error:
            raise FormatError(f"{prefix}: {error}") from error
        parts.append(matrix.row_range(start, count).column_range(first_column, k))
    # vLLM keeps what hangs on a parameter, to make it anew for a reload.
    for pieces in found:
        pieces.clear()
    matrix = _pad_rows(CsrMatrix.stack(parts), sum(layer.logical_widths))
    if getattr(layer, "outlier_count", matrix.nnz) != matrix.nnz:
        raise UnsupportedError(
            f"{prefix} has {matrix.nnz} outliers now and had {layer.outlier_count}. Such weights cannot be "
            "reloaded into a running engine; start it again."
        )
    layer.outlier_count = matrix.nnz
    _keep_resident(layer, matrix, device)


def _row_ranges(layer: Any, fused: bool) -> list[tuple[int | str | None, int, int, int]]:
    """This rank's rows: for each part its key, first row, number of rows, and rows of the stored matrix.

    Args:
        layer: the linear module.
        fused: whether the checkpoint stores a layer of several parts as one matrix.
    """
    widths: list[int] = layer.logical_widths
    if hasattr(layer, "shard_indices"):
        own = layer.shard_indices
        return [(None, own.org_vocab_start_index, own.num_org_elements, layer.org_vocab_size)]
    if not isinstance(layer, ColumnParallelLinear):
        return [(None, 0, sum(widths), sum(widths))]
    replicas = [1] * len(widths)
    if isinstance(layer, QKVParallelLinear):
        replicas[1:] = [layer.num_kv_head_replicas] * (len(widths) - 1)
    keys: list[int | str] = [*_QKV] if isinstance(layer, QKVParallelLinear) else [*range(len(widths))]
    full = [width * layer.tp_size // copies for width, copies in zip(widths, replicas, strict=True)]
    starts = [layer.tp_rank // copies * width for width, copies in zip(widths, replicas, strict=True)]
    if len(widths) > 1 and not fused:
        return list(zip(keys, starts, widths, full, strict=True))
    return [(None, sum(full[:i]) + starts[i], widths[i], sum(full)) for i in range(len(widths))]


def _pad_rows(matrix: CsrMatrix, rows: int) -> CsrMatrix:
    """Empty rows below, for a vocabulary that vLLM pads."""
    offsets = torch.cat([matrix.row_offsets, matrix.row_offsets[-1:].expand(rows - matrix.rows)])
    return CsrMatrix(matrix.values, matrix.columns, offsets, matrix.width)


def _keep_resident(layer: Any, matrix: CsrMatrix, device: torch.device) -> None:
    # MKL has no 16-bit product; cuSPARSE has, with sums in float32.
    dtype = torch.float32 if device.type == "cpu" else layer.sparse_activation_dtype
    layer.outliers = matrix.nnz > 0
    if layer.outliers:
        offsets = matrix.row_offsets.to(torch.int32 if matrix.nnz < 2**31 else torch.int64)
        columns = matrix.columns.to(offsets.dtype)
        for name, tensor in zip(TENSORS, (matrix.values.to(dtype), columns, offsets), strict=True):
            resident = tensor.to(device).contiguous().clone()
            layer.register_parameter(name, Parameter(resident, requires_grad=False))
        _operator()


def resident_bytes(layer: Any) -> int:
    """Bytes of this rank's part."""
    return sum(getattr(layer, name).nbytes for name in TENSORS) if layer.outliers else 0


@cache
def _operator() -> Any:
    """Defines the operator, once per process."""

    @torch.library.custom_op("vllm_sparse::outliers_csr", mutates_args=())
    def outliers_csr(x: Tensor, values: Tensor, columns: Tensor, row_offsets: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).to(values.dtype)
        shape = (row_offsets.numel() - 1, flat.shape[1])
        matrix = torch.sparse_csr_tensor(row_offsets, columns, values, shape, check_invariants=False)
        return (matrix @ flat.t()).t().contiguous().reshape(*x.shape[:-1], shape[0])

    @outliers_csr.register_fake
    def _(x: Tensor, values: Tensor, columns: Tensor, row_offsets: Tensor) -> Tensor:
        return values.new_empty([*x.shape[:-1], row_offsets.shape[0] - 1])

    return torch.ops.vllm_sparse.outliers_csr


def apply(layer: Any, x: Tensor) -> Tensor:
    """``S x`` for ``x [..., k]``, in the dtype of the resident values."""
    product: Tensor = torch.ops.vllm_sparse.outliers_csr(x, *(getattr(layer, name) for name in TENSORS))
    return product
