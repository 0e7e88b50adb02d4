"""Sparse outliers against torch's own CSR tensors."""

import pytest
import torch

from vllm_sparse.errors import FormatError
from vllm_sparse.sparse24 import CsrMatrix


def random_dense(rows: int = 12, width: int = 40, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, width, generator=generator)
    dense[torch.rand(rows, width, generator=generator) < 0.8] = 0
    dense[3] = 0
    return dense


def test_from_dense_is_torchs_csr() -> None:
    dense = random_dense()
    ours, theirs = CsrMatrix.from_dense(dense), dense.to_sparse_csr()
    assert torch.equal(ours.values, theirs.values())
    assert torch.equal(ours.columns.long(), theirs.col_indices())
    assert torch.equal(ours.row_offsets, theirs.crow_indices())
    ours.validate(12)
    assert torch.equal(ours.dense(), dense)


@pytest.mark.parametrize(("row", "rows", "column", "columns"), [(0, 12, 0, 40), (2, 5, 8, 16), (3, 1, 0, 40)])
def test_ranges_are_slices(row: int, rows: int, column: int, columns: int) -> None:
    dense = random_dense()
    part = CsrMatrix.from_dense(dense).row_range(row, rows).column_range(column, columns)
    part.validate(rows)
    assert torch.equal(part.dense(), dense[row : row + rows, column : column + columns])


def test_stack_is_cat() -> None:
    parts = [random_dense(5, 40, 1), torch.zeros(2, 40), random_dense(7, 40, 2)]
    stacked = CsrMatrix.stack([CsrMatrix.from_dense(part) for part in parts])
    stacked.validate(14)
    assert torch.equal(stacked.dense(), torch.cat(parts))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("columns", torch.tensor([0, 0, 1], dtype=torch.int32), "strictly ascend within a row; row 0"),
        ("columns", torch.tensor([0, 8, 1], dtype=torch.int32), "columns 0 to 7"),
        ("columns", torch.tensor([-1, 2, 1], dtype=torch.int32), "holds -1 to 2"),
        ("columns", torch.tensor([0, 2, 1]), "outlier_columns must be torch.int32"),
        ("row_offsets", torch.tensor([0, 2, 4]), "rise from 0 to 3"),
        ("row_offsets", torch.tensor([0, 4, 3]), "rise from 0 to 3"),
        ("row_offsets", torch.tensor([0, 3]), r"must be torch.int64 \[3\]; found torch.int64 \[2\]"),
        ("values", torch.tensor([1.0, float("nan"), 2.0]), "not finite"),
        ("values", torch.tensor([1, 2, 3]), "bf16, fp16 or fp32"),
    ],
)
def test_damage_is_found(field: str, value: torch.Tensor, message: str) -> None:
    tensors = {
        "values": torch.tensor([1.0, 2.0, 3.0]),
        "columns": torch.tensor([0, 5, 1], dtype=torch.int32),
        "row_offsets": torch.tensor([0, 2, 3]),
    }
    CsrMatrix(**tensors, width=8).validate(2)
    with pytest.raises(FormatError, match=message):
        CsrMatrix(**{**tensors, field: value}, width=8).validate(2)
