"""The table in the documentation promises nothing that no test here checks."""

import subprocess
import sys
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: Per feature, what a cell may say and the test that says so too.
COLUMNS = {
    "eager": {"yes": "test_parity.py::test_logprobs_equal_reference"},
    "chunked prefill": {
        "yes": "test_parity.py::test_chunked_prefill_was_needed",
        "no": "test_parity.py::test_latent_attention_prefills_whole",
    },
    "prefix caching": {
        "yes": "test_parity.py::test_prefix_cache_is_hit_and_changes_nothing",
        "no": "test_parity.py::test_latent_attention_prefills_whole",
    },
    "KV size": {"yes": "test_parity.py::test_kv_cache_shrinks_exactly_with_the_heads"},
    "compiled": {"yes": "test_features.py::test_compiled"},
    "4,000 positions": {"yes": "test_parity.py::test_contract"},
    "TP 2": {"yes": "test_ranks.py::test_tensor_parallel"},
    "TP 2 compiled": {"yes": "test_ranks.py::test_tensor_parallel_compiled"},
    "PP 2": {"yes": "test_ranks.py::test_pipeline_parallel_compiled"},
    "LoRA": {
        "yes": "test_features.py::test_lora",
        "attention": "test_features.py::test_lora_on_attention",
        "no": "test_features.py::test_lora_is_refused",
    },
    "n-gram drafts": {"yes": "test_features.py::test_ngram_speculation"},
    "2:4 inside": {"yes": "test_sparse_layers.py::test_contract_of_sparse_linears_and_experts"},
    "int8 2:4 inside": {"yes": "test_sparse_layers.py::test_contract_of_sparse_linears_and_experts"},
    "2:4 compiled": {"yes": "test_sparse_layers.py::test_sparse_linears_compiled"},
    "int8 2:4 compiled": {"yes": "test_sparse_layers.py::test_sparse_linears_compiled"},
}

#: What the test's name must say beside the family.
CASES = {
    "2:4 inside": ("plain",),
    "int8 2:4 inside": ("int8",),
    "2:4 compiled": ("plain",),
    "int8 2:4 compiled": ("int8",),
}


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


def test_every_cell_is_a_test_and_every_test_a_cell() -> None:
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
    assert set(cells.values()) <= {"yes", "no", "attention", ""}
    for (family, column), cell in cells.items():
        for word, test in COLUMNS[column].items():
            wanted = f"tests/models/{test}["
            found = [
                line
                for line in listing
                if line.startswith(wanted)
                and {family, *CASES.get(column, ())} <= set(line[len(wanted) : -1].split("-"))
            ]
            assert bool(found) == (cell == word), (
                f"{family}, {column}: the table says {cell!r}, tests for {word!r} are {found}"
            )
        assert not cell or cell in COLUMNS[column], f"{family}, {column}: no test says {cell!r}"
