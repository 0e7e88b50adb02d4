"""ShortGPT (Men et al., arXiv:2403.03853): drop the layers that change their input least.

A layer's block influence is ``1 - mean cos(h_in, h_out)`` over the tokens of a calibration text, h being the
residual stream before and after it. The lowest go, whole, and the rest are renumbered: the result is an
ordinary, shallower model. All influences are measured in one pass through the unpruned model.
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from converters.train.calibration import decoder_layers, first_layer_inputs
from converters.train.context import CompressionRecipe, Context, Outcome
from converters.train.progress import RunProgress
from converters.train.recipes import Fraction
from converters.train.structured import block_parameters
from vllm_sparse.errors import FormatError

_BATCH_TOKENS = 4096


class ShortGptRecipe(CompressionRecipe):
    """The paper drops 9 of 32 layers of LLaMA-2-7B (27 %)."""

    method: Literal["shortgpt"] = "shortgpt"
    sparsity: Fraction = Field(default=0.25, description="share of layers to drop, rounded to whole layers")
    samples: int = Field(default=128, ge=1, description="calibration sequences of data.sequence_length")


def block_influence(before: Tensor, after: Tensor) -> Tensor:
    """``1 - mean cos`` over tokens of two residual streams ``[..., hidden]``."""
    cosine = F.cosine_similarity(before.float().flatten(0, -2), after.float().flatten(0, -2), dim=-1)
    return 1.0 - cosine.double().mean()


def dropped_layers(influence: Tensor, sparsity: float) -> list[int]:
    """Indices of the layers to drop, ascending.

    Args:
        influence: of every layer.
        sparsity: share of layers, rounded to whole ones.

    Raises:
        FormatError: that is no layer, or all of them.
    """
    count = round(sparsity * len(influence))
    if not 0 < count < len(influence):
        raise FormatError(
            f"sparsity {sparsity} of {len(influence)} layers is {count} whole layers; ask for a share "
            f"between {1 / len(influence):.3f} and {1 - 1 / len(influence):.3f}"
        )
    return sorted(influence.topk(count, largest=False).indices.tolist())


def without_layers(config: dict[str, Any], dropped: list[int]) -> dict[str, Any]:
    """``config.json`` after dropping layers: counts, lists and per-layer entries renumbered."""
    count = config["num_hidden_layers"]
    kept = [index for index in range(count) if index not in dropped]
    new = {
        key: [value[i] for i in kept] if key.endswith("layer_types") and isinstance(value, list) else value
        for key, value in config.items()
    }
    new["num_hidden_layers"] = len(kept)
    if config.get("per_layer_config"):
        entries = config["per_layer_config"]
        new["per_layer_config"] = {
            str(position): entries[str(index)] for position, index in enumerate(kept) if str(index) in entries
        }
    return new


@torch.no_grad()
def measure(context: Context, samples: int) -> tuple[Tensor, int]:
    """Influence of every layer of the unpruned model, and the calibration tokens it was measured on."""
    model = context.loaded.model
    sequences = context.calibration_sequences(samples)
    layers = decoder_layers(model)
    inputs = first_layer_inputs(model, sequences)
    batch_size = max(1, _BATCH_TOKENS // sequences.shape[1])
    found = []
    with RunProgress("shortgpt", len(layers), quiet=context.quiet) as progress:
        for index, layer in enumerate(layers):
            before = inputs.hidden.clone()
            inputs.run(index, layer, batch_size, keep=True)
            found.append(block_influence(before, inputs.hidden))
            progress.update(index + 1)
    return torch.stack(found), sequences.numel()


def run(context: Context, recipe: ShortGptRecipe) -> Outcome:
    """Measure, drop, renumber."""
    model: Any = context.loaded.model
    layers = decoder_layers(model)
    # Refuse an impossible share before the text is read.
    dropped_layers(torch.zeros(len(layers)), recipe.sparsity)
    before = block_parameters(model)
    influence, tokens = measure(context, recipe.samples)
    dropped = dropped_layers(influence, recipe.sparsity)
    kept: list[Any] = [layer for index, layer in enumerate(layers) if index not in dropped]
    for position, layer in enumerate(kept):
        layer.self_attn.layer_idx = position
    model.model.layers = nn.ModuleList(kept)
    config = without_layers(context.loaded.config, dropped)
    model.config.update(without_layers(model.config.to_dict(), dropped))
    figures = {
        "calibration_tokens": tokens,
        "block_influence": influence.tolist(),
        "dropped_layers": dropped,
        "block_sparsity": 1.0 - block_parameters(model) / before,
    }
    return Outcome("structured", config, figures)
