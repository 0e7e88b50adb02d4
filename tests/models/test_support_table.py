"""The table in the documentation promises nothing that no test here checks."""

import subprocess
import sys
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).parents[2]
COLUMNS = {
    "eager": "test_parity.py::test_logprobs_equal_reference",
    "chunked prefill": "test_parity.py::test_chunked_prefill_was_needed",
    "prefix caching": "test_parity.py::test_prefix_cache_is_hit_and_changes_nothing",
    "KV size": "test_parity.py::test_kv_cache_shrinks_exactly_with_the_heads",
    "compiled": "test_features.py::test_compiled",
    "4,000 positions": "test_parity.py::test_contract",
    "TP 2": "test_ranks.py::test_tensor_parallel",
    "TP 2 compiled": "test_ranks.py::test_tensor_parallel_compiled",
    "PP 2": "test_ranks.py::test_pipeline_parallel_compiled",
    "LoRA": "test_features.py::test_lora",
    "n-gram drafts": "test_features.py::test_ngram_speculation",
    "2:4 inside": "test_sparse_layers.py::test_contract_of_sparse_linears_and_experts",
    "int8 2:4 inside": "test_sparse_layers.py::test_contract_of_sparse_linears_and_experts",
}

#: What the test's name must say beside the family.
CASES = {"2:4 inside": ("plain",), "int8 2:4 inside": ("int8",)}


def table() -> dict[tuple[str, str], str]:
    """(family, feature) to the cell's text."""
    lines = (ROOT / "docs" / "structured.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| family | eager |"))
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in takewhile(lambda line: line.startswith("|"), lines[start:])
    ]
    header = rows[0]
    return {
        (row[0], column): cell for row in rows[2:] for column, cell in zip(header[1:], row[1:], strict=True)
    }


def test_every_yes_is_a_test_and_every_test_a_yes() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-m",
        "e2e",
        str(Path(__file__).parent),
    ]
    listing = subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    cells = table()
    assert {column for _, column in cells} == set(COLUMNS)
    for (family, column), cell in cells.items():
        wanted = f"tests/models/{COLUMNS[column]}["
        found = [
            line
            for line in listing
            if line.startswith(wanted)
            and {family, *CASES.get(column, ())} <= set(line[len(wanted) : -1].split("-"))
        ]
        assert bool(found) == (cell == "yes"), (
            f"{family}, {column}: the table says {cell!r}, tests are {found}"
        )
