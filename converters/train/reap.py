"""REAP (Lasby et al., arXiv:2510.13999): drop whole experts by what the router and they together contribute.

With g_e(x) the router's weight of expert e for a token it is chosen for (renormalised over the chosen where
the model does so) and f_e(x) the expert's output, an expert's saliency is

    S_e = mean over the tokens routed to e of  g_e(x) * ||f_e(x)||_2.

The lowest of every layer go, with their rows of the router; nothing is trained. Layers stay alike, so the
result is an ordinary model of the family with fewer experts.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from converters.train.context import CompressionRecipe, Context, Outcome
from converters.train.moe import (
    MoeLayer,
    Routed,
    activations,
    keep_experts,
    moe_layers,
    observe,
    with_experts,
)
from converters.train.recipes import Fraction
from converters.train.structured import block_parameters
from vllm_sparse.errors import FormatError


class ReapRecipe(CompressionRecipe):
    """The paper drops 25 % and 50 % of the experts."""

    method: Literal["reap"] = "reap"
    sparsity: Fraction = Field(
        default=0.25, description="share of every layer's experts, rounded to whole ones"
    )
    samples: int = Field(default=128, ge=1, description="calibration sequences of data.sequence_length")


class Saliency:
    """Sums of ``g_e * ||f_e||`` and tokens by layer and expert."""

    def __init__(self, layers: list[MoeLayer]) -> None:
        device = layers[0].experts.down_proj.device
        self.sums = {layer.index: torch.zeros(layer.count, device=device) for layer in layers}
        self.tokens = {layer.index: torch.zeros(layer.count, device=device) for layer in layers}

    def add(self, layer: MoeLayer, part: Routed) -> None:
        """Take in one expert's share of a call."""
        output = F.linear(
            activations(layer.experts, part.expert, part.inputs), layer.experts.down_proj[part.expert]
        )
        self.sums[layer.index][part.expert] += (part.weights.float() * output.float().norm(dim=-1)).sum()
        self.tokens[layer.index][part.expert] += len(part.tokens)

    def of(self, index: int) -> Tensor:
        """``S_e`` of a layer; 0 for an expert that no token chose."""
        return self.sums[index] / self.tokens[index].clamp(min=1)


def experts_to_keep(layers: list[MoeLayer], sparsity: float, top_k: int) -> int:
    """Experts that every layer keeps.

    Raises:
        FormatError: layers differ in their experts, none would go, or fewer than a token takes would be left.
    """
    counts = {layer.count for layer in layers}
    if len(counts) > 1:
        raise FormatError(
            f"layers have {sorted(counts)} experts; REAP drops from models whose layers are alike"
        )
    count = counts.pop()
    kept = count - round(sparsity * count)
    if kept == count:
        raise FormatError(
            f"sparsity {sparsity} of {count} experts is not one whole expert; ask for {1 / count:.3f} or more"
        )
    if kept < top_k:
        raise FormatError(
            f"sparsity {sparsity} leaves {kept} of {count} experts, fewer than the {top_k} that a token "
            f"takes; ask for at most {1 - top_k / count:.3f}"
        )
    return kept


def run(context: Context, recipe: ReapRecipe) -> Outcome:
    """Measure the unpruned model in one pass, then slice."""
    model, config = context.loaded.model, context.loaded.config
    layers = moe_layers(model, config)
    kept = experts_to_keep(layers, recipe.sparsity, config["num_experts_per_tok"])
    saliency = Saliency(layers)
    sequences = context.calibration_sequences(recipe.samples)
    observe(model, layers, sequences, saliency.add, "reap", context.quiet)
    before = block_parameters(model)
    dropped = {}
    for layer in layers:
        best = saliency.of(layer.index).topk(kept).indices.sort().values
        dropped[str(layer.index)] = sorted(set(range(layer.count)) - set(best.tolist()))
        keep_experts(layer, best)
    model.config.num_experts = kept
    figures = {
        "calibration_tokens": sequences.numel(),
        "experts": kept,
        "dropped_experts": dropped,
        "unused_experts": sum(int((tokens == 0).sum()) for tokens in saliency.tokens.values()),
        "block_sparsity": 1.0 - block_parameters(model) / before,
    }
    return Outcome("structured", with_experts(config, kept), figures)
