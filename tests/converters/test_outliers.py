"""sparse24 version 2: CSR outliers and fixed activation scales, read, carried through and written."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_maker import CONFIG, llama_tensors, write_checkpoint
from safetensors.torch import load_file

from converters.checkpoint import open_checkpoint
from converters.convert import convert
from converters.readers import make_reader
from converters.readers.base import dense_numbers
from converters.verify import verify
from vllm_sparse.errors import FormatError, UserError

MODULE = "model.layers.0.mlp.up_proj"


@pytest.fixture
def source(tmp_path) -> Path:
    """int8 2:4 weights with outliers on every layer, one layer without any; made with torch's own CSR."""
    convert(
        write_checkpoint(tmp_path / "dense", llama_tensors(torch.float32)), tmp_path / "int8", weights="int8"
    )
    tensors = load_file(tmp_path / "int8/model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for name in [name for name in tensors if name.endswith(".compressed")]:
        module = name.removesuffix(".compressed")
        rows, cols = tensors[f"{module}.shape"].reshape(-1).tolist()
        dense = torch.randn(rows, cols, generator=generator)
        share = 0.0 if "o_proj" in name else 0.02
        dense[torch.rand(rows, cols, generator=generator) >= share] = 0
        csr = dense.to_sparse_csr()
        tensors[f"{module}.outlier_values"] = csr.values()
        tensors[f"{module}.outlier_columns"] = csr.col_indices().to(torch.int32)
        tensors[f"{module}.outlier_row_offsets"] = csr.crow_indices().to(torch.int64)
        tensors[f"{module}.input_scale"] = torch.full((1,), 0.125)
    linear = {
        "pattern": "2:4",
        "weights": "int8",
        "activations": "int8_static",
        "outliers": {"layout": "csr"},
    }
    block = {"quant_method": "sparse24", "format_version": 2, "linear": linear, "ignore": ["lm_head"]}
    config = CONFIG | {"dtype": "float32", "quantization_config": block}
    return write_checkpoint(tmp_path / "src", tensors, config)


def numbers(folder: Path) -> dict[str, np.ndarray]:
    reader = make_reader(open_checkpoint(folder))
    return {entry.name: dense_numbers(entry, reader.load(entry)).numpy() for entry in reader.entries()}


def test_reads_sparse24_outliers(source):
    tensors = load_file(source / "model.safetensors")
    csr = torch.sparse_csr_tensor(
        tensors[f"{MODULE}.outlier_row_offsets"],
        tensors[f"{MODULE}.outlier_columns"].to(torch.int64),
        tensors[f"{MODULE}.outlier_values"],
        size=tuple(tensors[f"{MODULE}.shape"].reshape(-1).tolist()),
    ).to_dense()
    base = numbers(source.parent / "int8")[f"{MODULE}.weight"]
    assert int((csr != 0).sum()) > 20
    assert np.array_equal(numbers(source)[f"{MODULE}.weight"], base + csr.numpy())


def test_writes_sparse24_outliers_and_static_scales(source, tmp_path):
    convert(source, tmp_path / "again")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "again/model.safetensors")
    assert set(before) == set(after)
    assert all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in before)
    block = json.loads((tmp_path / "again/config.json").read_text())["quantization_config"]
    assert block["format_version"] == 2
    assert block["linear"]["outliers"] == {"layout": "csr"}
    assert block["linear"]["activations"] == "int8_static"
    convert(source, tmp_path / "plain", to="dense")
    assert all(np.array_equal(numbers(source)[n], v) for n, v in numbers(tmp_path / "plain").items())
    assert verify(source, tmp_path / "again", logits=False).ok


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("outlier_values", None, "outlier_values' is missing"),
        ("outlier_columns", lambda t: t[:-1], "columns as many as values"),
        ("outlier_columns", lambda t: t.to(torch.int64), "need int32"),
        ("outlier_columns", lambda t: t + 1000, "names a column outside"),
        ("outlier_columns", lambda t: t.flip(0), "strictly ascending"),
        ("outlier_row_offsets", lambda t: t + 1, "must rise from 0"),
        ("outlier_row_offsets", lambda t: t[:-1], "outlier_row_offsets' is"),
        ("input_scale", None, "input_scale is missing"),
        ("outlier_values", lambda t: t * torch.inf, "NaN or Inf"),
        ("input_scale", lambda t: t * torch.nan, "NaN or Inf"),
    ],
)
def test_outliers_that_are_refused(source, tmp_path, part, change, says):
    tensors = load_file(source / "model.safetensors")
    name = f"{MODULE}.{part}"
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors[name]).contiguous()
    config = json.loads((source / "config.json").read_text())
    broken = write_checkpoint(tmp_path / "broken", tensors, config)
    with pytest.raises(UserError, match=says):
        convert(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_outliers_that_the_config_does_not_name(source, tmp_path):
    tensors = load_file(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]["linear"]["outliers"]
    with pytest.raises(FormatError, match=r"names no linear\.outliers"):
        convert(write_checkpoint(tmp_path / "broken", tensors, config), tmp_path / "out")
