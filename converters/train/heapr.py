"""HEAPr (arXiv:2509.22299): channels of experts by a second-order estimate of what removing them costs.

Channel k of an expert adds ``a_k w_k`` to its output, w_k being a column of down. With the Fisher matrix of
the expert's output, ``G = mean of g g^T`` over the tokens routed to it and ``g = dL/df(x)``, removing the
channel costs

    score_k = mean(a_k^2) * w_k^T G w_k.

``w_k^T G w_k`` is the mean of ``(g . w_k)^2``, so G itself is never formed. One ranking over all experts and
layers. The gradient at an expert's output is the router's weight times the gradient at the block's output.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from converters.train.context import Context, Outcome
from converters.train.expert_channels import ExpertChannelRecipe, check_widths, cut
from converters.train.moe import MoeLayer, activations, moe_layers, routed
from converters.train.optim import next_token_loss
from converters.train.progress import RunProgress


class HeaprRecipe(ExpertChannelRecipe):
    """The paper uses 128 calibration sequences."""

    method: Literal["heapr"] = "heapr"


class Curvature:
    """Sums of ``a_k^2`` and ``(g . w_k)^2`` by layer, ``[experts, width]``, and tokens ``[experts]``."""

    def __init__(self, layers: list[MoeLayer]) -> None:
        device = layers[0].experts.down_proj.device
        shapes = {layer.index: (layer.count, layer.width) for layer in layers}
        self.squares = {index: torch.zeros(shape, device=device) for index, shape in shapes.items()}
        self.slopes = {index: torch.zeros(shape, device=device) for index, shape in shapes.items()}
        self.tokens = {layer.index: torch.zeros(layer.count, device=device) for layer in layers}

    @torch.no_grad()
    def add(self, layer: MoeLayer, args: tuple[Tensor, Tensor, Tensor], grad: Tensor) -> None:
        """Take in one call of a layer's experts and the gradient ``[tokens, hidden]`` at its output."""
        for part in routed(*args):
            e, experts = part.expert, layer.experts
            found = activations(experts, e, part.inputs).float()
            outer = grad[part.tokens].float() * part.weights.float().unsqueeze(-1)
            self.squares[layer.index][e] += found.square().sum(0)
            self.slopes[layer.index][e] += (outer @ experts.down_proj[e].float()).square().sum(0)
            self.tokens[layer.index][e] += len(part.tokens)

    def of(self, index: int) -> Tensor:
        """Scores of a layer; 0 for an expert that no token chose."""
        count = self.tokens[index].clamp(min=1).unsqueeze(-1)
        return (self.squares[index] / count) * (self.slopes[index] / count)


def measure(model: Any, layers: list[MoeLayer], sequences: Tensor, quiet: bool) -> Curvature:
    """Forward and backward of the next-token loss, one sequence at a time."""
    curvature = Curvature(layers)
    calls: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def watch(layer: MoeLayer) -> list[Any]:
        def before(_: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> None:
            calls[layer.index] = tuple(arg.detach() for arg in args)  # type: ignore[assignment]

        def after(_: nn.Module, __: Any, grads: tuple[Tensor, ...]) -> None:
            curvature.add(layer, calls.pop(layer.index), grads[0])

        return [
            layer.experts.register_forward_pre_hook(before),
            layer.experts.register_full_backward_hook(after),
        ]

    handles = [handle for layer in layers for handle in watch(layer)]
    # Frozen weights: gradients flow along the residual stream alone, from the embeddings on.
    model.requires_grad_(False)
    embedding = model.get_input_embeddings().weight
    embedding.requires_grad_(True)
    try:
        with RunProgress("heapr", len(sequences), quiet=quiet) as progress:
            for done, sample in enumerate(sequences.split(1), 1):
                ids = sample.long().to(embedding.device)
                loss = next_token_loss(model(input_ids=ids, use_cache=False).logits, ids)
                # The sum over tokens: a token's gradient must not depend on how long its sequence is.
                (loss * (ids.numel() - len(ids))).backward()
                embedding.grad = None
                progress.update(done)
    finally:
        for handle in handles:
            handle.remove()
        embedding.requires_grad_(False)
    return curvature


def run(context: Context, recipe: HeaprRecipe) -> Outcome:
    """Forward, backward, then slices."""
    model = context.loaded.model
    layers = moe_layers(model, context.loaded.config)
    check_widths(layers, recipe.sparsity, recipe.channel_multiple)
    sequences = context.calibration_sequences(recipe.samples)
    curvature = measure(model, layers, sequences, context.quiet)
    outcome = cut(context, recipe, layers, [curvature.of(layer.index) for layer in layers], "all")
    outcome.figures["calibration_tokens"] = sequences.numel()
    return outcome
