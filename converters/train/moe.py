"""Mixture-of-experts models: where the experts are, what they see, cutting them, and their ``config.json``.

Qwen3-MoE as transformers has it: ``mlp.experts`` holds all experts of a layer in two tensors,
``gate_up_proj [experts, 2 * width, hidden]`` and ``down_proj [experts, hidden, width]``, and is called with
the tokens, the experts each takes and their weights; ``mlp.gate`` is the router.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from converters.train.progress import RunProgress
from converters.train.structured import read_layer_shapes, reshape_attention, reshape_ffn
from vllm_sparse.errors import UnsupportedError
from vllm_sparse.models.families import FAMILIES
from vllm_sparse.models.layer_config import ACCESS_FLAG, MoeShape, read_model_shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOE_FAMILIES = ("qwen3_moe",)


@dataclass(frozen=True)
class MoeLayer:
    """One layer with experts.

    Attributes:
        index: its number.
        block: the module that routes and mixes.
    """

    index: int
    block: Any

    @property
    def experts(self) -> Any:
        """The module that holds all experts."""
        return self.block.experts

    @property
    def count(self) -> int:
        """Experts."""
        return self.experts.gate_up_proj.shape[0]

    @property
    def width(self) -> int:
        """Channels of one expert."""
        return self.experts.down_proj.shape[2]


def moe_layers(model: Any, config: dict[str, Any]) -> list[MoeLayer]:
    """Layers with experts.

    Raises:
        UnsupportedError: another family, or a model without experts.
    """
    family = config.get("model_type")
    if family not in MOE_FAMILIES:
        raise UnsupportedError(
            f"models of type {family!r} have no experts that are known here; known: {', '.join(MOE_FAMILIES)}"
        )
    found = [
        MoeLayer(index, layer.mlp)
        for index, layer in enumerate(model.model.layers)
        if hasattr(layer.mlp, "experts")
    ]
    if not found:
        raise UnsupportedError(
            "every layer of this model is dense (mlp_only_layers); it has no experts to prune"
        )
    return found


@dataclass(frozen=True)
class Routed:
    """What one expert is given in one call.

    Attributes:
        expert: its number.
        tokens: rows of the call's hidden states, ``[routed]``.
        inputs: their hidden states, ``[routed, hidden]``.
        weights: the router's, as they multiply the output, ``[routed]``.
    """

    expert: int
    tokens: Tensor
    inputs: Tensor
    weights: Tensor


def routed(hidden: Tensor, chosen: Tensor, weights: Tensor) -> Iterator[Routed]:
    """The experts that a call reaches.

    Args:
        hidden: ``[tokens, hidden]``.
        chosen: expert numbers, ``[tokens, top_k]``.
        weights: ``[tokens, top_k]``.
    """
    for expert in chosen.unique().tolist():
        tokens, place = torch.where(chosen == expert)
        yield Routed(expert, tokens, hidden[tokens], weights[tokens, place])


def activations(experts: Any, expert: int, inputs: Tensor) -> Tensor:
    """``act(gate x) * (up x)`` of one expert, ``[routed, width]``."""
    gate, up = F.linear(inputs, experts.gate_up_proj[expert]).chunk(2, dim=-1)
    return experts.act_fn(gate) * up


Observer = Callable[[MoeLayer, Routed], None]


@torch.no_grad()
def observe(
    model: "PreTrainedModel",
    layers: Sequence[MoeLayer],
    sequences: Tensor,
    observer: Observer,
    title: str,
    quiet: bool,
) -> None:
    """Run sequences ``[samples, sequence]`` through the model as it is and show every expert's share."""

    def hook(layer: MoeLayer) -> Any:
        def show(_: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> None:
            for part in routed(*args):
                observer(layer, part)

        return layer.experts.register_forward_pre_hook(show)

    handles = [hook(layer) for layer in layers]
    device = next(model.parameters()).device
    try:
        with RunProgress(title, len(sequences), quiet=quiet) as progress:
            for done, sample in enumerate(sequences.split(1), 1):
                model(input_ids=sample.long().to(device), use_cache=False)
                progress.update(done)
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def keep_experts(layer: MoeLayer, kept: Tensor) -> None:
    """Slice experts and router to ``kept`` (int64, ascending), in place."""
    experts, router = layer.experts, layer.block.gate
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj[kept].contiguous())
    experts.down_proj = nn.Parameter(experts.down_proj[kept].contiguous())
    router.weight = nn.Parameter(router.weight[kept].contiguous())
    experts.num_experts = router.num_experts = len(kept)


@torch.no_grad()
def keep_channels(layer: MoeLayer, kept: Tensor, live: Tensor) -> None:
    """Slice every expert to its own channels, in place.

    Args:
        layer: to slice.
        kept: int64 ``[experts, width]``, ascending.
        live: bool of the same shape; the others become zero, to fill narrower experts up.
    """
    experts = layer.experts
    hidden, width = experts.down_proj.shape[1:]
    rows = kept.unsqueeze(-1).expand(-1, -1, hidden)
    parts = [
        experts.gate_up_proj[:, start : start + width].gather(1, rows) * live.unsqueeze(-1)
        for start in (0, width)
    ]
    columns = kept.unsqueeze(1).expand(-1, hidden, -1)
    down = experts.down_proj.gather(2, columns) * live.unsqueeze(1)
    experts.gate_up_proj = nn.Parameter(torch.cat(parts, dim=1))
    experts.down_proj = nn.Parameter(down.contiguous())
    experts.intermediate_dim = kept.shape[1]


def with_experts(config: dict[str, Any], count: int) -> dict[str, Any]:
    """``config.json`` of a model with ``count`` experts in every layer that has them."""
    keys = [key for key in ("num_experts", "num_local_experts") if key in config] or ["num_experts"]
    return {**config, **dict.fromkeys(keys, count)}


def with_widths(config: dict[str, Any], widths: dict[int, int]) -> dict[str, Any]:
    """``config.json`` of a model whose layers' experts have these widths (layer index to channels)."""
    if len(set(widths.values())) == 1 and not config.get("per_layer_config"):
        return {**config, "moe_intermediate_size": next(iter(widths.values()))}
    family = FAMILIES[config["model_type"]]
    entries = {key: dict(value) for key, value in (config.get("per_layer_config") or {}).items()}
    for index, width in widths.items():
        if width != config["moe_intermediate_size"]:
            entries.setdefault(str(index), {})["moe_intermediate_size"] = width
        else:
            entries.get(str(index), {}).pop("moe_intermediate_size", None)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return {
        **config,
        "architectures": [family.architecture],
        "head_dim": head_dim,
        "per_layer_config": entries,
        ACCESS_FLAG: True,
    }


def structured_moe_class(stock: type["PreTrainedModel"], config: dict[str, Any]) -> type["PreTrainedModel"]:
    """A subclass of a transformers MoE class whose layers have the shapes of a raw ``config.json``."""
    ffns = [layer.ffn for layer in read_model_shape(config).layers]
    shapes = read_layer_shapes(config)

    class StructuredMoe(stock):  # type: ignore[valid-type,misc]
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            for layer, ffn, shape in zip(self.model.layers, ffns, shapes, strict=True):
                reshape_attention(layer, shape, config.head_dim)
                if isinstance(ffn, MoeShape):
                    _reshape_experts(layer.mlp, ffn)
                else:
                    reshape_ffn(layer, shape)

    return StructuredMoe


def _reshape_experts(block: Any, shape: MoeShape) -> None:
    experts, router = block.experts, block.gate
    old = experts.down_proj
    hidden = old.shape[1]
    experts.gate_up_proj = nn.Parameter(old.new_empty(shape.num_experts, 2 * shape.intermediate_size, hidden))
    experts.down_proj = nn.Parameter(old.new_empty(shape.num_experts, hidden, shape.intermediate_size))
    router.weight = nn.Parameter(old.new_empty(shape.num_experts, hidden))
    experts.num_experts = router.num_experts = shape.num_experts
    experts.intermediate_dim = shape.intermediate_size
    router.top_k = shape.top_k
