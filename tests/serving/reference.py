"""What a checkpoint should answer: transformers in float32, activations rounded as the format says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.serving.engine import Scores, prompts
from tests.serving.foreign import INPUT_SCALE, Format

Rounding = Callable[[Tensor], Tensor]


def rounding(fmt: Format, ranks: int = 1) -> Rounding | None:
    """The format's effect on activations, written out; scales per token are one for each rank's columns."""
    if fmt.activations is None or fmt.type is None:
        return None
    limit = 127.0 if fmt.type == "int" else 448.0

    def apply(x: Tensor) -> Tensor:
        scale = torch.tensor(INPUT_SCALE[fmt.type or ""])
        if fmt.activations == "dynamic":
            columns = x.float().abs().unflatten(-1, (ranks, -1))
            scale = (columns.amax(-1, keepdim=True) / limit).clamp_min(1e-30).expand_as(columns).flatten(-2)
        numbers = x.float() / scale
        if fmt.type == "int":
            low = -128 if fmt.activations == "static" else -127
            return (numbers.round().clamp(low, 127) * scale).to(x.dtype)
        return (numbers.clamp(-limit, limit).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)

    return apply


def _rounded(apply: Any) -> Callable[..., Any]:
    return lambda _, args: (apply(args[0]), *args[1:])


def _round_experts(module: Any, apply: Rounding) -> None:
    """Replace a fused experts module by a loop that rounds before both projections."""

    def forward(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        seen = apply(hidden)
        for expert in range(module.gate_up_proj.shape[0]):
            token, place = (top_k_index == expert).nonzero(as_tuple=True)
            gate, up = (seen[token] @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
            result = apply(torch.nn.functional.silu(gate) * up) @ module.down_proj[expert].T
            out.index_add_(0, token, result * top_k_weights[token, place, None])
        return out

    module.forward = forward


def score_twin(
    folder: Path,
    vocab: int,
    count: int,
    apply: Rounding | None,
    dtype: torch.dtype = torch.float32,
    row_parallel: Rounding | None = None,
) -> Scores:
    """Teacher-forced scores of the dense twin for the engine's own prompts.

    ``apply`` is what the format does to activations, ``row_parallel`` what it does to those of linears whose
    inputs are split over ranks, if that differs.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    if apply is not None:
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                split = name.endswith(("o_proj", "down_proj")) and row_parallel is not None
                module.register_forward_pre_hook(_rounded(row_parallel if split else apply))
            if hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, torch.nn.Parameter):
                _round_experts(module, apply)
    ids = torch.tensor([prompt["prompt_token_ids"] for prompt in prompts(vocab, count)])
    with torch.no_grad():
        logits = torch.cat([model(part).logits for part in ids.split(8)])
    logprobs = logits.float().log_softmax(-1)[:, :-1]
    return Scores(logprobs.gather(2, ids[:, 1:, None])[..., 0], logprobs.argmax(-1))
