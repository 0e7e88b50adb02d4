"""A bounded number of fuzzed checkpoints in every run of the tests; `make fuzz` runs 10,000."""

from pathlib import Path

import numpy as np
import pytest

from tests.fuzz import reference
from tests.fuzz.run import Fuzzer, difference

CASES = 400
# Numbers of cases that once broke a promise, with the seed they belong to.
REGRESSIONS = [int(line) for line in (Path(__file__).parent / "regressions.txt").read_text().split()]


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory) -> Fuzzer:
    return Fuzzer(tmp_path_factory.mktemp("fuzz"))


def test_the_second_reader_agrees_on_whole_checkpoints(fuzzer):
    for path in fuzzer.corpus:
        form, numbers = fuzzer.original[path]
        if not form.endswith("marlin-24"):
            assert difference(numbers, reference.read(path, form)) is None, path.name


def test_the_comparison_can_fail():
    one, two = {"a": np.zeros((2, 2))}, {"a": np.ones((2, 2))}
    assert difference(one, two) == "values of a"
    assert difference(one, {"b": one["a"]}) is not None
    assert difference(one, {"a": np.zeros((4,))}) is not None


def test_broken_checkpoints_are_refused_or_read_right(fuzzer):
    for number in [*REGRESSIONS, *range(CASES)]:
        fuzzer.case(number)
    result = fuzzer.result
    assert result.problems == []
    assert result.refused > CASES / 4
    assert result.loaded > CASES / 20
