"""Camera-P (CAMERA, arXiv:2508.02322): channels of experts by the energy of what they add.

A micro-expert is one channel k of one expert: its row of gate and up and its column of down. Over the tokens
routed to the expert, with g the router's weight and a_k the channel's activation, its energy is

    E_k = ||w_down,k||^2 * ((1 - alpha) * sum (g a_k)^2 + alpha * max (g a_k)^2),

and the lowest of each layer go, all its experts ranked together. No gradients, no training.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from converters.train.context import Context, Outcome
from converters.train.expert_channels import ExpertChannelRecipe, check_widths, cut
from converters.train.moe import MoeLayer, Routed, activations, moe_layers, observe


class CameraRecipe(ExpertChannelRecipe):
    """``alpha = 1``, the maximum alone, is the published default."""

    method: Literal["camera-p"] = "camera-p"
    alpha: float = Field(default=1.0, ge=0, le=1, description="weight of the maximum against the sum")


class Energy:
    """Sum and maximum of ``(g a_k)^2`` by layer, ``[experts, width]``."""

    def __init__(self, layers: list[MoeLayer]) -> None:
        device = layers[0].experts.down_proj.device
        shapes = {layer.index: (layer.count, layer.width) for layer in layers}
        self.sums = {index: torch.zeros(shape, device=device) for index, shape in shapes.items()}
        self.maxima = {index: torch.zeros(shape, device=device) for index, shape in shapes.items()}

    def add(self, layer: MoeLayer, part: Routed) -> None:
        """Take in one expert's share of a call."""
        found = activations(layer.experts, part.expert, part.inputs) * part.weights.unsqueeze(-1)
        squares = found.float().square()
        self.sums[layer.index][part.expert] += squares.sum(0)
        maxima = self.maxima[layer.index]
        maxima[part.expert] = torch.maximum(maxima[part.expert], squares.amax(0))

    def of(self, layer: MoeLayer, alpha: float) -> Tensor:
        """``E_k`` of a layer."""
        norms = layer.experts.down_proj.detach().float().square().sum(1)
        return norms * ((1.0 - alpha) * self.sums[layer.index] + alpha * self.maxima[layer.index])


def run(context: Context, recipe: CameraRecipe) -> Outcome:
    """One forward pass, then slices."""
    model = context.loaded.model
    layers = moe_layers(model, context.loaded.config)
    check_widths(layers, recipe.sparsity, recipe.channel_multiple)
    energy = Energy(layers)
    sequences = context.calibration_sequences(recipe.samples)
    observe(model, layers, sequences, energy.add, recipe.method, context.quiet)
    outcome = cut(context, recipe, layers, [energy.of(layer, recipe.alpha) for layer in layers], "layer")
    outcome.figures["calibration_tokens"] = sequences.numel()
    return outcome
