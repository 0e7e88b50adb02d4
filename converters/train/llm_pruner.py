"""LLM-Pruner (Ma et al., arXiv:2305.11627): first-order Taylor importance of coupled structures.

Weights that depend on each other go together: a KV group with its rows of q, k, v and columns of o; an FFN
channel with its rows of gate and up and its column of down. A group's importance is the first-order estimate
of what its removal costs, element by element, ``sum |w * dL/dw|`` over all of them, with the gradient of the
language-modelling loss on a few sequences. The first and last layers are left whole, the others lose the
same share. The paper recovers with LoRA afterwards; here ``finetune`` continues from the sliced model.
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from converters.train.calibration import decoder_layers
from converters.train.context import CompressionRecipe, Context, Outcome
from converters.train.optim import next_token_loss
from converters.train.progress import RunProgress
from converters.train.recipes import Fraction
from converters.train.structured import (
    LayerShape,
    base_shape,
    block_parameters,
    read_layer_shapes,
    structured_config,
)
from converters.train.uniform import cut_layer, head_dim_of, planned_counts, shape_figures
from vllm_sparse.errors import FormatError


class LlmPrunerRecipe(CompressionRecipe):
    """The paper: 10 sequences of 64 tokens; 25 % off layers 4 to 29 of 32 is 20 % of the weights."""

    method: Literal["llm-pruner"] = "llm-pruner"
    sparsity: Fraction = Field(default=0.2, description="share of attention and FFN weights to remove")
    samples: int = Field(default=10, ge=1, description="sequences of data.sequence_length to differentiate")
    protect_first: float = Field(default=1 / 8, ge=0, lt=1, description="share of layers kept whole first")
    protect_last: float = Field(default=1 / 16, ge=0, lt=1, description="share of layers kept whole last")
    channel_multiple: int = Field(
        default=64, ge=1, description="kept FFN channels a layer: a multiple of this"
    )


def layer_sparsities(layers: int, recipe: LlmPrunerRecipe) -> list[float]:
    """What each layer loses: nothing at both ends, the same in between, ``sparsity`` on average.

    Raises:
        FormatError: the layers that may be cut are too few for it.
    """
    first, last = int(recipe.protect_first * layers), int(recipe.protect_last * layers)
    cut = layers - first - last
    local = recipe.sparsity * layers / cut if cut > 0 else 1.0
    if local >= 1.0:
        raise FormatError(
            f"sparsity {recipe.sparsity} cannot be met: {first} + {last} of {layers} layers are protected, "
            "so the rest would have to go whole; lower sparsity, protect_first or protect_last"
        )
    return [0.0] * first + [local] * cut + [0.0] * last


def taylor(weight: Tensor, grad: Tensor) -> Tensor:
    """``|w * dL/dw|``, element by element."""
    return (weight.float() * grad.float()).abs()


def group_importance(layer: Any, shape: LayerShape) -> tuple[Tensor, Tensor]:
    """Importance of KV groups ``[groups]`` and channels ``[channels]``; gradients must be there."""

    def rows(linear: nn.Linear) -> Tensor:
        return taylor(linear.weight, _grad(linear)).sum(1)

    def columns(linear: nn.Linear) -> Tensor:
        return taylor(linear.weight, _grad(linear)).sum(0)

    groups = channels = torch.zeros(0)
    if shape.num_key_value_heads:
        a, count = layer.self_attn, shape.num_key_value_heads
        parts = (rows(a.q_proj), rows(a.k_proj), rows(a.v_proj), columns(a.o_proj))
        groups = torch.stack([part.reshape(count, -1).sum(1) for part in parts]).sum(0)
    if shape.intermediate_size:
        m = layer.mlp
        channels = rows(m.gate_proj) + rows(m.up_proj) + columns(m.down_proj)
    return groups, channels


def _grad(linear: nn.Linear) -> Tensor:
    return torch.zeros_like(linear.weight) if linear.weight.grad is None else linear.weight.grad


def accumulate_gradients(model: nn.Module, sequences: Tensor, quiet: bool) -> None:
    """Gradients of the mean next-token loss over ``[samples, sequence]``, one sequence at a time."""
    device = next(model.parameters()).device
    with RunProgress("llm-pruner", len(sequences), quiet=quiet) as progress:
        for done, sample in enumerate(sequences.split(1), 1):
            ids = sample.long().to(device)
            loss = next_token_loss(model(input_ids=ids, use_cache=False).logits, ids)
            (loss / len(sequences)).backward()
            progress.update(done)


def run(context: Context, recipe: LlmPrunerRecipe) -> Outcome:
    """Differentiate once, cut everywhere."""
    config, model = context.loaded.config, context.loaded.model
    structured_config(config, [base_shape(config)])  # refuses families that cannot be served sliced
    shapes, head_dim = read_layer_shapes(config), head_dim_of(config)
    by_layer = layer_sparsities(len(shapes), recipe)
    counts = planned_counts(shapes, head_dim, recipe.sparsity, by_layer, recipe.channel_multiple)
    sequences = context.calibration_sequences(recipe.samples)
    before = block_parameters(model)
    layers = list(decoder_layers(model))
    model.requires_grad_(False)
    for layer in layers:
        layer.requires_grad_(True)
    accumulate_gradients(model, sequences, context.quiet)
    scores = [group_importance(layer, shape) for layer, shape in zip(layers, shapes, strict=True)]
    model.zero_grad(set_to_none=True)
    kept = [
        cut_layer(layer, shape, score, count, head_dim)
        for layer, shape, score, count in zip(layers, shapes, scores, counts, strict=True)
    ]
    figures = shape_figures(before, block_parameters(model), kept)
    figures["calibration_tokens"] = sequences.numel()
    return Outcome("structured", structured_config(config, kept), figures)
