"""Static low-rank branches beside a packed weight: ``y = W x + B (A x)`` (AST's SLoRB, docs/format.md).

With ``pooled`` projection row *i* of A is 1 on its block of columns, so ``A x`` is a sum over blocks and A is
not stored. With ``dense`` projection every fused part has an A of its own.

Layers are typed ``Any``: they are vLLM modules, and the branch lives on them as parameters.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.parameter import BasevLLMParameter, ModelWeightParameter

from vllm_sparse.quantization.scheme import LowRank
from vllm_sparse.quantization.spec import Projection


class _ProjectionParameter(BasevLLMParameter):
    """A of every fused part, ``[parts, rank, k]``: whole for column splits, columns for row splits."""

    def load_column_parallel_weight(self, loaded_weight: Tensor) -> None:
        """The only part."""
        self.data[0].copy_(loaded_weight)

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        """This rank's columns, and of those only its ranks' rows when the input is split."""
        width = self.data.shape[2]
        self.data[0].copy_(loaded_weight.narrow(1, self.tp_rank * width, width))

    def load_merged_column_weight(self, loaded_weight: Tensor, **kwargs: Any) -> None:
        """One part of gate and up."""
        self.data[self._shard_id_as_int(kwargs["shard_id"])].copy_(loaded_weight)

    def load_qkv_weight(self, loaded_weight: Tensor, **kwargs: Any) -> None:
        """One of q, k, v."""
        self.data[self._shard_id_as_int(kwargs["shard_id"])].copy_(loaded_weight)


def create_weights(
    layer: Any, branch: LowRank, k: int, input_size: int, parts: list[int], dtype: torch.dtype, loader: Any
) -> None:
    """Register ``low_rank_b`` (and ``low_rank_a``).

    Args:
        layer: the linear module.
        branch: projection and columns per rank.
        k: this rank's input features.
        input_size: input features over all ranks.
        parts: output features of each fused part, on this rank.
        dtype: of the branch.
        loader: vLLM's weight loader.
    """
    layer.low_rank = branch
    pooled = branch.projection is Projection.POOLED
    # Pooled blocks split with the input; a dense projection keeps its full rank on every rank.
    rank = (k if pooled else input_size) // branch.columns_per_rank
    b = torch.zeros(sum(parts), rank, dtype=dtype)
    layer.register_parameter("low_rank_b", _b_parameter(b, pooled, loader))
    if not pooled:
        a = torch.zeros(len(parts), rank, k, dtype=dtype)
        layer.register_parameter("low_rank_a", _ProjectionParameter(data=a, weight_loader=loader))


class _WholeRankParameter(ModelWeightParameter):
    """B of a dense projection, which row-parallel layers hold whole: only A is split with the input."""

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        """All columns: ``sum over ranks of B (A_rank x_rank) = B (A x)``."""
        self.data.copy_(loaded_weight)


def _b_parameter(data: Tensor, pooled: bool, loader: Any) -> Parameter:
    kind = ModelWeightParameter if pooled else _WholeRankParameter
    return kind(data=data, input_dim=1, output_dim=0, weight_loader=loader)


def resident_bytes(layer: Any) -> int:
    """Bytes of the branch."""
    a = getattr(layer, "low_rank_a", None)
    return int(layer.low_rank_b.nbytes + (0 if a is None else a.nbytes))


def add(layer: Any, out: Tensor, x: Tensor) -> Tensor:
    """``out + B (A x)``, fused parts side by side.

    The branch can be the larger summand, so it is added inside the product's float32 sums: the result is
    rounded to 16 bits once, as that of one merged matrix is.

    Args:
        layer: the linear module.
        out: ``[..., n]``, the output without the branch.
        x: ``[..., k]``.
    """
    branch: LowRank = layer.low_rank
    rows, inputs = out.reshape(-1, out.shape[-1]), x.reshape(-1, x.shape[-1])
    if branch.projection is Projection.POOLED:
        total = _add_pooled(layer.low_rank_b, branch.columns_per_rank, rows, inputs)
    else:
        widths = layer.logical_widths
        parts = zip(layer.low_rank_a.unbind(0), layer.low_rank_b.split(widths), strict=True)
        total = torch.cat(
            [
                torch.addmm(part, torch.nn.functional.linear(inputs, a), b.T)
                for part, (a, b) in zip(rows.split(widths, dim=-1), parts, strict=True)
            ],
            dim=-1,
        )
    return total.reshape(out.shape)


def _add_pooled(b: Tensor, columns: int, rows: Tensor, inputs: Tensor) -> Tensor:
    """Sums over blocks have more bits than their terms; in 16 bits their remainders get a product too."""
    pooled = inputs.unflatten(-1, (-1, columns)).sum(-1, dtype=torch.float32)
    rounded = pooled.to(inputs.dtype)
    if inputs.dtype != torch.float32:
        rows = torch.addmm(rows, (pooled - rounded).to(inputs.dtype), b.T)
    return torch.addmm(rows, rounded, b.T)
