"""MaskLLM (Fang et al., arXiv:2409.17481): a learned choice among the six 2:4 masks of every four weights.

Weights stay frozen. Every group of 4 has six logits pi, one for each way to keep 2 of 4. In training the mask
is soft, a sample of the Gumbel softmax,

    p = softmax((kappa * pi + g) / tau),   g = -ln(-ln u),   m = sum_i p_i * S_i,

with kappa growing and tau shrinking linearly over the run, so that the choice explores first and is hard in
the end. The loss is the next-token loss minus a reward for large kept weights that fades out,
``1e-5 * (1 - t/T) * sum ||W * m||^2``, which keeps gradients alive. Logits start at N(0, 0.01) plus what a
one-shot mask M suggests: ``strength * std(pi) * (|S_i and M| - 1)``. The final mask is the argmax.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn
from torch.nn import functional as F

from converters.train import sparsegpt, wanda
from converters.train.context import CalibratedRecipe, Context, Outcome
from converters.train.device import autocast, resolve_precision
from converters.train.distill import replace_module
from converters.train.optim import lr_at, next_token_loss, set_lr
from converters.train.recipes import OptimiserRecipe
from vllm_sparse.sparse24 import topk_mask
from vllm_sparse.sparse24.mask import GROUP, short_group_mask

# The six keep-masks S_i, [6, 4].
PATTERNS = torch.tensor(
    [[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 0, 1], [0, 1, 1, 0], [0, 0, 1, 1]], dtype=torch.float32
)
_LAYER_STRIDE = 1_000_003


class MaskLlmRecipe(CalibratedRecipe):
    """The paper's run: 2,000 steps of 1M tokens, 4,096-token sequences, SparseGPT prior."""

    method: Literal["maskllm"] = "maskllm"
    optimiser: OptimiserRecipe = OptimiserRecipe(
        steps=2000, lr=5e-4, warmup=0, min_lr_ratio=0.1, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1
    )
    prior: Literal["sparsegpt", "wanda", "magnitude", "none"] = "sparsegpt"
    prior_strength: float = Field(default=3.0, ge=0)
    initial_std: float = Field(default=0.01, gt=0, description="of the logits")
    scale: tuple[PositiveFloat, PositiveFloat] = Field(
        default=(100.0, 500.0), description="kappa, first and last"
    )
    temperature: tuple[PositiveFloat, PositiveFloat] = Field(
        default=(4.0, 0.05), description="tau, first and last"
    )
    weight_reward: float = Field(default=1e-5, ge=0, description="of the kept weights' squares, fading out")
    hard: bool = Field(default=False, description="hard samples with straight-through gradients")


def between(ends: tuple[float, float], progress: float) -> float:
    """Linear from the first end to the second."""
    return ends[0] + (ends[1] - ends[0]) * progress


def initial_logits(
    prior: Tensor | None, shape: tuple[int, int], std: float, strength: float, generator: torch.Generator
) -> Tensor:
    """Logits before training.

    Args:
        prior: bool keep-mask ``[out, in]``, or None.
        shape: ``(out, in)``.
        std: of the noise.
        strength: of the prior, in standard deviations of the logits.
        generator: on the CPU.

    Returns:
        float32 ``[out, in / 4, 6]``.
    """
    logits = std * torch.randn(shape[0], shape[1] // GROUP, len(PATTERNS), generator=generator)
    if prior is None:
        return logits
    overlap = prior.cpu().float().reshape(shape[0], -1, GROUP) @ PATTERNS.T
    return logits + strength * logits.std() * (overlap - 1.0)


def gumbel_noise(shape: torch.Size, generator: torch.Generator, device: torch.device) -> Tensor:
    """``-ln(-ln u)``, float32."""
    uniform = torch.rand(shape, generator=generator, device=device)
    return -(-uniform.clamp_(1e-7, 1.0 - 1e-7).log()).log()


def soft_mask(logits: Tensor, noise: Tensor, scale: float, temperature: float, hard: bool) -> Tensor:
    """Sampled mask ``[out, in]`` of logits ``[out, groups, 6]``; entries of a group add up to 2."""
    p = torch.softmax((logits * scale + noise) / temperature, dim=-1)
    if hard:
        p = F.one_hot(p.argmax(-1), len(PATTERNS)).to(p.dtype) - p.detach() + p
    return (p @ PATTERNS.to(p)).flatten(1)


def chosen_mask(logits: Tensor) -> Tensor:
    """The likeliest mask, bool ``[out, in]``."""
    return PATTERNS.to(logits.device)[logits.argmax(-1)].flatten(1).bool()


class MaskLinear(nn.Module):
    """A frozen linear under a mask that is being chosen.

    Args:
        linear: its weight and bias are used as they are.
        logits: see :func:`initial_logits`.
        hard: see :class:`MaskLlmRecipe`.
    """

    def __init__(self, linear: nn.Linear, logits: Tensor, hard: bool) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.logits = nn.Parameter(logits.to(linear.weight.device))
        self.hard = hard
        self.scale, self.temperature, self.seed = 1.0, 1.0, 0

    def mask(self) -> Tensor:
        """A sample in training, else the choice.

        The noise is a function of the step's seed, so that recomputing a layer gives the same sample.
        """
        if not self.training:
            return chosen_mask(self.logits)
        generator = torch.Generator(self.logits.device).manual_seed(self.seed)
        noise = gumbel_noise(self.logits.shape, generator, self.logits.device)
        return soft_mask(self.logits, noise, self.scale, self.temperature, self.hard)

    def forward(self, inputs: Tensor) -> Tensor:
        """``inputs @ (m * W)^T + bias``."""
        return F.linear(inputs, self.weight * self.mask(), self.bias)

    @torch.no_grad()
    def sparse_linear(self, template: nn.Linear) -> nn.Linear:
        """``template`` with the kept weights as they were."""
        template.weight.copy_(torch.where(chosen_mask(self.logits), self.weight, 0.0))
        return template


class MaskObjective:
    """One step on the logits: the :class:`~converters.train.loop.Objective` of the method."""

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, MaskLinear],
        recipe: MaskLlmRecipe,
        device: torch.device,
        precision: Literal["bf16", "fp32"],
    ) -> None:
        self.model = model
        self.layers = layers
        self.recipe = recipe
        self.device = device
        self.precision = precision
        settings = recipe.optimiser
        self.logits = [layer.logits for layer in layers.values()]
        self.optimiser = torch.optim.AdamW(
            self.logits,
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        )
        self.initial = [logits.detach().argmax(-1) for logits in self.logits]
        self.groups = sum(choice.numel() for choice in self.initial)

    def step(self, index: int, batch: Tensor) -> dict[str, Tensor | float]:
        """Sample masks, next-token loss minus the weight reward, AdamW."""
        settings = self.recipe.optimiser
        progress = index / settings.steps
        self._anneal(index, progress)
        lr = lr_at(index, settings)
        set_lr(self.optimiser, lr)
        ce = torch.zeros((), device=self.device)
        for ids in batch.to(self.device).chunk(settings.accumulation):
            with autocast(self.device, self.precision):
                loss = next_token_loss(self.model(input_ids=ids, use_cache=False).logits, ids)
            share = len(ids) / len(batch)
            (loss * share).backward()
            ce += loss.detach() * share
        reward = self.recipe.weight_reward * (1.0 - progress)
        if reward:
            for layer in self.layers.values():
                (-reward * (layer.weight * layer.mask()).square().sum()).backward()
        norm = nn.utils.clip_grad_norm_(self.logits, settings.clip_norm)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        first = next(iter(self.layers.values()))
        figures: dict[str, Tensor | float] = {"loss": ce, "lr": lr, "grad_norm": norm}
        figures |= {"scale": first.scale, "temperature": first.temperature}
        if (index + 1) % self.recipe.run.log_every == 0:
            figures |= self._choices()
        return figures

    def _anneal(self, index: int, progress: float) -> None:
        base = self.recipe.run.seed + index * len(self.layers)
        for number, layer in enumerate(self.layers.values()):
            layer.scale = between(self.recipe.scale, progress)
            layer.temperature = between(self.recipe.temperature, progress)
            layer.seed = (base + number) * _LAYER_STRIDE % 2**63

    @torch.no_grad()
    def _choices(self) -> dict[str, Tensor | float]:
        """Share of groups whose choice moved since the start, and how sure the choices are."""
        moved = torch.stack(
            [(x.argmax(-1) != first).sum() for x, first in zip(self.logits, self.initial, strict=True)]
        ).sum()
        sure = torch.stack(
            [torch.softmax(x.logits * x.scale, -1).amax(-1).sum() for x in self.layers.values()]
        ).sum()
        return {"changed_since_start": moved / self.groups, "confidence": sure / self.groups}

    def state_dict(self) -> dict[str, Any]:
        """Logits and moments; weights are frozen, noise depends on seed and step alone."""
        return {
            "logits": [x.detach() for x in self.logits],
            "initial": self.initial,
            "optimiser": self.optimiser.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo of :meth:`state_dict`."""
        self.optimiser.load_state_dict(state["optimiser"])
        self.initial = [choice.to(self.device) for choice in state["initial"]]
        with torch.no_grad():
            for logits, value in zip(self.logits, state["logits"], strict=True):
                logits.copy_(value)


def prior_masks(
    context: Context, recipe: MaskLlmRecipe, linears: Mapping[str, nn.Linear]
) -> dict[str, Tensor]:
    """Keep-masks of the one-shot method that ``prior`` names; the model's weights are left as they were."""
    if recipe.prior == "none":
        return {}
    if recipe.prior == "magnitude":
        return {name: topk_mask(linear.weight.detach().abs()) for name, linear in linears.items()}
    weights = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    shared = recipe.model_dump(include=set(CalibratedRecipe.model_fields) - {"method"})
    if recipe.prior == "wanda":
        wanda.run(context, wanda.WandaRecipe(**shared))
    else:
        sparsegpt.run(context, sparsegpt.SparseGptRecipe(**shared))
    masks = {name: short_group_mask(linear.weight.detach()) for name, linear in linears.items()}
    with torch.no_grad():
        for name, linear in linears.items():
            linear.weight.copy_(weights[name])
    return masks


def run(context: Context, recipe: MaskLlmRecipe) -> Outcome:
    """Learn masks on the frozen model, then apply them."""
    model = context.loaded.model
    precision = resolve_precision(recipe.run.precision, context.device)
    linears = context.targets(recipe.ignore)
    priors = prior_masks(context, recipe, linears)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(recipe.run.seed)
    layers = {}
    for name, linear in linears.items():
        shape = (linear.out_features, linear.in_features)
        logits = initial_logits(priors.get(name), shape, recipe.initial_std, recipe.prior_strength, generator)
        layers[name] = MaskLinear(linear, logits, recipe.hard)
        replace_module(model, name, layers[name])
    model.train()
    objective = MaskObjective(model, layers, recipe, context.device, precision)
    figures = context.train(objective, recipe.optimiser, precision)
    model.eval()
    for name, layer in layers.items():
        replace_module(model, name, layer.sparse_linear(linears[name]))
    return Outcome("2:4", context.loaded.config, figures)
