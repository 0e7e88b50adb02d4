"""Transposable 2:4 masks: at most two of four in every row *and* every column of a 4x4 block.

Training multiplies by W in the forward pass and by its transpose in the backward pass; only a mask that is
2:4 both ways makes both products sparse (Hu et al., arXiv:2404.01847). A 4x4 block has exactly 90 masks with
two ones in each row and column. Scoring all of them is one convolution of ``|W|`` with 90 kernels of 4x4 at
stride 4, and the argmax over channels is each block's optimum.
"""

from functools import cache
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from vllm_sparse.errors import FormatError

BLOCK = 4
# Scores of one strip of rows at a time: 90 for every block.
_SCRATCH_SCORES = 1 << 24


@cache
def patterns() -> Tensor:
    """All transposable masks, float32 ``[90, 4, 4]`` of zeros and ones."""
    rows = [bits for bits in product((0.0, 1.0), repeat=BLOCK) if sum(bits) == 2]
    blocks = torch.tensor(list(product(rows, repeat=BLOCK)))
    return blocks[(blocks.sum(1) == 2).all(1)]


@torch.no_grad()
def transposable_mask(weight: Tensor) -> Tensor:
    """The transposable mask that keeps the largest sum of ``|weight|`` in every 4x4 block.

    Args:
        weight: ``[out, in]``, any float dtype.

    Returns:
        Bool ``[out, in]``, two kept in every four consecutive entries of each row and of each column.

    Raises:
        FormatError: a dimension is not a multiple of 4, or the weight holds NaN.
    """
    rows, columns = weight.shape
    if rows % BLOCK or columns % BLOCK:
        raise FormatError(
            f"a transposable 2:4 mask needs both dimensions to be multiples of {BLOCK}; found "
            f"{list(weight.shape)}. Keep this layer dense by adding it to ignore."
        )
    if bool(weight.isnan().any()):
        raise FormatError("the weight holds NaN: cannot choose a transposable mask from it")
    choices = patterns().to(weight.device)
    kernels = choices.unsqueeze(1)
    strip = max(BLOCK, _SCRATCH_SCORES * BLOCK**2 // (len(choices) * columns) // BLOCK * BLOCK)
    mask = torch.empty(rows, columns, dtype=torch.bool, device=weight.device)
    for start in range(0, rows, strip):
        part = weight[start : start + strip].abs().float()
        best = F.conv2d(part[None, None], kernels, stride=BLOCK)[0].argmax(0)
        blocks = choices[best].bool()
        mask[start : start + strip] = blocks.permute(0, 2, 1, 3).reshape(part.shape)
    return mask
