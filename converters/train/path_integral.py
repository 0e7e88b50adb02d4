"""The path-integral score of a weight change (PQI, arXiv:2503.01901).

Taylor terms at w mispredict by orders of magnitude what quantising w to w~ does to the loss F. Along the
straight line between them the prediction is exact:

    F(w~) - F(w) = integral_0^1 <grad F(w + t d), d> dt,     d = w~ - w,

so weight i answers for ``d_i * mean_j dF/dw_i(w + t_j d)`` and its score is the absolute value of that. The
paper takes the right ends ``t_j = j/N``, which converge as 1/N; the mid-points ``(j - 1/2)/N`` converge as
1/N^2.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Rule = Literal["midpoint", "right"]


def quadrature(points: int, rule: Rule) -> list[float]:
    """Places t in (0, 1] at which gradients are taken."""
    shift = 0.5 if rule == "midpoint" else 0.0
    return [(j - shift) / points for j in range(1, points + 1)]


def path_integral(
    parameters: Sequence[nn.Parameter],
    changes: Sequence[Tensor],
    backward: Callable[[], None],
    points: int,
    rule: Rule,
    on_point: Callable[[int], object] | None = None,
) -> list[Tensor]:
    """Signed contributions of every weight; they add up to ``F(w + d) - F(w)``.

    Args:
        parameters: hold w; they hold it again afterwards, and no gradient.
        changes: d, like the parameters.
        backward: accumulates the gradient of F where the parameters are now.
        points: N.
        rule: where on the path.
        on_point: called with the points done.

    Returns:
        ``d_i`` times the mean gradient on the path; the scores are the absolute values.
    """
    start = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        for done, t in enumerate(quadrature(points, rule), 1):
            with torch.no_grad():
                for parameter, first, change in zip(parameters, start, changes, strict=True):
                    parameter.copy_(first).add_(change, alpha=t)
            backward()
            if on_point is not None:
                on_point(done)
        return [
            change * (0.0 if parameter.grad is None else parameter.grad / points)
            for parameter, change in zip(parameters, changes, strict=True)
        ]
    finally:
        with torch.no_grad():
            for parameter, first in zip(parameters, start, strict=True):
                parameter.copy_(first)
                parameter.grad = None
