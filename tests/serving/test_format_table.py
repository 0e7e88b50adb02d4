"""The table of formats in the documentation says what the tests show, cell by cell."""

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from tests.serving.foreign import FORMATS

ROOT = Path(__file__).parents[2]
COLUMNS = ("reads", "serves", "TP 2", "MoE", "writes")
Row = tuple[str, str]
SERVING = "tests/serving/test_formats.py"
GOLDEN = "tests/converters/test_golden_compressed_tensors.py"
TRAINED = "tests/converters/test_pickles_and_trained.py"
CONVERTED_FIRST = "tests/serving/test_converted.py"
OWN, RANKS = "tests/serving/test_sparse24_format.py", "tests/serving/test_parallel.py"
BY_LIBRARY: dict[str, tuple[str, Iterable[str]]] = {
    "reads": (f"{SERVING}::test_reads", FORMATS),
    "serves": (f"{SERVING}::test_serves", FORMATS),
    "TP 2": (f"{RANKS}::test_formats_over_two_ranks", FORMATS),
    "MoE": (f"{SERVING}::test_moe", FORMATS),
    "writes": (f"{SERVING}::test_writes", FORMATS),
}
PROOFS: dict[tuple[Row, str], str] = {
    (("sparse-24-bitmask", stored), column): f"{test}[{stored}]"
    for column, (test, shown) in BY_LIBRARY.items()
    for stored in shown
}
OTHERS = {
    ("dense with zeros", "bf16"): {
        "reads": "tests/converters/test_inspect_verify.py::test_inspect_dense_with_zeros",
        "serves": "tests/serving/test_serving.py::test_dense_with_zeros_is_packed_from_its_data",
        "TP 2": f"{RANKS}::test_dense_with_zeros_over_two_ranks",
        "MoE": "tests/serving/test_experts.py::test_dense_experts_with_zeros_are_packed_or_fall_back_loudly",
        "writes": f"{SERVING}::test_reads[bf16]",
    },
    ("sparse24", "int4"): {
        "reads": f"{GOLDEN}::test_marlin_24_is_converted_exactly[128-4]",
        "serves": f"{OWN}::test_int4_groups_answer_as_the_dequantised_twin",
        "TP 2": f"{RANKS}::test_int4_groups_over_two_ranks",
        "MoE": f"{CONVERTED_FIRST}::test_int4_experts",
        "writes": "tests/converters/test_readers_bitmask24.py::test_quantised_weights[int4-7]",
    },
    ("sparse24", "low-rank"): {
        "reads": f"{TRAINED}::test_low_rank_branches_keep_their_bits[dtype0]",
        "serves": f"{OWN}::test_low_rank_branches_answer_as_the_merged_twin[pooled]",
        "TP 2": f"{RANKS}::test_outliers_and_low_rank_over_two_ranks[dense]",
        "writes": f"{TRAINED}::test_ast_slorb_becomes_a_low_rank_branch[True]",
    },
    ("sparse24", "outliers"): {
        "reads": "tests/converters/test_outliers.py::test_reads_sparse24_outliers",
        "serves": f"{OWN}::test_outliers_answer_as_the_merged_twin[False]",
        "TP 2": f"{RANKS}::test_outliers_and_low_rank_over_two_ranks[dense]",
        "writes": "tests/converters/test_outliers.py::test_writes_sparse24_outliers_and_static_scales",
    },
    ("marlin-24", "int4"): {"reads": f"{GOLDEN}::test_marlin_24_is_inverted_exactly[128-4]"},
    ("marlin-24", "int8"): {"reads": f"{GOLDEN}::test_marlin_24_is_inverted_exactly[None-8]"},
    ("sparse-bitmask", "bf16"): {"reads": f"{GOLDEN}::test_their_sparse_bitmask_is_read_exactly[bf16]"},
}
OTHERS |= {
    row: {
        **OTHERS[row],
        "serves": f"{CONVERTED_FIRST}::test_serves[{'-'.join(row)}]",
        "TP 2": f"{RANKS}::test_converted_formats_over_two_ranks[{'-'.join(row)}]",
        "MoE": f"{CONVERTED_FIRST}::test_moe[{'-'.join(row)}]",
    }
    for row in (("marlin-24", "int4"), ("marlin-24", "int8"), ("sparse-bitmask", "bf16"))
}
PROOFS |= {(row, column): test for row, tests in OTHERS.items() for column, test in tests.items()}
BESIDE = "tests/serving/test_experts.py::test_what_experts_cannot_have_beside_them_is_refused"
READ_ONLY = "tests/converters/test_convert.py::test_formats_that_are_only_read_are_no_destination"
REFUSALS: dict[tuple[Row, str], str] = {
    (("sparse24", "low-rank"), "MoE"): f"{BESIDE}[low-rank]",
    (("sparse24", "outliers"), "MoE"): f"{BESIDE}[outliers]",
    (("marlin-24", "int4"), "writes"): f"{READ_ONLY}[marlin-24]",
    (("marlin-24", "int8"), "writes"): f"{READ_ONLY}[marlin-24]",
    (("sparse-bitmask", "bf16"), "writes"): f"{READ_ONLY}[sparse-bitmask]",
}


def table() -> dict[tuple[Row, str], str]:
    """((format, stored as), column) to the cell's text."""
    lines = (ROOT / "docs" / "serving.md").read_text().splitlines()
    start = lines.index(f"| format | stored as | {' | '.join(COLUMNS)} |")
    cells = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        fmt, stored, *rest = (cell.strip(" `") for cell in line.strip("|").split("|"))
        cells |= {((fmt, stored), column): cell for column, cell in zip(COLUMNS, rest, strict=True)}
    return cells


def test_every_cell_is_a_test_and_every_test_a_cell() -> None:
    named = {*PROOFS.values(), *REFUSALS.values()}
    files = sorted({test.partition("::")[0] for test in named})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *files]
    listing = subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert sorted(named - set(listing)) == []
    cells = table()
    assert {key for key, cell in cells.items() if cell == "yes"} == set(PROOFS)
    assert {key for key, cell in cells.items() if cell == "no"} == set(REFUSALS)
    assert set(cells.values()) == {"yes", "no"}
