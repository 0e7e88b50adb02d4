import json
from pathlib import Path

import pytest
import torch

from converters.train.compress import compress_model
from converters.train.corpus import read_documents
from converters.train.evaluate import evaluate_directory
from converters.train.flap import (
    InputMoments,
    LayerScores,
    check_target,
    choose,
    column_scores,
    standardised,
)
from converters.train.gates import Units, rounded_counts
from converters.train.loading import load_model
from converters.train.models import ModelShape, build_model
from converters.train.packing import encode_documents
from converters.train.saving import save_model
from converters.train.structured import LayerShape, read_layer_shapes
from vllm_sparse.errors import FormatError


def test_moments_and_scores_equal_their_definition():
    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7) + 3.0
    moments = InputMoments(6, torch.device("cpu"))
    for part in x.split(64):
        moments.add(part)
    assert torch.allclose(moments.mean, x.mean(0), atol=1e-5)
    assert torch.allclose(moments.variance, x.var(0, correction=0), rtol=1e-4)
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    expected = [float(x[:, j].var(correction=0) * weight[:, j].norm() ** 2) for j in range(6)]
    assert column_scores(weight, moments).tolist() == pytest.approx(expected, rel=1e-4)
    z = standardised(torch.tensor([1.0, 2.0, 6.0]))
    assert float(z.mean()) == pytest.approx(0, abs=1e-6)
    assert float(z.std(correction=0)) == pytest.approx(1)


def test_the_lowest_units_go_until_their_weights_are_paid_for():
    empty = torch.zeros(0)
    layers = [
        LayerScores(torch.tensor([-1.0, 1.0]), torch.tensor([-2.0, 0.5, 0.6, 0.7]), empty, empty),
        LayerScores(torch.tensor([0.1, 0.2]), torch.tensor([-0.5, 0.8, 0.9, 1.0]), empty, empty),
    ]
    # 4 head units at 3 and 8 channels at 1 make 20; the lowest cost 1, then 3, then 1, then 3.
    assert choose(layers, 3.0, 0.25) == ([1, 2], [3, 3])
    assert choose(layers, 3.0, 0.05) == ([2, 2], [3, 4])
    # 3.5 is nearer to 4 than to 1, 2 to 1.
    assert choose(layers, 3.0, 0.175) == ([1, 2], [3, 4])
    assert choose(layers, 3.0, 0.1) == ([2, 2], [3, 4])
    # A layer keeps its best head and its best multiple.
    assert choose(layers, 3.0, 0.95) == ([1, 1], [1, 1])
    assert choose(layers, 3.0, 0.95, 2) == ([1, 1], [2, 2])


@pytest.mark.parametrize("multiple", [4, 16, 64])
@pytest.mark.parametrize("sparsity", [0.02, 0.05, 0.1, 0.2])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_what_is_refused_before_the_work_removes_nothing_whatever_the_ranking(
    kv_heads: int, sparsity: float, multiple: int
):
    shapes = [LayerShape(2 * kv_heads, kv_heads, 96)] * 3
    widths = Units((96,) * 3)
    removed = []
    for seed in range(40):
        torch.manual_seed(seed)
        scores = [LayerScores(torch.randn(kv_heads), torch.randn(96), *torch.zeros(2, 0)) for _ in shapes]
        heads, channels = choose(scores, 64.0, sparsity, multiple)
        removed.append(sum(heads) < 3 * kv_heads or sum(rounded_counts(channels, widths, multiple)) < 288)
    try:
        check_target(shapes, 64.0, sparsity, multiple)
    except FormatError:
        assert not any(removed)
    else:
        assert any(removed)


@pytest.fixture(scope="module")
def gqa_dir(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = ModelShape(
        hidden_size=64, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32,
        max_positions=64,
    )  # fmt: skip
    model = build_model(shape, 300, 0, seed=0)
    directory = tmp_path_factory.mktemp("gqa") / "m"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.ndim == 2 else 1.0)
    save_model(model, directory, torch.float32, tokenizer)
    return directory


def prune(model: Path, text: Path, out: Path, **options):
    values = {"sparsity": 0.3, "channel_multiple": 8, "samples": 16} | options
    return compress_model(
        "flap",
        model,
        out,
        str(text),
        quiet=True,
        eval_tokens=1000,
        data_options={"sequence_length": 32},
        **values,
    )


def test_a_sliced_model_has_biases_and_loads_as_measured(gqa_dir: Path, text_file: Path, tmp_path: Path):
    result = prune(gqa_dir, text_file, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    shapes = read_layer_shapes(config)
    # A head unit is a sixth of this model, so the nearest sum is within a twelfth.
    assert result.figures["block_sparsity"] == pytest.approx(0.3, abs=1 / 12)
    model = load_model(tmp_path / "out").model
    for layer, shape in zip(model.model.layers, shapes, strict=True):
        assert (
            (layer.mlp.down_proj.bias is not None) == shape.down_proj_bias == (shape.intermediate_size < 64)
        )
        assert (
            (layer.self_attn.o_proj.bias is not None) == shape.o_proj_bias == (shape.num_key_value_heads < 2)
        )
        assert shape.num_attention_heads == 2 * shape.num_key_value_heads
        assert shape.intermediate_size % 8 == 0
    assert any(shape.down_proj_bias or shape.o_proj_bias for shape in shapes)
    again = evaluate_directory(str(tmp_path / "out"), str(text_file), 32, 1000)
    assert again.tokens == result.compressed.tokens


def test_the_bias_is_the_mean_of_what_was_removed(gqa_dir: Path, text_file: Path, tmp_path: Path):
    """With compensation the first layer's FFN output keeps its mean over the calibration tokens."""
    with_bias = prune(gqa_dir, text_file, tmp_path / "b", samples=200)
    without = prune(gqa_dir, text_file, tmp_path / "n", samples=200, compensate=False)
    assert with_bias.figures["layers"] == without.figures["layers"]
    config = json.loads((tmp_path / "n" / "config.json").read_text())
    assert "down_proj_bias" not in json.dumps(config)

    tokenizer = load_model(gqa_dir).tokenizer
    ids = encode_documents(read_documents(str(text_file)), tokenizer)[:6400].long().reshape(200, 32)
    means = {}
    for name, directory in (("dense", gqa_dir), ("b", tmp_path / "b"), ("n", tmp_path / "n")):
        model = load_model(directory).model
        outputs: list[torch.Tensor] = []
        attention = model.model.layers[0].self_attn
        attention.register_forward_hook(lambda _, __, out, outputs=outputs: outputs.append(out[0]))
        with torch.no_grad():
            model(ids)
        means[name] = outputs[0].flatten(0, 1).mean(0)
    assert with_bias.figures["layers"][0]["kv_heads"] == 1
    assert (means["b"] - means["dense"]).norm() < 0.5 * (means["n"] - means["dense"]).norm()
    assert with_bias.compressed.nll < without.compressed.nll + 0.05
