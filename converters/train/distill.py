"""Training a compressed student against its frozen dense self."""

import copy
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from converters.train.device import autocast
from converters.train.optim import next_token_loss
from converters.train.recipes import OptimiserRecipe, Strict

KlWeight = Annotated[float, Field(ge=0.0, le=1.0)]


class DistillationRecipe(Strict):
    """``loss = kl_weight * T^2 * KL(teacher || student) + (1 - kl_weight) * cross-entropy``."""

    kl_weight: KlWeight = 2 / 3
    temperature: float = Field(default=1.0, gt=0)


def forward_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """``T^2 * KL(P_teacher || P_student)``, summed over the vocabulary and averaged over tokens.

    Args:
        student: logits ``[..., vocab]``.
        teacher: logits of the same shape.
        temperature: T, dividing both logits; ``T^2`` keeps gradients on the cross-entropy's scale.
    """
    log_student = F.log_softmax(student.float().flatten(0, -2) / temperature, -1)
    log_teacher = F.log_softmax(teacher.float().flatten(0, -2) / temperature, -1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def frozen_copy(model: nn.Module) -> nn.Module:
    """A teacher: the same weights, in eval mode, without gradients."""
    teacher = copy.deepcopy(model).eval()
    return teacher.requires_grad_(False)


class StudentLoss:
    """Computes the loss of one batch and accumulates its gradients.

    Args:
        student: model in training.
        teacher: its frozen dense self.
        distillation: weights of the two terms.
        optimiser: for the number of parts a batch is computed in.
        device: of both models.
        precision: of the matrix products.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        distillation: DistillationRecipe,
        optimiser: OptimiserRecipe,
        device: torch.device,
        precision: Literal["bf16", "fp32"],
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.distillation = distillation
        self.parts = optimiser.accumulation
        self.device = device
        self.precision = precision

    def backward(self, batch: Tensor) -> dict[str, Tensor | float]:
        """Gradients of the mean loss over ``[batch, sequence]``; returns loss, cross-entropy and KL."""
        sums = torch.zeros(3, device=self.device)
        for ids in batch.to(self.device).chunk(self.parts):
            with autocast(self.device, self.precision):
                logits = self.student(input_ids=ids, use_cache=False).logits
                with torch.no_grad():
                    target = self.teacher(input_ids=ids, use_cache=False).logits
            ce = next_token_loss(logits, ids)
            kl = forward_kl(logits, target, self.distillation.temperature)
            weight = self.distillation.kl_weight
            loss = weight * kl + (1.0 - weight) * ce
            share = len(ids) / len(batch)
            (loss * share).backward()
            sums += torch.stack([loss, ce, kl]).detach() * share
        return {"loss": sums[0], "ce": sums[1], "kl": sums[2]}


def emptied(linear: nn.Linear) -> nn.Linear:
    """The linear without its weight, so that only the layer in its place holds it."""
    linear.weight = nn.Parameter(torch.empty_like(linear.weight, device="meta"))
    return linear


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` where ``name`` (dotted) is."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def other_parameters(model: nn.Module, excluded: Any) -> list[nn.Parameter]:
    """Trainable parameters that are none of ``excluded``."""
    identities = {id(p) for p in excluded}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in identities]
