"""Path-integral scores against closed forms, and ReQuant: splits, budgets, a run end to end."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from converters.convert import convert
from converters.quantize import unpack_int4
from converters.train.compress import compress_model
from converters.train.loading import load_model
from converters.train.path_integral import path_integral, quadrature
from converters.train.requant import largest, layer_budgets, split_weight
from vllm_sparse.errors import FormatError
from vllm_sparse.sparse24 import decompress, group_nonzeros
from vllm_sparse.sparse24.csr import CsrMatrix

from .conftest import heldout_perplexity


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_points_on_the_path():
    assert quadrature(4, "right") == [0.25, 0.5, 0.75, 1.0]
    assert quadrature(4, "midpoint") == [0.125, 0.375, 0.625, 0.875]


def test_signed_contributions_add_up_to_the_change_of_the_loss():
    w = nn.Parameter(torch.randn(6, dtype=torch.float64, generator=generator()))
    change = torch.randn(6, dtype=torch.float64, generator=generator(1))
    matrix = torch.randn(6, 6, dtype=torch.float64, generator=generator(2))
    matrix = matrix @ matrix.T

    def loss(at: torch.Tensor) -> torch.Tensor:
        return 0.5 * at @ matrix @ at + at.sum()

    start = w.detach().clone()
    real = float(loss(start + change) - loss(start))
    (mid,) = path_integral([w], [change], lambda: loss(w).backward(), 1, "midpoint")
    # On a quadratic the gradient at the middle is the mean gradient, element by element.
    assert torch.allclose(mid, change * (matrix @ (start + change / 2) + 1.0))
    assert float(mid.sum()) == pytest.approx(real, rel=1e-12)
    errors = []
    for points in (4, 8, 16):
        (right,) = path_integral([w], [change], lambda: loss(w).backward(), points, "right")
        errors.append(float(right.sum()) - real)
    assert errors[0] / errors[1] == pytest.approx(2, rel=1e-6)
    assert errors[1] / errors[2] == pytest.approx(2, rel=1e-6)
    assert torch.equal(w, start)
    assert w.grad is None

    errors = []
    for points in (2, 4, 8):
        (found,) = path_integral([w], [change], lambda: w.exp().sum().backward(), points, "midpoint")
        errors.append(abs(float(found.sum() - ((start + change).exp().sum() - start.exp().sum()))))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.1)


def test_a_split_is_two_of_four_in_int4_beside_exact_weights():
    weight = torch.randn(8, 64, generator=generator(3))
    exact = largest(weight.abs(), 20)
    assert int(exact.sum()) == 20
    split = split_weight(weight, exact, 32)
    assert split.scale.shape == (8, 2)
    assert int(split.values.abs().max()) <= 7
    assert int(group_nonzeros(split.values).max()) <= 2
    assert torch.all(split.values[exact] == 0)
    plain = split_weight(weight, torch.zeros_like(exact), 32)
    # With the largest gone the range is smaller, and so is the error of what stays.
    assert float(split.scale.sum()) < float(plain.scale.sum())
    lost = (weight - split.base - torch.where(exact, weight, 0)).square().sum()
    assert float(lost) < float((weight - plain.base).square().sum())


def test_layers_share_outliers_by_their_totals():
    assert layer_budgets({"a": 3.0, "b": 1.0}, {"a": 1000, "b": 1000}, 0.01) == {"a": 15, "b": 5}
    assert layer_budgets({"a": 1.0, "b": 0.0}, {"a": 50, "b": 5000}, 0.01) == {"a": 5, "b": 0}
    assert layer_budgets({"a": 0.0}, {"a": 50}, 0.5) == {"a": 0}


def requantise(model: Path, text_file: Path, out: Path, **options):
    values = {"samples": 8, "points": 8, "outliers": 0.01, "significant": 0.01} | options
    return compress_model(
        "requant", model, out, str(text_file), quiet=True, eval_tokens=2000, save_dtype="float32",
        data_options={"sequence_length": 32}, **values,
    )  # fmt: skip


def test_a_run_predicts_the_loss_helps_and_saves_what_it_measured(
    trained_dir: Path, text_file: Path, tmp_path: Path
):
    result = requantise(trained_dir, text_file, tmp_path / "out")
    first = result.figures["loss_change_without_outliers"]
    assert first["predicted"] == pytest.approx(first["measured"], rel=0.1)
    assert result.figures["loss_change"] < 0.8 * first["measured"]
    assert result.figures["exact_share"] == pytest.approx(0.02, abs=0.002)
    bare = requantise(trained_dir, text_file, tmp_path / "bare", outliers=0.0, significant=0.0)
    assert result.compressed.nll < bare.compressed.nll
    assert bare.figures["exact_share"] == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 2
    assert config["linear"]["outliers"] == {"layout": "csr"}
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    rows, columns = tensors[f"{name}.shape"].flatten().tolist()
    base = decompress(unpack_int4(tensors[f"{name}.compressed"]), tensors[f"{name}.bitmask"]).float()
    scale = tensors[f"{name}.weight_scale"].repeat_interleave(
        columns // tensors[f"{name}.weight_scale"].shape[1], 1
    )
    sparse = CsrMatrix(
        *(tensors[f"{name}.outlier_{part}"] for part in ("values", "columns", "row_offsets")), columns
    )
    sparse.validate(rows)
    dense = load_model(trained_dir).model.model.layers[1].mlp.up_proj.weight
    outliers = sparse.dense()
    assert torch.equal(outliers, torch.where(outliers != 0, dense, 0))
    # Rounding is off by at most half a step wherever the base kept the weight.
    kept = base != 0
    assert torch.all(((base * scale - dense).abs() <= scale / 2 + 1e-6) | ~kept)
    again = heldout_perplexity(tmp_path / "out", text_file, 32, 2000)
    assert again == pytest.approx(result.compressed.perplexity, rel=1e-5)

    # Through the converter: the same bytes, and a dense model that is the sum.
    convert(tmp_path / "out", tmp_path / "packed")
    again = load_file(tmp_path / "packed" / "model.safetensors")
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)
    packed = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert packed["linear"] == config["linear"]
    assert packed["format_version"] == 2
    convert(tmp_path / "out", tmp_path / "dense", to="dense")
    whole = load_file(tmp_path / "dense" / "model.safetensors")[f"{name}.weight"]
    assert torch.allclose(whole, base * scale + outliers, atol=1e-6)

    broken = tmp_path / "broken"
    shutil.copytree(tmp_path / "out", broken)
    damaged = {**tensors, f"{name}.outlier_columns": tensors[f"{name}.outlier_columns"] + columns}
    save_file(damaged, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match="outlier_columns' names a column outside"):
        load_model(broken)
    missing = {key: value for key, value in tensors.items() if key != f"{name}.outlier_values"}
    save_file(missing, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match="outlier_values' is missing"):
        load_model(broken)


def test_what_is_measured_is_what_is_saved_in_half_precision_too(
    trained_dir: Path, text_file: Path, tmp_path: Path
):
    """The exact weights are rounded to bfloat16, the scales of the others are not."""
    weights = load_file(trained_dir / "model.safetensors")
    # Weights with more digits than bfloat16 has.
    exact = {name: weight.float() * 1.003 for name, weight in weights.items()}
    source = tmp_path / "source"
    shutil.copytree(trained_dir, source)
    save_file(exact, source / "model.safetensors", metadata={"format": "pt"})
    result = compress_model(
        "requant", source, tmp_path / "out", str(text_file), quiet=True, eval_tokens=2000,
        data_options={"sequence_length": 32}, samples=4, points=1, outliers=0.05, save_dtype="bfloat16",
    )  # fmt: skip
    again = heldout_perplexity(tmp_path / "out", text_file, 32, 2000)
    assert again == pytest.approx(result.compressed.perplexity, rel=1e-6)


def test_bad_input_is_refused(trained_dir: Path, text_file: Path, tmp_path: Path):
    with pytest.raises(FormatError, match=r"outliers: Input should be less than 0.1"):
        requantise(trained_dir, text_file, tmp_path / "out", outliers=0.5)
    with pytest.raises(FormatError, match="rule: Input should be 'midpoint' or 'right'"):
        requantise(trained_dir, text_file, tmp_path / "out", rule="left")
    assert not (tmp_path / "out").exists()
