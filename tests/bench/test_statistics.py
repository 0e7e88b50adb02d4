import math

import numpy as np
import pytest

from bench.statistics import flatten, mean_interval, paired_ratio, student_quantile, summarise, unresolved


def test_percentiles_are_numpys_linear_ones() -> None:
    values = np.random.default_rng(0).exponential(size=137)
    summary = summarise(values)
    for p in (50, 90, 95, 99):
        assert summary[f"p{p}"] == pytest.approx(np.percentile(values, p), rel=1e-12)
    assert summary["n"] == 137
    assert summary["std"] == pytest.approx(values.std(ddof=1))


def test_nothing_measured_is_null_not_zero() -> None:
    summary = summarise([])
    assert summary["p50"] is None
    assert summary["mean"] is None
    assert summary["n"] == 0


@pytest.mark.parametrize(("n", "names"), [(1, ["p50", "p90", "p95", "p99"]), (20, ["p99"]), (100, [])])
def test_percentiles_from_too_few_values_are_named(n: int, names: list[str]) -> None:
    assert unresolved(n) == names


@pytest.mark.parametrize(
    ("degrees", "table"), [(1, 12.7062), (2, 4.3027), (4, 2.7764), (9, 2.2622), (30, 2.0423)]
)
def test_student_quantiles_match_tables(degrees: int, table: float) -> None:
    assert student_quantile(0.975, degrees) == pytest.approx(table, abs=2e-4)


@pytest.mark.parametrize("n", [2, 3, 5, 8, 12])
def test_interval_of_normal_repeats_covers_the_truth(n: int) -> None:
    rng = np.random.default_rng(n)
    hits = 0
    for trial in range(400):
        estimate = mean_interval(rng.normal(10, 1, size=n).tolist(), seed=trial, resamples=2000)
        hits += estimate.low <= 10 <= estimate.high
    # Nominal 95 %; the standard error of these trials is 1.1 %.
    assert hits / 400 > 0.91


def test_one_repeat_has_no_interval() -> None:
    estimate = mean_interval([3.0])
    assert (estimate.value, estimate.low, estimate.high) == (3.0, None, None)
    assert estimate.as_json() == {"value": 3.0, "ci95": [None, None]}


def test_ratio_above_one_means_compressed_is_better() -> None:
    latency = paired_ratio([20, 22, 18], [10, 11, 9], lower_is_better=True)
    throughput = paired_ratio([100, 110, 90], [200, 220, 180], lower_is_better=False)
    for estimate in (latency, throughput):
        assert estimate.value == pytest.approx(2)
        # The drift between repeats cancels within the pairs.
        assert estimate.low == pytest.approx(2)
        assert estimate.high == pytest.approx(2)


def test_ratio_interval_holds_the_noise_between_pairs() -> None:
    estimate = paired_ratio([10, 10, 10], [10, 8, 12.5], lower_is_better=True)
    assert estimate.value == pytest.approx(1)
    # 4.303 standard errors of three logarithms, 0 and +-ln(1.25), on either side.
    half = 4.3027 * math.log(1.25) / math.sqrt(3)
    assert math.log(estimate.high) == pytest.approx(half, rel=1e-3)
    assert math.log(estimate.low) == pytest.approx(-half, rel=1e-3)


def test_flatten_names_nested_numbers() -> None:
    assert flatten({"a": {"b": 1, "c": None, "d": "x", "e": True}, "f": 2.5}) == {"a.b": 1.0, "f": 2.5}
    assert math.isfinite(sum(flatten({"x": 1}).values()))
