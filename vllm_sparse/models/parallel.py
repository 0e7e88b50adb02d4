"""Checks of layer shapes against how the model is to be served: ranks, stages, attention kernels."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from vllm_sparse.errors import UnsupportedError
from vllm_sparse.models.layer_config import AttentionShape, FfnShape, LayerShape, ModelShape, MoeShape


def check_head_dims(shape: ModelShape, allowed: Collection[int], backend: str) -> None:
    """Refuse a head dimension that the attention backend has no kernel for.

    Raises:
        UnsupportedError: Names the first such layer and the dimensions that work.
    """
    for index, attention in shape.attention_layers():
        if attention.head_dim not in allowed:
            raise UnsupportedError(
                f"config.json: layer {index}: head_dim {attention.head_dim} has no kernel in {backend}. "
                f"Allowed: {', '.join(map(str, sorted(allowed)))}. Prune whole heads instead of their "
                "dimensions, or zero-pad the heads to the next allowed size."
            )


def check_tensor_parallel(shape: ModelShape, ranks: int, expert_parallel: bool = False) -> None:
    """Refuse shapes that do not split over ``ranks`` tensor-parallel ranks.

    Heads and widths must divide by the ranks; KV heads must divide by them or divide them (then
    they are replicated); a layer needs at least as many experts as there are ranks, and expert
    widths must divide unless whole experts are spread over the ranks (``expert_parallel``).

    Raises:
        UnsupportedError: Names the first such layer and the nearest sizes that work.
    """
    if ranks <= 1:
        return
    for layer in shape.layers:
        if layer.attention is not None:
            _check_heads(layer, layer.attention, ranks)
        if isinstance(layer.ffn, FfnShape):
            _check_multiple(layer.index, "the feed-forward width", layer.ffn.intermediate_size, ranks)
        elif isinstance(layer.ffn, MoeShape):
            _check_experts(layer.index, layer.ffn, ranks, expert_parallel)


def check_pipeline(shape: ModelShape, stages: Sequence[tuple[int, int]]) -> None:
    """Refuse a pipeline stage none of whose layers has attention: it could hold no KV cache.

    Args:
        shape: The model.
        stages: Half-open layer range of every stage.

    Raises:
        UnsupportedError: Names the stage and what to do.
    """
    if len(stages) <= 1:
        return
    for stage, (start, end) in enumerate(stages):
        if all(layer.attention is None for layer in shape.layers[start:end]):
            raise UnsupportedError(
                f"pipeline stage {stage} holds layers {start} to {end - 1}, none of which has attention, so "
                "it could hold no KV cache. Use fewer stages, or move the cut with VLLM_PP_LAYER_PARTITION."
            )


def _check_heads(layer: LayerShape, attention: AttentionShape, ranks: int) -> None:
    _check_multiple(layer.index, "the number of query heads", attention.num_heads, ranks)
    kv_heads = attention.num_kv_heads
    if kv_heads % ranks and ranks % kv_heads:
        fits = [n for n in range(1, kv_heads + ranks + 1) if n % ranks == 0 or ranks % n == 0]
        _refuse(layer.index, "the number of KV heads", kv_heads, ranks, fits)


def _check_experts(index: int, moe: MoeShape, ranks: int, expert_parallel: bool) -> None:
    if moe.num_experts < ranks:
        _refuse(index, "the number of experts", moe.num_experts, ranks, [ranks])
    if not expert_parallel:
        _check_multiple(index, "the expert width", moe.intermediate_size, ranks)
    if moe.shared_width:
        _check_multiple(index, "the shared experts' width", moe.shared_width, ranks)


def _check_multiple(index: int, what: str, value: int, ranks: int) -> None:
    if value % ranks:
        below = value // ranks * ranks
        _refuse(index, what, value, ranks, [n for n in (below, below + ranks) if n > 0])


def _refuse(index: int, what: str, value: int, ranks: int, fits: Sequence[int]) -> None:
    nearest = sorted(sorted(fits, key=lambda n: abs(n - value))[:2])
    raise UnsupportedError(
        f"config.json: layer {index}: {what} is {value}, which does not split over "
        f"--tensor-parallel-size {ranks}. Nearest that works: {' or '.join(map(str, nearest))}. "
        "Serve with fewer ranks, or convert again with --align to round the widths."
    )
