"""Percentiles, intervals of a mean and paired ratios.

Percentiles are numpy's linear interpolation, the definition ``vllm bench serve`` uses. Intervals of a
ratio come from resampling *pairs* of repeats, because machine drift hits both members of a pair.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

PERCENTILES = (50, 90, 95, 99)
FEWEST_TO_RESAMPLE = 8
"""Fewer repeats get Student's interval: resampled means never leave their range, which then is too short."""
FEWEST_TO_SHOW = 3
"""Two repeats leave Student's t one degree of freedom: 12.7 standard errors to either side say nothing."""
FloatArray = npt.NDArray[np.float64]


def summarise(values: Sequence[float] | FloatArray) -> dict[str, float | int | None]:
    """Mean, spread and percentiles of a sample.

    Args:
        values: Sample in any order, in the unit the result shall have.

    Returns:
        ``mean std min max p50 p90 p95 p99`` and ``n``; all but ``n`` are None for an empty sample.
        A percentile is printed even when the sample is too small to resolve it;
        :func:`unresolved` says which those are.
    """
    data = np.asarray(values, dtype=np.float64)
    names = ["mean", "std", "min", "max", *(f"p{p}" for p in PERCENTILES)]
    if data.size == 0:
        return {**dict.fromkeys(names), "n": 0}
    spread = float(data.std(ddof=1)) if data.size > 1 else 0.0
    numbers = [float(data.mean()), spread, float(data.min()), float(data.max())]
    numbers += [float(value) for value in np.percentile(data, PERCENTILES)]
    return {**dict(zip(names, numbers, strict=True)), "n": int(data.size)}


def unresolved(n: int) -> list[str]:
    """Percentiles that ``n`` values cannot resolve: fewer than one value is expected above them."""
    return [f"p{p}" for p in PERCENTILES if n * (100 - p) < 100]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A point estimate with its 95 % interval; the interval is None when one repeat cannot give one."""

    value: float
    low: float | None
    high: float | None

    def as_json(self) -> dict[str, float | list[float | None]]:
        """The form of the report: ``{"value", "ci95": [lo, hi]}``."""
        return {"value": self.value, "ci95": [self.low, self.high]}


def mean_interval(values: Sequence[float], *, seed: int = 0, resamples: int = 10_000) -> Estimate:
    """Mean of independent repeats with its 95 % interval.

    From eight repeats on a bootstrap. Its plain percentiles are too narrow for a handful of repeats, so they
    are moved out until, for normal data, the interval is as wide as Student's (the "expanded percentile
    interval", T. Hesterberg, "What Teachers Should Know About the Bootstrap", 2015, section 5.3). Of fewer
    repeats Student's interval itself.
    """
    data = np.asarray(values, dtype=np.float64)
    mean = float(data.mean())
    if data.size < 2:
        return Estimate(mean, None, None)
    quantile = student_quantile(0.975, data.size - 1)
    if data.size < FEWEST_TO_RESAMPLE:
        half = quantile * float(data.std(ddof=1)) / math.sqrt(data.size)
        return Estimate(mean, mean - half, mean + half)
    rng = np.random.default_rng(seed)
    means = data[rng.integers(0, data.size, size=(resamples, data.size))].mean(axis=1)
    tail = NormalDist().cdf(-math.sqrt(data.size / (data.size - 1)) * quantile)
    low, high = np.quantile(means, [tail, 1 - tail])
    return Estimate(mean, float(low), float(high))


def paired_ratio(
    dense: Sequence[float], compressed: Sequence[float], *, lower_is_better: bool, seed: int = 0
) -> Estimate:
    """How much better the compressed model is, from paired repeats; above 1 means better.

    Args:
        dense: One positive figure per repeat.
        compressed: The figures of the same repeats, same order.
        lower_is_better: True for latencies (dense / compressed), False for throughputs.
        seed: Seed of the resampling.

    Returns:
        Geometric mean of the per-repeat ratios; the interval is that of the mean of their logarithms.
    """
    a = np.asarray(dense, dtype=np.float64)
    b = np.asarray(compressed, dtype=np.float64)
    logs = np.log(a / b) if lower_is_better else np.log(b / a)
    estimate = mean_interval(logs.tolist(), seed=seed)
    return Estimate(
        math.exp(estimate.value),
        None if estimate.low is None else math.exp(estimate.low),
        None if estimate.high is None else math.exp(estimate.high),
    )


@cache
def student_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t distribution, by bisection on its integrated density."""
    low, high = 0.0, 1000.0
    for _ in range(80):
        middle = (low + high) / 2
        if 0.5 + _student_half_mass(middle, degrees) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _student_half_mass(upper: float, degrees: int) -> float:
    """Integral of the density from 0 to ``upper``: substitution t = sqrt(v) tan(u), Simpson's rule."""
    angle = np.linspace(0.0, math.atan(upper / math.sqrt(degrees)), 2001)
    heights = np.cos(angle) ** (degrees - 1)
    step = angle[1] - angle[0]
    integral = step / 3 * (heights[0] + heights[-1] + 4 * heights[1:-1:2].sum() + 2 * heights[2:-1:2].sum())
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(math.pi)
    return float(scale * integral)


def flatten(summary: Mapping[str, object], prefix: str = "") -> dict[str, float]:
    """Numbers of a nested metrics mapping under dotted names, for CSV and for ratios."""
    flat: dict[str, float] = {}
    for key, value in summary.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[prefix + key] = float(value)
    return flat
