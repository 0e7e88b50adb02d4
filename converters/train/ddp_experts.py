"""DDP on a mixture of experts: one gate per layer, routed expert and channel of the expert.

The gate multiplies ``act(gate x) * (up x)`` of its channel, before down_proj, and folds into down_proj's
columns. Router, attention and dense layers carry no gates. Kernels for experts want one width in a layer:
see :mod:`converters.train.expert_channels` for how the gates' ranking becomes widths.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from converters.train.context import Context, Outcome
from converters.train.ddp import Budget, DdpObjective, DdpRecipe
from converters.train.device import require_one_process, resolve_precision
from converters.train.expert_channels import ExpertChannelRecipe, check_widths, cut
from converters.train.gates import Units
from converters.train.moe import MoeLayer, activations, moe_layers, routed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KIND = "expert-channels"


class GatedExperts:
    """A frozen model whose experts' channels are multiplied by gates inside :meth:`gated`.

    Args:
        model: its expert modules get a forward that looks for gates.
        layers: those with experts.
    """

    def __init__(self, model: "PreTrainedModel", layers: Sequence[MoeLayer]) -> None:
        self.model = model
        self.layers = list(layers)
        self.units = Units(tuple(layer.count * layer.width for layer in layers))
        self._gates: dict[int, Tensor] | None = None
        self._originals = [layer.experts.forward for layer in layers]
        for layer, original in zip(layers, self._originals, strict=True):
            layer.experts.forward = self._forward(layer, original)

    def _forward(self, layer: MoeLayer, original: Any) -> Any:
        def forward(hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
            if self._gates is None:
                plain: Tensor = original(hidden, chosen, weights)
                return plain
            gates, experts = self._gates[layer.index], layer.experts
            output = torch.zeros_like(hidden)
            for part in routed(hidden, chosen, weights):
                inner = activations(experts, part.expert, part.inputs)
                inner = inner * gates[part.expert].to(inner.dtype)
                share = F.linear(inner, experts.down_proj[part.expert]) * part.weights[:, None]
                output = output.index_add(0, part.tokens, share.to(output.dtype))
            return output

        return forward

    @contextlib.contextmanager
    def gated(self, flat: dict[str, Tensor]) -> Iterator[None]:
        """Multiply by the flat vector ``{"expert-channels": [total]}`` inside the block."""
        self._gates = {
            layer.index: part.reshape(layer.count, layer.width)
            for layer, part in zip(self.layers, self.units.split(flat[KIND]), strict=True)
        }
        try:
            yield
        finally:
            self._gates = None

    @torch.no_grad()
    def fold(self, flat: Tensor) -> None:
        """Multiply gates ``[total]`` into down_proj's columns in float32; the model is ordinary again."""
        for layer, part, original in zip(self.layers, self.units.split(flat), self._originals, strict=True):
            layer.experts.forward = original
            gates = part.reshape(layer.count, 1, layer.width)
            layer.experts.down_proj.copy_(layer.experts.down_proj.float() * gates)


def run(context: Context, recipe: DdpRecipe) -> Outcome:
    """Train gates on the frozen experts, fold them, slice."""
    require_one_process("method ddp on a mixture of experts")
    loaded = context.loaded
    layers = moe_layers(loaded.model, loaded.config)
    check_widths(layers, recipe.sparsity, recipe.channel_multiple)
    precision = resolve_precision(recipe.run.precision, context.device)
    loaded.model.requires_grad_(False).train(recipe.run.gradient_checkpointing)
    gated = GatedExperts(loaded.model, layers)
    # A budget in every expert wants a mean for each of them.
    groups = gated.units
    if recipe.budget == "expert":
        groups = Units(tuple(layer.width for layer in layers for _ in range(layer.count)))
    budget = Budget(
        groups,
        1.0 - recipe.sparsity,
        recipe.budget != "global",
        context.device,
        recipe.run.seed,
        recipe.gates == "clamped",
    )
    objective = DdpObjective(gated, {KIND: budget}, recipe, context.device, precision)
    figures = context.train(objective, recipe.optimiser, precision)
    loaded.model.eval()
    gates, z = budget.gate().detach(), budget.z.detach()
    gated.fold(gates)
    scores = [
        part.reshape(layer.count, layer.width)
        for layer, part in zip(layers, gated.units.split(z), strict=True)
    ]
    channels = ExpertChannelRecipe(
        method="ddp",
        model=recipe.model,
        sparsity=recipe.sparsity,
        experts=recipe.experts,
        channel_multiple=recipe.channel_multiple,
    )
    outcome = cut(context, channels, layers, scores, "all" if recipe.budget == "global" else "layer")
    outcome.figures |= figures | {"gate_range": {KIND: [float(gates.min()), float(gates.max())]}}
    return outcome
