"""REAP, HEAPr and Camera-P on a small Qwen3-MoE: scores against slow references, slices, exports."""

import json
from pathlib import Path

import pytest
import torch

from converters.train.camera import Energy
from converters.train.compress import compress_model
from converters.train.expert_channels import ranked, widths
from converters.train.heapr import measure
from converters.train.loading import load_model
from converters.train.moe import activations, keep_channels, keep_experts, moe_layers, observe, with_widths
from converters.train.reap import Saliency, experts_to_keep
from vllm_sparse.errors import FormatError, UnsupportedError

from .conftest import EXPERTS, TOP_K, WIDTH, heldout_perplexity, make_moe


@pytest.fixture(scope="module")
def moe_dir(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_moe(tmp_path_factory.mktemp("moe") / "m", tokenizer)


def opened(directory: Path):
    loaded = load_model(directory)
    return loaded, moe_layers(loaded.model, loaded.config)


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 300, (3, 20), generator=torch.Generator().manual_seed(seed))


def slow_calls(model, layers, ids):
    """For each layer: hidden states, chosen experts and weights of all tokens, by recomputing the router."""
    seen = {}
    handles = [
        layer.block.register_forward_pre_hook(
            lambda _, args, index=layer.index: seen.setdefault(index, []).append(args[0].flatten(0, 1))
        )
        for layer in layers
    ]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    calls = {}
    for layer in layers:
        hidden = torch.cat(seen[layer.index]).detach()
        probabilities = torch.softmax(hidden @ layer.block.gate.weight.T, -1)
        values, chosen = probabilities.topk(TOP_K, -1)
        calls[layer.index] = (hidden, chosen, (values / values.sum(-1, keepdim=True)).detach())
    return calls


def slow_expert(layer, expert: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Activation and output of one token."""
    weight = layer.experts.gate_up_proj[expert]
    gate, up = weight[:WIDTH] @ x, weight[WIDTH:] @ x
    a = gate * torch.sigmoid(gate) * up
    return a, layer.experts.down_proj[expert] @ a


def test_saliency_and_energy_equal_loops_over_tokens(moe_dir: Path):
    loaded, layers = opened(moe_dir)
    assert [layer.index for layer in layers] == [0, 2]
    saliency, energy = Saliency(layers), Energy(layers)
    observe(loaded.model, layers, tokens(), saliency.add, "t", quiet=True)
    observe(loaded.model, layers, tokens(), energy.add, "t", quiet=True)
    calls = slow_calls(loaded.model, layers, tokens())
    with torch.no_grad():
        for layer in layers:
            hidden, chosen, weights = calls[layer.index]
            for expert in range(EXPERTS):
                found, energies = [], []
                for token in range(len(hidden)):
                    for place in range(TOP_K):
                        if int(chosen[token, place]) == expert:
                            a, output = slow_expert(layer, expert, hidden[token])
                            g = weights[token, place]
                            found.append(float(g * output.norm()))
                            energies.append((g * a).square())
                expected = sum(found) / len(found) if found else 0.0
                assert float(saliency.of(layer.index)[expert]) == pytest.approx(expected, rel=1e-4)
                if energies:
                    stacked = torch.stack(energies)
                    norms = layer.experts.down_proj[expert].square().sum(0)
                    for alpha in (0.0, 0.3, 1.0):
                        slow = norms * ((1 - alpha) * stacked.sum(0) + alpha * stacked.amax(0))
                        assert torch.allclose(energy.of(layer, alpha)[expert], slow, rtol=1e-3)


def test_curvature_equals_the_explicit_fisher_matrix(moe_dir: Path):
    loaded, layers = opened(moe_dir)
    model = loaded.model
    curvature = measure(model, layers, tokens(), quiet=True)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    # The gradient at an expert's output, by adding a zero to it and differentiating the loss in that zero.
    calls = slow_calls(model, layers, tokens())
    for layer in layers:
        hidden, chosen, weights = calls[layer.index]
        probe = torch.zeros(len(hidden), 64, requires_grad=True)
        handle = layer.experts.register_forward_hook(lambda _, __, out, probe=probe: out + probe)
        loss = model(input_ids=tokens(), labels=tokens()).loss * (3 * 19)
        loss.backward()
        handle.remove()
        for expert in range(EXPERTS):
            rows, place = torch.where(chosen == expert)
            if not len(rows):
                assert float(curvature.of(layer.index)[expert].abs().max()) == 0
                continue
            g = probe.grad[rows] * weights[rows, place, None]
            fisher = g.T @ g / len(rows)
            down = layer.experts.down_proj[expert]
            with torch.no_grad():
                a = activations(layer.experts, expert, hidden[rows])
            expected = a.square().mean(0) * torch.einsum("hk,hj,jk->k", down, fisher, down)
            assert torch.allclose(curvature.of(layer.index)[expert], expected, rtol=2e-3, atol=1e-12)


def test_ranking_and_widths():
    scores = [torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]), torch.full((2, 4), 9.0)]
    masks = ranked(scores, 0.25, "all")
    assert [int(mask.sum()) for mask in masks] == [4, 8]
    assert masks[0].tolist() == [[False] * 4, [True] * 4]
    assert widths(masks, "equal", 1) == [2, 4]
    assert widths(masks, "ragged", 1) == [4, 4]
    assert widths(masks, "equal", 4) == [4, 4]
    alone = ranked(scores[:1], 0.5, "layer")
    assert alone[0].tolist() == [[False] * 4, [True] * 4]


def test_slices_equal_zeroed_experts_and_channels(moe_dir: Path):
    loaded, layers = opened(moe_dir)
    other, twins = opened(moe_dir)
    generator = torch.Generator().manual_seed(3)
    kept = torch.stack(
        [torch.randperm(WIDTH, generator=generator)[:20].sort().values for _ in range(EXPERTS)]
    )
    live = torch.rand(kept.shape, generator=generator) > 0.2
    with torch.no_grad():
        for layer, twin in zip(layers, twins, strict=True):
            keep_channels(layer, kept, live)
            mask = torch.zeros(EXPERTS, WIDTH).scatter(1, kept, live.float())
            twin.experts.down_proj.mul_(mask.unsqueeze(1))
        expected = other.model(tokens()).logits
        assert torch.allclose(loaded.model(tokens()).logits, expected, atol=1e-4)
        # A router that can choose fewer experts is the old one with the others' probabilities at zero.
        best = torch.tensor([0, 2, 3, 5])
        keep_experts(layers[0], best)
        assert layers[0].block.gate.weight.shape[0] == layers[0].experts.num_experts == 4
        gone = torch.tensor([1, 4])

        def forward(self, hidden):
            logits = hidden.reshape(-1, 64) @ self.weight.T
            logits[:, gone] = float("-inf")
            values, chosen = torch.softmax(logits, -1).topk(TOP_K, -1)
            return logits, values / values.sum(-1, keepdim=True), chosen

        twins[0].block.gate.forward = forward.__get__(twins[0].block.gate)
        expected = other.model(tokens()).logits
        assert torch.allclose(loaded.model(tokens()).logits, expected, atol=1e-4)


def prune(method: str, model: Path, text_file: Path, out: Path, **options):
    values = {"eval_tokens": 1000, "samples": 8} | options
    return compress_model(
        method, model, out, str(text_file), quiet=True, data_options={"sequence_length": 32}, **values
    )


def test_reap_writes_an_ordinary_model_of_fewer_experts(moe_dir: Path, text_file: Path, tmp_path: Path):
    result = prune("reap", moe_dir, text_file, tmp_path / "out", sparsity=0.5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_local_experts"] == 3
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]
    assert "per_layer_config" not in config
    assert [len(v) for v in result.figures["dropped_experts"].values()] == [3, 3]
    again = heldout_perplexity(tmp_path / "out", text_file, 32, 1000)
    assert again == pytest.approx(result.compressed.perplexity, rel=1e-5)


@pytest.mark.parametrize("method", ["heapr", "camera-p"])
@pytest.mark.parametrize("experts", ["equal", "ragged"])
def test_narrower_experts_answer_as_measured(
    method: str, experts: str, moe_dir: Path, text_file: Path, tmp_path: Path
):
    result = prune(
        method, moe_dir, text_file, tmp_path / "out", sparsity=0.5, channel_multiple=4, experts=experts
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    found = result.figures["expert_widths"]
    assert all(width % 4 == 0 for width in found.values())
    if experts == "equal":
        assert sum(found.values()) == WIDTH
        assert result.figures["live_share"] == [1.0, 1.0]
    else:
        assert any(share < 1 for share in result.figures["live_share"])
    if len(set(found.values())) > 1:
        assert config["architectures"] == ["SparseQwen3MoeForCausalLM"]
        assert {k: v["moe_intermediate_size"] for k, v in config["per_layer_config"].items()} == {
            index: width for index, width in found.items() if width != WIDTH
        }
    again = heldout_perplexity(tmp_path / "out", text_file, 32, 1000)
    assert again == pytest.approx(result.compressed.perplexity, rel=1e-5)
    assert again != pytest.approx(result.dense.perplexity, rel=1e-4)


def test_a_result_as_large_as_its_source_is_warned_about(
    moe_dir: Path, text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    result = prune(
        "heapr", moe_dir, text_file, tmp_path / "out", sparsity=0.1, channel_multiple=4, experts="ragged"
    )
    assert result.parameters[0] == result.parameters[1]
    assert "heapr removed no weights" in caplog.text


def test_layers_that_differ_are_written_down():
    config = {
        "model_type": "qwen3_moe", "moe_intermediate_size": 32, "hidden_size": 64, "num_attention_heads": 2,
        "architectures": ["Qwen3MoeForCausalLM"],
    }  # fmt: skip
    assert with_widths(config, {0: 16, 2: 16}) == {**config, "moe_intermediate_size": 16}
    mixed = with_widths(config, {0: 16, 2: 32})
    assert mixed["per_layer_config"] == {"0": {"moe_intermediate_size": 16}}
    assert mixed["architectures"] == ["SparseQwen3MoeForCausalLM"]


def test_dense_models_and_impossible_shares_are_refused(
    moe_dir: Path, model_dir: Path, text_file: Path, tmp_path: Path
):
    for method in ("reap", "heapr", "camera-p"):
        with pytest.raises(UnsupportedError, match="have no experts that are known here; known: qwen3_moe"):
            prune(method, model_dir, text_file, tmp_path / "out")
    for method in ("wanda", "shortgpt"):
        with pytest.raises(UnsupportedError, match="mixture of experts; this method works on dense models"):
            prune(method, moe_dir, text_file, tmp_path / "out")
    with pytest.raises(FormatError, match="leaves 1 of 6 experts, fewer than the 2"):
        prune("reap", moe_dir, text_file, tmp_path / "out", sparsity=0.8)
    with pytest.raises(FormatError, match="not one whole expert"):
        prune("reap", moe_dir, text_file, tmp_path / "out", sparsity=0.05)
    too_wide = r"the experts have 32 channels.* set channel_multiple to 16 or less"
    for method in ("heapr", "camera-p"):
        with pytest.raises(FormatError, match=too_wide):
            prune(method, moe_dir, text_file, tmp_path / "out", sparsity=0.5, channel_multiple=32)
    assert not (tmp_path / "out").exists()
    _, layers = opened(moe_dir)
    assert experts_to_keep(layers, 0.25, TOP_K) == 4
