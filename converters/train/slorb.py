"""SLoRB (AST, arXiv:2407.20584): a low-rank branch beside a 2:4 weight, started from what pruning removed.

With blocks of k inputs and rank ``r = in/k``: X ``[r, in]`` pools each block (row i is 1 on its k columns),
S ``[out, r]`` starts as the mean of the pruned weights ``(1 - m) * W`` over a block, zeros of kept places
included, and ``y = x (m * W)^T + (x X^T) S^T``. The branch cannot be merged: that would undo 2:4. On disk it
is ``low_rank_a`` (X, unless it still pools) and ``low_rank_b`` (S) of the ``sparse24`` format.
"""

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from converters.train.recipes import Strict
from vllm_sparse.errors import FormatError
from vllm_sparse.sparse24 import compress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_STORED = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class SlorbRecipe(Strict):
    """The paper's choice is blocks of 16, mean, trained projection."""

    block: Literal[16, 32, 64] = 16
    init: Literal["mean", "sum", "xavier", "zero"] = "mean"
    train_projection: bool = True


class Branch(nn.Module):
    """``(x X^T) S^T``; without X stored, X pools blocks of inputs. X is trained or stays as it is."""

    def __init__(self, projection: Tensor | None, weight: Tensor, train_projection: bool = True) -> None:
        super().__init__()
        self.projection = None if projection is None else nn.Parameter(projection, train_projection)
        self.weight = nn.Parameter(weight)

    def forward(self, inputs: Tensor) -> Tensor:
        """``[..., in]`` -> ``[..., out]``."""
        if self.projection is not None:
            return F.linear(F.linear(inputs, self.projection), self.weight)
        return F.linear(inputs.unflatten(-1, (self.weight.shape[1], -1)).sum(-1), self.weight)


def make_branch(
    weight: Tensor, mask: Tensor, recipe: SlorbRecipe, generator: torch.Generator | None = None
) -> Branch:
    """The branch of a latent weight ``[out, in]`` under keep-mask ``mask``.

    Args:
        weight: latent.
        mask: bool, True where kept.
        recipe: block and initial values.
        generator: on the CPU, for ``init: xavier``.

    Raises:
        FormatError: the block does not divide the input width.
    """
    rows, columns = weight.shape
    if columns % recipe.block:
        raise FormatError(f"slorb.block {recipe.block} does not divide a linear's {columns} input features")
    rank = columns // recipe.block
    lost = torch.where(mask, 0.0, weight.detach().float()).reshape(rows, rank, recipe.block)
    pooling = torch.eye(rank).repeat_interleave(recipe.block, dim=1)
    start = {"mean": lost.mean(-1), "sum": lost.sum(-1)}.get(recipe.init, torch.zeros_like(lost[..., 0]))
    if recipe.init == "xavier":
        nn.init.xavier_uniform_(pooling, generator=generator)
    keep_projection = recipe.train_projection or recipe.init == "xavier"
    projection = pooling.to(weight.device) if keep_projection else None
    return Branch(projection, start, recipe.train_projection)


class BranchLinear(nn.Linear):
    """A finished linear: a 2:4 weight and its branch, named as on disk."""

    low_rank_a: nn.Parameter | None
    low_rank_b: nn.Parameter

    @classmethod
    def of(cls, linear: nn.Linear, branch: Branch) -> "BranchLinear":
        """``linear``'s weight and bias with ``branch`` beside them."""
        new = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        new.weight, new.bias = linear.weight, linear.bias
        new.low_rank_a, new.low_rank_b = branch.projection, branch.weight
        return new

    def forward(self, inputs: Tensor) -> Tensor:
        """``W x + B (A x)``."""
        if self.low_rank_a is not None:
            inner = F.linear(inputs, self.low_rank_a)
        else:
            inner = inputs.unflatten(-1, (self.low_rank_b.shape[1], -1)).sum(-1)
        return F.linear(inputs, self.weight, self.bias) + F.linear(inner, self.low_rank_b)


def branches_of(model: "PreTrainedModel") -> dict[str, BranchLinear]:
    """Linears with a branch, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BranchLinear)}


def pack_branches(
    model: "PreTrainedModel", state: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Any] | None:
    """Pack the 2:4 weights that have branches, in place of ``state``'s dense ones.

    Args:
        model: what ``state`` is of.
        state: its tensors in ``dtype``, changed in place.
        dtype: bfloat16, float16 or float32.

    Returns:
        The ``quantization_config`` of the ``sparse24`` format (version 1), None without branches.
    """
    branches = branches_of(model)
    if not branches:
        return None
    for name in branches:
        weight = state.pop(f"{name}.weight")
        state[f"{name}.compressed"], state[f"{name}.bitmask"] = compress(weight)
        state[f"{name}.shape"] = torch.tensor(weight.shape).reshape(2, 1)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    first = next(iter(branches.values()))
    return {
        "quant_method": "sparse24",
        "format_version": 1,
        "linear": {
            "pattern": "2:4",
            "weights": _STORED[dtype],
            "group_size": None,
            "activations": "none",
            "low_rank": {
                "projection": "pooled" if first.low_rank_a is None else "dense",
                "columns_per_rank": first.in_features // first.low_rank_b.shape[1],
            },
        },
        "ignore": sorted({*linears - branches.keys(), "lm_head"}),
    }
