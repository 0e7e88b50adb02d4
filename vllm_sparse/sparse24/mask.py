"""2:4 masks: of every 4 consecutive weights along the input dimension (K, the last axis), 2 are kept."""

import torch
from torch import Tensor

from vllm_sparse.errors import FormatError

GROUP = 4
KEPT = 2


def _groups(tensor: Tensor) -> Tensor:
    if tensor.ndim < 1 or tensor.shape[-1] % GROUP:
        raise FormatError(
            f"2:4 needs the last dimension (K, the input features) to be a multiple of {GROUP}; "
            f"found shape {list(tensor.shape)}. Keep this layer dense."
        )
    return tensor.reshape(*tensor.shape[:-1], tensor.shape[-1] // GROUP, GROUP)


def magnitude(weight: Tensor) -> Tensor:
    """|weight| in a dtype in which ranking is safe.

    int8 is widened because |-128| overflows, and fp8 is converted because torch cannot rank it and its
    raw bytes rank negatives in reverse.
    """
    if weight.dtype == torch.int8:
        return weight.to(torch.int16).abs()
    if weight.is_floating_point() and weight.element_size() == 1:
        return weight.to(torch.float32).abs()
    return weight.abs()


def nonzero_mask(weight: Tensor) -> Tensor:
    """Bool mask of values that are not zero; -0.0 counts as zero, also in fp8."""
    if weight.is_floating_point() and weight.element_size() == 1:
        return (weight.view(torch.uint8) & 0x7F) != 0
    return weight != 0


def group_nonzeros(weight: Tensor) -> Tensor:
    """Non-zeros in each group of 4: ``[..., K]`` -> ``[..., K/4]`` uint8."""
    return _groups(nonzero_mask(weight)).sum(-1, dtype=torch.uint8)


def is_24(weight: Tensor) -> bool:
    """True if no group of 4 holds more than 2 non-zeros (False, not an error, when K % 4 != 0)."""
    if weight.ndim < 1 or weight.shape[-1] % GROUP:
        return False
    return weight.numel() == 0 or int(group_nonzeros(weight).max()) <= KEPT


def topk_mask(scores: Tensor) -> Tensor:
    """Keep the 2 highest scores of every 4; ties go to the lower column.

    Args:
        scores: ``[..., K]``, higher is more important. NaN is refused.

    Returns:
        Bool mask of the same shape with exactly 2 kept per group.
    """
    grouped = _groups(scores)
    if scores.is_floating_point() and bool(torch.isnan(scores).any()):
        raise FormatError("scores hold NaN: cannot choose a 2:4 mask from them")
    # Rank by pairwise comparison: far faster than topk over rows of 4.
    ahead = grouped.unsqueeze(-2) > grouped.unsqueeze(-1)
    tied = grouped.unsqueeze(-2) == grouped.unsqueeze(-1)
    earlier = torch.ones(GROUP, GROUP, dtype=torch.bool, device=scores.device).tril(-1)
    rank = (ahead | (tied & earlier)).sum(-1, dtype=torch.uint8)
    return (rank < KEPT).reshape(scores.shape)


def short_group_mask(weight: Tensor) -> Tensor:
    """The mask that compressed-tensors stores for a weight that already is 2:4.

    Groups with 2 non-zeros keep those; groups with fewer are filled up with explicit zeros, chosen as
    compressed-tensors' ``topk`` over |weight| chooses them, so that files agree byte for byte.

    Raises:
        FormatError: a group holds more than 2 non-zeros.
    """
    mask = nonzero_mask(weight)
    grouped = _groups(mask)
    counts = grouped.sum(-1, dtype=torch.uint8)
    if weight.numel() and int(counts.max()) > KEPT:
        bad = int((counts > KEPT).sum())
        first = torch.nonzero(counts > KEPT)[0].tolist()
        raise FormatError(
            f"not 2:4: {bad} of {counts.numel()} groups of 4 hold more than 2 non-zeros "
            f"(first at row {first[0]}, columns {first[-1] * GROUP}..{first[-1] * GROUP + 3}). "
            "Prune the weight to 2:4 first, or keep it dense."
        )
    short = counts < KEPT
    if bool(short.any()):
        grouped = grouped.clone()
        kept = _groups(magnitude(weight))[short].topk(KEPT, dim=-1).indices
        grouped[short] = torch.zeros(kept.shape[0], GROUP, dtype=torch.bool, device=weight.device).scatter_(
            1, kept, True
        )
    return grouped.reshape(weight.shape)
