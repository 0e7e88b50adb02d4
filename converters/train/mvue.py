"""Unbiased random 2:4 pruning of gradients: the approximate minimum-variance estimator of arXiv:2203.10991.

Magnitude pruning of a gradient is biased, so training with it drifts. Here two of every four entries are
drawn without replacement, each with a chance that grows with its size, and divided by the probability of
being drawn: the mean over draws is the gradient itself, and large entries hardly vary.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from vllm_sparse.sparse24.mask import GROUP

# Added to every magnitude, so that zeros can be drawn and divided by.
_FLOOR = 1.2e-7


def inclusion_probabilities(values: Tensor) -> Tensor:
    """The chance of each entry to be kept; a group's add up to 2.

    With ``a = |x|``, S the group's sum and ``t = a / S``: ``p_i = t_i + a_i * sum_{j != i} t_j / (S - a_j)``.

    Args:
        values: ``[..., groups, 4]``, float32.
    """
    size, others = _sizes(values)
    share = size / size.sum(-1, keepdim=True)
    after = share / others
    return share + size * (after.sum(-1, keepdim=True) - after)


def _sizes(values: Tensor) -> tuple[Tensor, Tensor]:
    """``a``, and for each entry the sum of the other three, without cancellation."""
    size = values.abs() + _FLOOR
    rest = 1.0 - torch.eye(GROUP, device=values.device)
    return size, size @ rest


def _draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Index ``[..., 1]`` drawn in proportion to ``weights`` ``[..., 4]``; zeros are never drawn."""
    edges = weights.cumsum(-1)
    # Rounding must not carry a draw onto the last edge.
    point = uniform.unsqueeze(-1) * (1.0 - 1e-6) * edges[..., -1:]
    return (point >= edges[..., :-1]).sum(-1, keepdim=True)


@torch.no_grad()
def mvue24(values: Tensor, generator: torch.Generator) -> Tensor:
    """Prune to 2:4 along the last dimension, at random and without bias.

    Args:
        values: ``[..., K]``, K a multiple of 4; any float dtype.
        generator: on the same device.

    Returns:
        Same shape and dtype; of every 4 entries two are kept, as ``x / p``.
    """
    grouped = values.float().reshape(*values.shape[:-1], -1, GROUP)
    uniform = torch.rand(2, *grouped.shape[:-1], generator=generator, device=values.device)
    size, _ = _sizes(grouped)
    first = _draw(size, uniform[0])
    second = _draw(size.scatter(-1, first, 0.0), uniform[1])
    kept = torch.zeros_like(grouped, dtype=torch.bool)
    kept.scatter_(-1, first, True).scatter_(-1, second, True)
    scaled = torch.where(kept, grouped / inclusion_probabilities(grouped), 0.0)
    return scaled.reshape(values.shape).to(values.dtype)


def padded(values: Tensor, multiple: int) -> Tensor:
    """Zeros appended to the last dimension up to a multiple."""
    missing = -values.shape[-1] % multiple
    return F.pad(values, (0, missing)) if missing else values
