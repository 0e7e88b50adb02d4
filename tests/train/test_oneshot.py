"""Magnitude, Wanda and SparseGPT against slow float64 references, and their sweep over layers."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from converters.train.calibration import (
    InputHessian,
    InputNorm,
    decoder_layers,
    first_layer_inputs,
    linears_of,
    sweep_layers,
)
from converters.train.compress import compress_model
from converters.train.loading import load_model
from converters.train.magnitude import prune_magnitude
from converters.train.sparsegpt import prune_sparsegpt
from converters.train.wanda import prune_wanda
from vllm_sparse.errors import FormatError, NumericsError, UnsupportedError
from vllm_sparse.sparse24 import group_nonzeros, is_24


def correlated_inputs(tokens: int, features: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator)
    return torch.randn(tokens, features, generator=generator) @ mixing * 0.3


def reference_sparsegpt(weight: torch.Tensor, inputs: torch.Tensor, damping: float) -> torch.Tensor:
    """Optimal-brain-surgeon steps with an explicit inverse for every column; no Cholesky, no blocks."""
    w = weight.double().clone()
    x = inputs.double()
    h = 2.0 / len(x) * x.T @ x
    h += damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    rows, columns = w.shape
    for row in range(rows):
        keep: list[int] = []
        for j in range(columns):
            if j % 4 == 0:
                errors = [w[row, i] ** 2 / torch.linalg.inv(h[i:, i:])[0, 0] for i in range(j, j + 4)]
                keep = sorted(range(j, j + 4), key=lambda i: -errors[i - j])[:2]
            if j not in keep:
                inverse = torch.linalg.inv(h[j:, j:])
                w[row, j:] -= w[row, j] / inverse[0, 0] * inverse[0]
                w[row, j] = 0.0
    return w


@pytest.mark.parametrize("block_size", [4, 8, 128])
def test_sparsegpt_equals_the_explicit_inverse(block_size: int):
    weight = torch.randn(6, 24, generator=torch.Generator().manual_seed(0))
    inputs = correlated_inputs(200, 24, seed=1)
    statistic = InputHessian(24, torch.device("cpu"))
    for part in inputs.split(64):
        statistic.add(part)
    pruned = prune_sparsegpt(weight, statistic.hessian, 0.01, block_size)
    expected = reference_sparsegpt(weight, inputs, 0.01)
    assert torch.allclose(pruned.double(), expected, atol=2e-4)
    assert torch.equal(pruned != 0, expected != 0)
    assert torch.all(group_nonzeros(pruned) == 2)


def test_sparsegpt_hurts_the_output_less_than_wanda_and_magnitude():
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(2))
    inputs = correlated_inputs(500, 64, seed=3)
    statistic = InputHessian(64, torch.device("cpu"))
    statistic.add(inputs)
    results = {
        "sparsegpt": prune_sparsegpt(weight, statistic.hessian),
        "wanda": prune_wanda(weight, inputs.square().sum(0)),
        "magnitude": prune_magnitude(weight),
    }
    errors = {name: float((inputs @ (weight - w).T).norm()) for name, w in results.items()}
    assert errors["sparsegpt"] < 0.8 * min(errors["wanda"], errors["magnitude"])


def test_sparsegpt_drops_features_that_never_fire():
    weight = torch.ones(4, 8)
    inputs = correlated_inputs(100, 8, seed=4)
    inputs[:, 5] = 0.0
    statistic = InputHessian(8, torch.device("cpu"))
    statistic.add(inputs)
    pruned = prune_sparsegpt(weight, statistic.hessian)
    assert torch.all(pruned[:, 5] == 0)
    assert torch.isfinite(pruned).all()
    with pytest.raises(NumericsError, match="not positive definite"):
        prune_sparsegpt(weight, -statistic.hessian)


def test_wanda_equals_a_loop_over_groups():
    generator = torch.Generator().manual_seed(5)
    weight, inputs = torch.randn(7, 16, generator=generator), torch.randn(50, 16, generator=generator)
    inputs[:, ::4] *= 5.0
    statistic = InputNorm(16, torch.device("cpu"))
    statistic.add(inputs)
    expected = weight.double().clone()
    norms = inputs.double().norm(dim=0)
    for row in range(7):
        for start in range(0, 16, 4):
            scores = [float(weight[row, start + i].double().abs() * norms[start + i]) for i in range(4)]
            for i in sorted(range(4), key=lambda i: scores[i])[:2]:
                expected[row, start + i] = 0.0
    pruned = prune_wanda(weight, statistic.sum_squares)
    assert torch.equal(pruned.double(), expected)
    assert not torch.equal(pruned, prune_magnitude(weight))


def test_magnitude_keeps_the_two_largest():
    weight = torch.tensor([[1.0, -4.0, 3.0, -2.0, 0.5, 0.5, 0.5, -0.25]])
    assert prune_magnitude(weight).tolist() == [[0.0, -4.0, 3.0, 0.0, 0.5, 0.5, 0.0, 0.0]]


def sequences() -> torch.Tensor:
    return torch.randint(0, 300, (6, 32), generator=torch.Generator().manual_seed(6))


def test_the_sweep_sees_what_the_model_sees_and_passes_pruned_outputs_on(model_dir: Path):
    model = load_model(model_dir).model
    tokens = sequences()
    seen: list[dict[str, torch.Tensor]] = []

    def visit(index: int, layer: nn.Module, statistics) -> None:
        seen.append({name: s.sum_squares.clone() for name, s in statistics.items()})
        for linear in linears_of(layer).values():
            linear.weight.data.copy_(prune_magnitude(linear.weight))

    sweep_layers(model, tokens, InputNorm, visit, batch_tokens=64, quiet=True)

    # The same again with plain hooks: layer i's inputs come from a model whose layers before i are pruned.
    check = load_model(model_dir).model
    for index, layer in enumerate(decoder_layers(check)):
        found: dict[str, torch.Tensor] = {}
        handles = [
            linear.register_forward_pre_hook(
                lambda _, args, name=name, found=found: found.update(
                    {name: args[0].flatten(0, 1).square().sum(0)}
                )
            )
            for name, linear in linears_of(layer).items()
        ]
        with torch.no_grad():
            check(input_ids=tokens)
        for handle in handles:
            handle.remove()
        assert set(found) == set(seen[index])
        for name, expected in found.items():
            assert torch.allclose(seen[index][name], expected, rtol=1e-4), (index, name)
        for linear in linears_of(layer).values():
            linear.weight.data.copy_(prune_magnitude(linear.weight))


def test_running_the_layers_on_recorded_inputs_is_the_model(model_dir: Path):
    model = load_model(model_dir).model
    with torch.no_grad():
        inputs = first_layer_inputs(model, sequences())
        for index, layer in enumerate(decoder_layers(model)):
            inputs.run(index, layer, 4, keep=True)
        logits = model.lm_head(model.model.norm(inputs.hidden))
        assert torch.allclose(logits, model(input_ids=sequences()).logits, atol=1e-4)


@pytest.mark.parametrize("family", ["Qwen2", "Gemma3"])
def test_layers_that_attend_to_a_window_are_run_as_such(family: str):
    """Also where only some layers do: Gemma 3's windowed layers have another rotary base, too."""
    import transformers

    sizes = {
        "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 64,
        "sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"] * 2,
    }  # fmt: skip
    if family == "Qwen2":
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes, use_sliding_window=True))
    else:
        model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes))
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
        inputs = first_layer_inputs(model, sequences())
        for index, layer in enumerate(decoder_layers(model)):
            inputs.run(index, layer, 4, keep=True)
        logits = model.lm_head(model.model.norm(inputs.hidden))
        assert torch.allclose(logits, model(input_ids=sequences()).logits, atol=1e-3)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_compress_writes_a_24_model_as_measured(
    method: str, model_dir: Path, text_file: Path, tmp_path: Path
):
    options = {} if method == "magnitude" else {"samples": 8}
    result = compress_model(
        method, model_dir, tmp_path / "out", str(text_file), quiet=True, eval_tokens=1000,
        data_options={"sequence_length": 32}, ignore=["*.layers.0.mlp.down_proj"], **options,
    )  # fmt: skip
    loaded = load_model(tmp_path / "out")
    linears = {
        f"{i}.{n}": m
        for i, layer in enumerate(decoder_layers(loaded.model))
        for n, m in linears_of(layer).items()
    }
    assert len(linears) == 14
    for name, linear in linears.items():
        assert is_24(linear.weight.detach()) == (name != "0.mlp.down_proj"), name
    source = load_model(model_dir).model
    assert torch.equal(loaded.model.lm_head.weight, source.lm_head.weight)
    assert not torch.equal(
        loaded.model.model.layers[1].mlp.up_proj.weight, source.model.layers[1].mlp.up_proj.weight
    )
    assert result.compressed.perplexity != result.dense.perplexity
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (model_dir / name).read_bytes()
    report = json.loads((tmp_path / "out" / "compression.json").read_text())
    assert report["compressed"]["perplexity"] == result.compressed.perplexity
    assert report["recipe"]["method"] == method
    assert not list(tmp_path.glob(".*"))


def test_a_structured_model_can_be_pruned_to_24(model_dir: Path, text_file: Path, tmp_path: Path):
    common = {"quiet": True, "eval_tokens": 500, "data_options": {"sequence_length": 32}}
    compress_model(
        "structured-ffn", model_dir, tmp_path / "s", str(text_file), keep_ratio=[1.0, 0.5], **common
    )
    compress_model("wanda", tmp_path / "s", tmp_path / "both", str(text_file), samples=4, **common)
    config = json.loads((tmp_path / "both" / "config.json").read_text())
    assert config["per_layer_config"] == {"1": {"intermediate_size": 64}}
    both = load_model(tmp_path / "both").model
    assert both.model.layers[1].mlp.down_proj.weight.shape == (64, 64)
    assert is_24(both.model.layers[1].mlp.down_proj.weight.detach())


def test_failures_leave_nothing_behind(model_dir: Path, text_file: Path, tmp_path: Path):
    out = tmp_path / "out"
    arguments = {"quiet": True, "eval_tokens": 0, "data_options": {"sequence_length": 32}}
    with pytest.raises(FormatError, match="calibration wants 100000"):
        compress_model("wanda", model_dir, out, str(text_file), samples=100_000, **arguments)
    with pytest.raises(FormatError, match=r"sequence_length 512 exceeds the model's 256"):
        compress_model("wanda", model_dir, out, str(text_file), quiet=True)
    with pytest.raises(FormatError, match="leaves no linear"):
        compress_model("magnitude", model_dir, out, str(text_file), ignore=["*"], **arguments)
    with pytest.raises(FormatError, match="method is 'sparse-gpt'; choose one with --method: magnitude"):
        compress_model("sparse-gpt", model_dir, out, str(text_file), **arguments)
    with pytest.raises(FormatError, match="sample: unknown key"):
        compress_model("wanda", model_dir, out, str(text_file), sample=3, **arguments)
    assert not list(tmp_path.iterdir())


def test_other_families_are_refused(tmp_path: Path, tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=300))
    with pytest.raises(UnsupportedError, match="GPT2LMHeadModel is not a decoder of linear layers"):
        decoder_layers(model)
