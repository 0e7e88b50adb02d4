"""Mag-sp, Wanda-sp, LLM-Pruner and ShortGPT: scores against their definitions, budgets, and exports."""

import json
from pathlib import Path

import pytest
import torch

from converters.train.compress import compress_model
from converters.train.context import Context
from converters.train.llm_pruner import (
    LlmPrunerRecipe,
    accumulate_gradients,
    group_importance,
    layer_sparsities,
)
from converters.train.loading import load_model
from converters.train.models import ModelShape, build_model
from converters.train.saving import save_model
from converters.train.shortgpt import block_influence, dropped_layers, without_layers
from converters.train.structured import LayerShape, read_layer_shapes
from converters.train.uniform import group_price, uniform_counts
from converters.train.wanda_sp import magnitude_columns, wanda_columns
from vllm_sparse.errors import FormatError, UnsupportedError

from .conftest import heldout_perplexity

SHAPE = LayerShape(4, 2, 64)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def gqa_dir(request: pytest.FixtureRequest, tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers, two query heads a KV head, untrained but far from uniform."""
    shape = ModelShape(
        family=request.param, hidden_size=64, intermediate_size=64, num_layers=4, num_heads=4, num_kv_heads=2,
        head_dim=32, max_positions=64,
    )  # fmt: skip
    model = build_model(shape, 300, 0, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.ndim == 2 else 1.0)
    directory = tmp_path_factory.mktemp(request.param) / "m"
    save_model(model, directory, torch.float32, tokenizer)
    return directory


def prune(method: str, model: Path, text: Path, out: Path, **options):
    return compress_model(
        method, model, out, str(text), quiet=True, eval_tokens=1000, data_options={"sequence_length": 32},
        **options,
    )  # fmt: skip


def test_column_scores_equal_their_definition():
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(5, 7, generator=generator), torch.randn(40, 7, generator=generator)
    expected = [
        sum(abs(float(weight[i, j])) * float(inputs[:, j].norm()) for i in range(5)) / 5 for j in range(7)
    ]
    assert wanda_columns(weight, inputs.square().sum(0)).tolist() == pytest.approx(expected, rel=1e-5)
    assert magnitude_columns(weight).tolist() == pytest.approx(
        [float(weight[:, j].norm()) for j in range(7)], rel=1e-5
    )


def test_a_layer_loses_the_share_asked_for():
    # A group holds q and o of 2 heads, k and v of one: 6 heads of 32 rows, in channels of 3.
    assert group_price(SHAPE, 32) == 64
    # 192 channels' worth; one group of 64 goes and 32 channels, or no group and 38.4 channels.
    assert uniform_counts(SHAPE, 32, 0.5, 1) == (1, 32)
    assert uniform_counts(SHAPE, 32, 0.2, 1) == (2, 26)
    assert uniform_counts(SHAPE, 32, 0.2, 8) == (2, 24)
    assert uniform_counts(SHAPE, 32, 0.0, 48) == (2, 64)
    assert uniform_counts(LayerShape(0, 0, 64), 32, 0.5, 8) == (0, 32)
    assert uniform_counts(LayerShape(4, 2, 0), 32, 0.5, 8) == (1, 0)
    with pytest.raises(FormatError, match="would leave 6 of a layer's 64 FFN channels beside 2 of its 2"):
        uniform_counts(SHAPE, 32, 0.3, 16)


def test_taylor_importance_is_what_single_elements_add_up_to(gqa_dir: Path):
    model = load_model(gqa_dir).model
    ids = torch.randint(0, 300, (3, 16), generator=torch.Generator().manual_seed(1))
    accumulate_gradients(model, ids, quiet=True)
    layer = model.model.layers[1]
    groups, channels = group_importance(layer, SHAPE)
    # The same gradient from the whole batch at once.
    other = load_model(gqa_dir).model
    other(input_ids=ids, labels=ids).loss.backward()
    a, m = other.model.layers[1].self_attn, other.model.layers[1].mlp

    def salience(linear):
        return (linear.weight * linear.weight.grad).abs().detach()

    for group in range(2):
        q, kv = slice(group * 64, group * 64 + 64), slice(group * 32, group * 32 + 32)
        expected = salience(a.q_proj)[q].sum() + salience(a.o_proj)[:, q].sum()
        expected += salience(a.k_proj)[kv].sum() + salience(a.v_proj)[kv].sum()
        assert groups[group].item() == pytest.approx(expected.item(), rel=1e-3)
    expected = (
        salience(m.gate_proj)[5].sum() + salience(m.up_proj)[5].sum() + salience(m.down_proj)[:, 5].sum()
    )
    assert channels[5].item() == pytest.approx(expected.item(), rel=1e-3)


def test_end_layers_stay_whole_and_the_rest_pays():
    recipe = LlmPrunerRecipe(model="m", sparsity=0.2)
    shares = layer_sparsities(32, recipe)
    assert shares[:4] == [0.0] * 4
    assert shares[-2:] == [0.0] * 2
    assert shares[4:-2] == pytest.approx([0.2 * 32 / 26] * 26)  # 24.6 %; the paper says 25 %
    assert layer_sparsities(3, recipe) == pytest.approx([0.2] * 3)
    with pytest.raises(FormatError, match=r"cannot be met: 2 \+ 1 of 4 layers are protected"):
        layer_sparsities(4, LlmPrunerRecipe(model="m", sparsity=0.5, protect_first=0.5, protect_last=0.3))


def test_block_influence_and_the_layers_it_drops():
    before = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    after = torch.tensor([[2.0, 0.0], [3.0, 0.0], [1.0, 1.0]])
    # Cosines 1, 0, 1.
    assert block_influence(before, after).item() == pytest.approx(1 / 3)
    influence = torch.tensor([0.9, 0.1, 0.3, 0.05, 0.8])
    assert dropped_layers(influence, 0.4) == [1, 3]
    for share in (0.05, 0.95):
        with pytest.raises(FormatError, match=r"whole layers; ask for a share between 0.200 and 0.800"):
            dropped_layers(influence, share)
    config = {
        "num_hidden_layers": 3, "layer_types": ["a", "b", "c"], "eos_token_id": [1, 2, 3],
        "per_layer_config": {"0": {"intermediate_size": 8}, "2": {"intermediate_size": 16}},
    }  # fmt: skip
    assert without_layers(config, [1]) == {
        "num_hidden_layers": 2, "layer_types": ["a", "c"], "eos_token_id": [1, 2, 3],
        "per_layer_config": {"0": {"intermediate_size": 8}, "1": {"intermediate_size": 16}},
    }  # fmt: skip


@pytest.mark.parametrize("method", ["magnitude-sp", "wanda-sp", "llm-pruner"])
def test_a_sliced_model_has_the_asked_size_and_answers_as_measured(
    method: str, gqa_dir: Path, text_file: Path, tmp_path: Path
):
    options = {} if method == "magnitude-sp" else {"samples": 8}
    result = prune(method, gqa_dir, text_file, tmp_path / "out", sparsity=0.5, channel_multiple=8, **options)
    assert result.figures["block_sparsity"] == pytest.approx(0.5, abs=0.01)
    shapes = read_layer_shapes(json.loads((tmp_path / "out" / "config.json").read_text()))
    assert shapes == [LayerShape(2, 1, 32)] * 4
    again = heldout_perplexity(tmp_path / "out", text_file, 32, 1000)
    assert again == pytest.approx(result.compressed.perplexity, rel=1e-5)
    assert again != pytest.approx(result.dense.perplexity, rel=1e-3)


def test_shortgpt_drops_the_layer_that_does_nothing(gqa_dir: Path, text_file: Path, tmp_path: Path):
    loaded = load_model(gqa_dir)
    with torch.no_grad():
        loaded.model.model.layers[2].self_attn.o_proj.weight.zero_()
        loaded.model.model.layers[2].mlp.down_proj.weight.zero_()
    save_model(loaded.model, tmp_path / "idle", torch.float32, loaded.tokenizer)
    result = prune("shortgpt", tmp_path / "idle", text_file, tmp_path / "out", sparsity=0.25, samples=8)
    assert result.figures["dropped_layers"] == [2]
    assert result.figures["block_influence"][2] == pytest.approx(0, abs=1e-6)
    assert min(result.figures["block_influence"][i] for i in (0, 1, 3)) > 1e-3
    assert result.compressed.perplexity == pytest.approx(result.dense.perplexity, rel=1e-5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 3
    assert config["architectures"] == json.loads((gqa_dir / "config.json").read_text())["architectures"]
    again = heldout_perplexity(tmp_path / "out", text_file, 32, 1000)
    assert again == pytest.approx(result.compressed.perplexity, rel=1e-5)


def test_a_family_without_slices_and_impossible_targets_are_refused(
    gqa_dir: Path, text_file: Path, tmp_path: Path
):
    config = json.loads((gqa_dir / "config.json").read_text())
    with pytest.raises(FormatError, match="ask for less, or lower channel_multiple"):
        prune("magnitude-sp", gqa_dir, text_file, tmp_path / "out", sparsity=0.45, channel_multiple=64)
    with pytest.raises(FormatError, match="is 0 whole layers"):
        prune("shortgpt", gqa_dir, text_file, tmp_path / "out", sparsity=0.05)
    from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

    gemma = Gemma2Config(
        vocab_size=300, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=64, pad_token_id=0, eos_token_id=0,
        bos_token_id=0,
    )  # fmt: skip
    assert config["model_type"] != gemma.model_type
    save_model(
        Gemma2ForCausalLM(gemma), tmp_path / "g", torch.float32, AutoTokenizer.from_pretrained(gqa_dir)
    )
    for method in ("magnitude-sp", "wanda-sp", "llm-pruner", "hard-concrete"):
        with pytest.raises(UnsupportedError, match="'gemma2' cannot be pruned structurally here"):
            prune(method, tmp_path / "g", text_file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "finer"), [("flap", 32), ("magnitude-sp", 8), ("wanda-sp", 8), ("llm-pruner", 8)]
)
def test_a_multiple_that_rounds_everything_away_is_refused_before_the_work(
    method: str, finer: int, gqa_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def work(*_: object) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr(Context, "calibration_sequences", work)
    message = f"sparsity 0.04 would remove nothing: .* or all; set channel_multiple to {finer} or less"
    with pytest.raises(FormatError, match=message):
        prune(method, gqa_dir, text_file, tmp_path / "out", sparsity=0.04, channel_multiple=64)
    assert not (tmp_path / "out").exists()


def test_a_multiple_that_keeps_every_channel_of_every_ffn_is_refused(
    gqa_dir: Path, text_file: Path, tmp_path: Path
):
    with pytest.raises(FormatError, match=r"keep_ratio 0\.9 would remove nothing: .*multiple_of 64"):
        prune("structured-ffn", gqa_dir, text_file, tmp_path / "out", keep_ratio=0.9, multiple_of=64)
