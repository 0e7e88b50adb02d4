"""Optimiser and schedule that the trainers share."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from converters.train.recipes import OptimiserRecipe


def lr_at(step: int, recipe: OptimiserRecipe) -> float:
    """Linear warm-up to ``lr``, cosine to ``min_lr_ratio * lr`` at the horizon, linear cool-down to 0."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    span = max(1, (recipe.horizon or recipe.steps) - recipe.warmup)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - recipe.warmup) / span)))
    rate = recipe.lr * (recipe.min_lr_ratio + (1.0 - recipe.min_lr_ratio) * cosine)
    return rate * min(1.0, (recipe.steps - step) / recipe.cooldown) if recipe.cooldown else rate


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, object]]:
    """Weight decay for matrices, none for norms and biases."""
    trained = [p for p in parameters if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def adamw(model: nn.Module, recipe: OptimiserRecipe) -> torch.optim.AdamW:
    """Fused AdamW over a model's trainable parameters."""
    groups = decay_groups(model.parameters(), recipe.weight_decay)
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=True)


def set_lr(optimiser: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the same learning rate."""
    for group in optimiser.param_groups:
        group["lr"] = lr


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross-entropy in nats; logits ``[batch, sequence, vocab]``, ids ``[batch, sequence]``."""
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
