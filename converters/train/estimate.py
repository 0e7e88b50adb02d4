"""What a run will need, before it starts: memory from shapes, time from a short measurement."""

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from converters.train.context import CompressionRecipe
from converters.train.device import autocast, resolve_device, resolve_precision
from converters.train.loading import model_config, structure_on_meta
from converters.train.methods import METHODS
from converters.train.pretrain24 import Pretrain24Recipe
from converters.train.recipes import OptimiserRecipe
from converters.train.requant import RequantRecipe

_GIB = 2**30
# Floats a weight: itself, its gradient, two moments and the teacher, unless said otherwise. MaskLLM has six
# logits for four weights, each with gradient, moments, noise and softmax; gates on frozen weights are few.
_STATES = {"maskllm": 10, "ddp": 1, "hard-concrete": 1}
# The same of one-shot methods that differentiate: LLM-Pruner every weight once, HEAPr the experts' outputs
# alone; ReQuant also keeps the weights, where its path starts, the change, the contributions and the result.
_GRADIENTS = {"llm-pruner": 2, "heapr": 1, "requant": 7}


@dataclass(frozen=True)
class Estimate:
    """A plan in numbers.

    Attributes:
        parameters: of the model, tied ones once.
        tokens: that pass through the model, calibration or training.
        memory_gib: weights in float32, states, hidden states and the largest temporary.
        seconds: arithmetic divided by the matrix-product rate measured just now on this device; reading
            and writing files comes on top.
    """

    parameters: int
    tokens: int
    memory_gib: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """For ``--dry-run --json``."""
        return asdict(self)


def estimate(recipe: CompressionRecipe) -> Estimate:
    """Estimate a recipe's memory and time without loading weights."""
    model = structure_on_meta(recipe.model)
    parameters = sum(p.numel() for p in model.parameters())
    config = model_config(recipe.model)
    # Transformers knows every family's own names of these.
    shape: Any = model.config
    length, hidden = recipe.data.sequence_length, shape.hidden_size
    width = max(hidden, config.get("intermediate_size") or hidden)
    # Of one token, kept for the backward pass.
    activations = shape.num_hidden_layers * (4 * hidden + 3 * width) + 3 * shape.vocab_size
    optimiser = getattr(recipe, "optimiser", None)
    evaluation = 2 * 2 * parameters * recipe.eval_tokens
    if isinstance(optimiser, OptimiserRecipe):
        steps = optimiser.steps
        if isinstance(recipe, Pretrain24Recipe) and recipe.searches:
            steps += (len(recipe.decay_grid) + 1) * recipe.search_steps
        tokens = steps * optimiser.batch_size * length
        # Forward and backward of the student, forward of a teacher.
        work = (6 + 2) * parameters * tokens
        part = optimiser.batch_size * length // optimiser.accumulation
        memory = _STATES.get(recipe.method, 5) * parameters + part * activations
    elif recipe.method in _GRADIENTS:
        tokens = _passes(recipe) * _samples(recipe) * length
        # Forward and backward, one sequence at a time.
        work = 6 * parameters * tokens
        memory = _GRADIENTS[recipe.method] * parameters + length * activations
    elif _samples(recipe):
        tokens = _samples(recipe) * length
        second_order = recipe.method == "sparsegpt"
        # Two passes through every layer; a Hessian for each distinct input and a sweep over its columns.
        work = 2 * 2 * parameters * tokens + (2 * tokens * parameters if second_order else 0)
        memory = parameters + 2 * tokens * hidden + (6 * width * width if second_order else width)
    else:
        tokens, work, memory = 0, 0, parameters
    rate = _flops(recipe, isinstance(optimiser, OptimiserRecipe))
    return Estimate(parameters, tokens, 4 * memory / _GIB, (work + evaluation) / rate)


def _samples(recipe: CompressionRecipe) -> int:
    """Calibration sequences; 0 for methods that look at none."""
    return int(getattr(recipe, "samples", 0))


def _passes(recipe: CompressionRecipe) -> int:
    """How often a method that differentiates goes over its sequences."""
    if not isinstance(recipe, RequantRecipe):
        return 1
    return recipe.points * (1 + (recipe.detach_steps if recipe.significant else 0))


def _flops(recipe: CompressionRecipe, training: bool) -> float:
    """Floating-point operations a second of one matrix product shaped like the model's."""
    device = resolve_device(recipe.run.device)
    precision = resolve_precision(recipe.run.precision, device) if training else "fp32"
    size = 512
    left, right = torch.randn(2, size, size, device=device)
    best = float("inf")
    with autocast(device, precision), torch.no_grad():
        for _ in range(8):
            started = time.perf_counter()
            float((left @ right)[0, 0])
            best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def plan_text(recipe: CompressionRecipe, figures: Estimate) -> str:
    """The plan as a person reads it."""
    method = METHODS[recipe.method]
    return (
        f"{recipe.method} ({method.summary}) on {recipe.model} -> {recipe.out}: {method.kind} weights\n"
        f"{figures.parameters / 1e6:.2f}M parameters, {figures.tokens / 1e6:.2f}M tokens of "
        f"{recipe.data.source} in sequences of {recipe.data.sequence_length}\n"
        f"about {figures.memory_gib:.2f} GiB of memory, {figures.seconds:.0f} s of arithmetic on this machine"
    )
