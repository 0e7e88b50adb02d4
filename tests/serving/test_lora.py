"""LoRA adapters on top of packed 2:4 layers: the same answers as on the dense twin."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.serving import checkpoints as ck
from tests.serving.engine import PROMPTS, engine, prompts

pytestmark = pytest.mark.e2e
RANK, ALPHA = 8, 16


def write_adapter(model: torch.nn.Module, folder: Path, seed: int = 11) -> dict[str, torch.Tensor]:
    """A random PEFT adapter on every decoder linear; returns the weight changes it stands for."""
    torch.manual_seed(seed)
    tensors, deltas = {}, {}
    for name in ck.linear_names(model):
        rows, cols = model.get_submodule(name).weight.shape
        a, b = 0.2 * torch.randn(RANK, cols), 0.2 * torch.randn(rows, RANK)
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
        deltas[name] = (b @ a) * (ALPHA / RANK)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({name.rpartition(".")[2] for name in deltas})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA}
    (folder / "adapter_config.json").write_text(
        json.dumps({**config, "target_modules": targets, "bias": "none"})
    )
    return deltas


def generate(llm: Any, **options: Any) -> tuple[list[list[int]], torch.Tensor]:
    """Greedy tokens and their logprobs (vLLM 0.32 cannot give prompt logprobs under LoRA on CPU)."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=16, temperature=0, logprobs=0, ignore_eos=True, detokenize=False)
    outputs = [out.outputs[0] for out in llm.generate(prompts(ck.VOCAB), params, use_tqdm=False, **options)]
    logprobs = [
        [entry[token].logprob for token, entry in zip(out.token_ids, out.logprobs, strict=True)]
        for out in outputs
    ]
    return [list(out.token_ids) for out in outputs], torch.tensor(logprobs)


def test_an_adapter_on_a_sparse_model(tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    model = ck.pruned_model("llama", False).float()
    folder = ck.write_bitmask(model, tmp_path / "s")
    deltas = write_adapter(model, tmp_path / "adapter")
    with engine(folder, enable_lora=True, max_lora_rank=RANK) as llm:
        base, _ = generate(llm)
        tokens, logprobs = generate(llm, lora_request=LoRARequest("adapter", 1, str(tmp_path / "adapter")))
    with torch.no_grad():
        for name, delta in deltas.items():
            model.get_submodule(name).weight.add_(delta)
    with engine(ck.write_dense(model, tmp_path / "merged")) as llm:
        merged_tokens, merged_logprobs = generate(llm)
    assert tokens != base
    assert tokens == merged_tokens
    assert (logprobs - merged_logprobs).abs().max() <= 1e-3


def test_two_adapters_in_one_batch(tmp_path: Path) -> None:
    """Every prompt is answered as by the dense model into which its adapter has been merged."""
    from vllm.lora.request import LoRARequest

    model = ck.pruned_model("llama", False).float()
    folder = ck.write_bitmask(model, tmp_path / "s")
    adapters = [write_adapter(model, tmp_path / f"adapter{seed}", seed) for seed in (1, 2)]
    asked = [LoRARequest(f"adapter{seed}", seed, str(tmp_path / f"adapter{seed}")) for seed in (1, 2)]
    requests = [asked[number % 2] for number in range(PROMPTS)]
    with engine(folder, enable_lora=True, max_lora_rank=RANK, max_loras=2) as llm:
        tokens, logprobs = generate(llm, lora_request=requests)
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    for which, deltas in enumerate(adapters):
        merged = {f"{name}.weight": weights[f"{name}.weight"] + delta for name, delta in deltas.items()}
        model.load_state_dict(weights | merged)
        with engine(ck.write_dense(model, tmp_path / f"merged{which}")) as llm:
            merged_tokens, merged_logprobs = generate(llm)
        assert tokens[which::2] == merged_tokens[which::2]
        assert (logprobs[which::2] - merged_logprobs[which::2]).abs().max() <= 1e-3
