"""Sparse outliers as compressed sparse rows (docs/format.md, section 2): checks and slices, plain torch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_sparse.errors import FormatError

VALUE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class CsrMatrix:
    """A sparse matrix; row *i* holds entries ``row_offsets[i]`` to ``row_offsets[i + 1] - 1``.

    Attributes:
        values: ``[nnz]``, a float.
        columns: ``[nnz]`` int32, strictly ascending within a row.
        row_offsets: ``[rows + 1]`` int64, from 0 to nnz.
        width: number of columns.
    """

    values: Tensor
    columns: Tensor
    row_offsets: Tensor
    width: int

    @classmethod
    def from_dense(cls, dense: Tensor) -> "CsrMatrix":
        """The non-zero entries of ``dense [rows, width]``."""
        kept = dense != 0
        rows, columns = kept.nonzero(as_tuple=True)
        offsets = torch.zeros(dense.shape[0] + 1, dtype=torch.int64, device=dense.device)
        torch.cumsum(kept.sum(1), 0, out=offsets[1:])
        return cls(dense[rows, columns], columns.to(torch.int32), offsets, dense.shape[1])

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.row_offsets.numel() - 1

    @property
    def nnz(self) -> int:
        """Number of entries."""
        return self.values.numel()

    def _row_of_entry(self) -> Tensor:
        counts = self.row_offsets.diff()
        return torch.repeat_interleave(torch.arange(self.rows, device=counts.device), counts)

    def dense(self) -> Tensor:
        """``[rows, width]`` in the dtype of the values."""
        out = self.values.new_zeros(self.rows, self.width)
        out[self._row_of_entry(), self.columns.long()] = self.values
        return out

    def validate(self, rows: int) -> None:
        """Check everything a reader relies on.

        Raises:
            FormatError: wrong dtypes or shapes, offsets that do not rise from 0 to nnz, columns out of range
                or out of order, values that are not finite.
        """
        self._validate_layout(rows)
        if not self.nnz:
            return
        columns = self.columns.long()
        if int(columns.min()) < 0 or int(columns.max()) >= self.width:
            raise FormatError(
                f"outlier_columns holds {int(columns.min())} to {int(columns.max())}; this layer has columns "
                f"0 to {self.width - 1}"
            )
        row_of_entry = self._row_of_entry()
        unordered = (columns.diff() <= 0) & (row_of_entry.diff() == 0)
        if bool(unordered.any()):
            row = int(row_of_entry[int(unordered.nonzero()[0])])
            raise FormatError(f"outlier_columns must strictly ascend within a row; row {row} does not")
        if not bool(torch.isfinite(self.values).all()):
            raise FormatError("outlier_values holds values that are not finite")

    def _validate_layout(self, rows: int) -> None:
        if self.values.dtype not in VALUE_DTYPES:
            raise FormatError(f"outlier_values must be bf16, fp16 or fp32; found {self.values.dtype}")
        wanted = {"outlier_columns": (self.columns, torch.int32, [self.nnz])}
        wanted["outlier_row_offsets"] = (self.row_offsets, torch.int64, [rows + 1])
        for name, (tensor, dtype, shape) in wanted.items():
            if tensor.dtype != dtype or list(tensor.shape) != shape:
                raise FormatError(
                    f"{name} must be {dtype} {shape}; found {tensor.dtype} {list(tensor.shape)}"
                )
        first, last = int(self.row_offsets[0]), int(self.row_offsets[-1])
        if (first, last) != (0, self.nnz) or bool((self.row_offsets.diff() < 0).any()):
            raise FormatError(
                f"outlier_row_offsets must rise from 0 to {self.nnz}, the number of values; they run from "
                f"{first} to {last}"
            )

    def row_range(self, start: int, count: int) -> "CsrMatrix":
        """Rows ``start`` to ``start + count - 1``; views."""
        offsets = self.row_offsets[start : start + count + 1]
        low, high = int(offsets[0]), int(offsets[-1])
        return CsrMatrix(self.values[low:high], self.columns[low:high], offsets - low, self.width)

    def column_range(self, start: int, count: int) -> "CsrMatrix":
        """Columns ``start`` to ``start + count - 1``, counted from 0 again."""
        if (start, count) == (0, self.width):
            return self
        inside = (self.columns >= start) & (self.columns < start + count)
        before = torch.zeros(self.nnz + 1, dtype=torch.int64, device=self.columns.device)
        torch.cumsum(inside, 0, out=before[1:])
        return CsrMatrix(self.values[inside], self.columns[inside] - start, before[self.row_offsets], count)

    @staticmethod
    def stack(parts: "list[CsrMatrix]") -> "CsrMatrix":
        """Matrices of the same width, one under the other."""
        offsets, used = [parts[0].row_offsets[:1]], 0
        for part in parts:
            offsets.append(part.row_offsets[1:] + used)
            used += part.nnz
        return CsrMatrix(
            torch.cat([part.values for part in parts]),
            torch.cat([part.columns for part in parts]),
            torch.cat(offsets),
            parts[0].width,
        )
