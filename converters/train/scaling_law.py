"""How the loss of a retrained model falls with its budget: a power law through several finished runs.

CAST (arXiv:2509.25996) reports such a law without a formula that is publicly known. The form here is the
plain one: the excess loss over the dense model, in nats a token, is ``a * D^-b`` for D training tokens, a
straight line in logarithms. LLaMA2-7B's two published points (excess 0.086 at 7.5B tokens, 0.0174 at 40B)
give b = 0.95.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_sparse.errors import FormatError

SCHEMA = "vllm-sparse/scaling-law/1"


@dataclass(frozen=True)
class Point:
    """One finished run.

    Attributes:
        tokens: it was trained on.
        excess: held-out loss over the dense model's, nats a token.
        source: folder it was read from.
    """

    tokens: int
    excess: float
    source: str = ""


@dataclass(frozen=True)
class ScalingLaw:
    """``excess = a * tokens^-b``.

    Attributes:
        a: excess at one token.
        b: exponent.
        residual: root mean square of what the fit leaves, in logarithms of the excess; 0 with two points.
        points: what it was fitted to.
    """

    a: float
    b: float
    residual: float
    points: tuple[Point, ...]

    def excess(self, tokens: float) -> float:
        """Predicted excess loss."""
        return self.a * tokens**-self.b

    def tokens_for(self, excess: float) -> float:
        """Tokens at which the excess is predicted to be that small."""
        return (self.a / excess) ** (1.0 / self.b)

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"schema": SCHEMA, **asdict(self)}


def fit(points: Sequence[Point]) -> ScalingLaw:
    """Least squares on logarithms.

    Raises:
        FormatError: fewer than two budgets, a run that is no worse than dense, or a loss that does not fall.
    """
    if len({point.tokens for point in points}) < 2:
        raise FormatError(
            "a scaling law needs runs of at least two different budgets; found "
            f"{sorted({point.tokens for point in points})} tokens"
        )
    for point in points:
        if not (point.tokens > 0 and point.excess > 0):
            raise FormatError(
                f"{point.source or 'a run'}: excess loss {point.excess:.4g} after {point.tokens} tokens; "
                "both must be positive, a model that matches its dense self is beyond this law"
            )
    x = [math.log(point.tokens) for point in points]
    y = [math.log(point.excess) for point in points]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((u - mean_x) * (v - mean_y) for u, v in zip(x, y, strict=True)) / sum(
        (u - mean_x) ** 2 for u in x
    )
    if slope >= 0:
        raise FormatError(
            "the excess loss does not fall with the budget in these runs, so there is no law to fit; compare "
            "runs of one method, model and data that differ in steps alone"
        )
    intercept = mean_y - slope * mean_x
    left = [v - intercept - slope * u for u, v in zip(x, y, strict=True)]
    residual = math.sqrt(sum(r * r for r in left) / len(left))
    return ScalingLaw(math.exp(intercept), -slope, residual, tuple(sorted(points, key=lambda p: p.tokens)))


def read_points(directories: Sequence[Path]) -> list[Point]:
    """Finished runs from their ``compression.json``.

    Raises:
        FormatError: a folder without one, without both perplexities, or of another method than the first.
    """
    points: list[Point] = []
    method: str | None = None
    for directory in directories:
        path = directory / "compression.json"
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            dense, compressed = report["dense"], report["compressed"]
            tokens = int(report["figures"]["training_tokens"])
            found = str(report["method"])
            excess = float(compressed["nll"]) - float(dense["nll"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FormatError(
                f"{path} is not the report of a finished training run with perplexities before and after: "
                f"{error!r}"
            ) from error
        if method is not None and found != method:
            raise FormatError(
                f"{path} is a run of {found}, the others of {method}; a law is fitted to one method"
            )
        method = found
        points.append(Point(tokens, excess, str(directory)))
    return points
