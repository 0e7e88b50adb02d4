"""The quantization_config blocks that releases of llm-compressor wrote, taken as they were meant.

``llmcompressor_configs`` has one file for each: release, recipe, and the block, copied from config.json of a
small Llama.
"""

import json
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.checkpoint import open_checkpoint
from converters.convert import convert
from converters.inspect import LayerReport
from converters.readers import detect_format, make_reader
from converters.serving import serving_of
from tests.serving import checkpoints as ck
from tests.serving.engine import engine
from tests.serving.foreign import write_pruned
from vllm_sparse.errors import UnsupportedError
from vllm_sparse.kernels.base import ActivationQuant, WeightFormat
from vllm_sparse.quantization import report
from vllm_sparse.quantization.config import METHOD_NAME, Sparse24Config
from vllm_sparse.quantization.scheme import ScaleLayout, SparseScheme, Storage, WeightQuant
from vllm_sparse.quantization.spec import StaticQuant

CONFIGS = Path(__file__).parent / "llmcompressor_configs"
CHANNEL = ScaleLayout.CHANNEL
SERVED = {
    "0.6.0.1-sparsegpt": SparseScheme(Storage.BITMASK, None, ActivationQuant.NONE),
    "0.6.0.1-fp8-dynamic": SparseScheme(
        Storage.BITMASK, WeightQuant(WeightFormat.FP8_E4M3, CHANNEL), ActivationQuant.FP8_PER_TOKEN
    ),
    "0.10.0.2-sparsegpt": SparseScheme(Storage.BITMASK, None, ActivationQuant.NONE),
    "0.10.0.2-sparsegpt-uncompressed": SparseScheme(Storage.DENSE_WITH_ZEROS, None, ActivationQuant.NONE),
    "0.10.0.2-fp8-dynamic": SparseScheme(
        Storage.BITMASK, WeightQuant(WeightFormat.FP8_E4M3, CHANNEL), ActivationQuant.FP8_PER_TOKEN
    ),
    "0.10.0.2-fp8-static": SparseScheme(
        Storage.BITMASK,
        WeightQuant(WeightFormat.FP8_E4M3, ScaleLayout.TENSOR),
        ActivationQuant.NONE,
        StaticQuant.FP8,
    ),
    "0.10.0.2-w8a8": SparseScheme(
        Storage.BITMASK, WeightQuant(WeightFormat.INT8, CHANNEL), ActivationQuant.INT8_PER_TOKEN
    ),
}
CONVERTED = {
    "0.3.1-sparsegpt": "sparse-bitmask",
    "0.3.1-w4a16": "marlin-24",
    "0.6.0.1-w4a16-stages": "marlin-24",
    "0.10.0.2-w4a16-stages": "marlin-24",
}
# Quantised weights stored whole, zeros and all: vLLM's own kernels serve them, dense.
STOCK = ("0.3.1-w8a8", "0.10.0.2-fp8-kv-cache")
# Each config group with a format of its own.
MIXED = "0.10.0.2-mixed"
# The model's weights beside the scales that would quantise them.
UNQUANTISED = "0.10.0.2-fp8-uncompressed"


def block_of(name: str) -> dict[str, Any]:
    return json.loads((CONFIGS / f"{name}.json").read_text())["quantization_config"]


def checkpoint_with(name: str, folder: Path) -> Path:
    """A folder that says what the tool's said; its one tensor is not looked at."""
    folder.mkdir()
    save_file({"model.norm.weight": torch.ones(4)}, folder / "model.safetensors")
    config = ck.SHAPE | {"architectures": ["LlamaForCausalLM"], "quantization_config": block_of(name)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_every_config_has_its_expectation() -> None:
    assert {path.stem for path in CONFIGS.glob("*.json")} == {*SERVED, *CONVERTED, *STOCK, MIXED, UNQUANTISED}


@pytest.mark.parametrize("name", SERVED)
def test_what_is_served_as_it_is(name: str) -> None:
    block = block_of(name)
    assert Sparse24Config.override_quantization_method(block, None) == METHOD_NAME
    config = Sparse24Config.from_config(block)
    assert isinstance(config, Sparse24Config)
    assert config.table is not None
    for module in ("self_attn.q_proj", "mlp.down_proj"):
        assert config.table.sparse_scheme([f"model.layers.1.{module}"], "Linear") == SERVED[name]
    assert config.table.sparse_scheme(["lm_head"], "Linear") is None


@pytest.mark.parametrize("name", CONVERTED)
def test_what_has_to_be_converted_says_so(name: str, tmp_path: Path) -> None:
    """Marlin's packing came with a sparsity_config of format dense, which is no left-over there."""
    block, told = block_of(name), f"stored as {CONVERTED[name]}.*vllm-sparse convert"
    assert Sparse24Config.override_quantization_method(block, None) == METHOD_NAME
    with pytest.raises(UnsupportedError, match=told):
        Sparse24Config.from_config(block)
    checkpoint = open_checkpoint(checkpoint_with(name, tmp_path / "src"))
    assert detect_format(checkpoint) == CONVERTED[name]
    serving = serving_of(checkpoint)
    assert serving.verdict([]).startswith(f"refused: this checkpoint is stored as {CONVERTED[name]}")
    assert serving.warnings == []


@pytest.mark.parametrize("name", STOCK)
def test_quantised_weights_stored_whole_go_to_vllm(name: str, tmp_path: Path) -> None:
    block = block_of(name)
    assert Sparse24Config.override_quantization_method(block, None) == METHOD_NAME
    assert not isinstance(Sparse24Config.from_config(block), Sparse24Config)
    checkpoint = open_checkpoint(checkpoint_with(name, tmp_path / "src"))
    assert detect_format(checkpoint) == "dense"
    assert serving_of(checkpoint).verdict([]).startswith("served by vLLM itself")


def test_groups_of_different_formats(tmp_path: Path) -> None:
    """Format mixed-precision says no more than that the groups' own formats differ."""
    config = Sparse24Config.from_config(block_of(MIXED))
    assert isinstance(config, Sparse24Config)
    assert config.table is not None
    for module, alike in (("self_attn.q_proj", "0.10.0.2-w8a8"), ("mlp.up_proj", "0.10.0.2-fp8-dynamic")):
        assert config.table.sparse_scheme([f"model.layers.0.{module}"], "Linear") == SERVED[alike]
    folder = checkpoint_with(MIXED, tmp_path / "src")
    assert make_reader(open_checkpoint(folder)).format == "sparse-24-bitmask"
    written = json.loads((folder / "config.json").read_text())
    for group in written["quantization_config"]["config_groups"].values():
        group["format"] = None
    (folder / "config.json").write_text(json.dumps(written))
    with pytest.raises(UnsupportedError, match="mixed-precision"):
        make_reader(open_checkpoint(folder))


def test_weights_left_unquantised_are_refused(tmp_path: Path) -> None:
    """vLLM has no scheme for them, and packed as 2:4 they would be rounded like quantised ones."""
    told = "unquantised beside their scales.*save_compressed=True"
    with pytest.raises(UnsupportedError, match=told):
        Sparse24Config.from_config(block_of(UNQUANTISED))
    checkpoint = open_checkpoint(checkpoint_with(UNQUANTISED, tmp_path / "src"))
    assert serving_of(checkpoint).verdict([]).startswith("refused: config.json describes quantised weights")
    with pytest.raises(UnsupportedError, match=told):
        make_reader(checkpoint)


def test_only_plain_weights_are_promised_to_run_sparse_at_once(tmp_path: Path) -> None:
    """``--quantization sparse24`` leaves quantised ones to vLLM."""
    checkpoint = open_checkpoint(checkpoint_with("0.3.1-w8a8", tmp_path / "src"))
    layer = LayerReport(
        "model.layers.0.mlp.up_proj.weight",
        "linear",
        (8, 8),
        "int8",
        "dense",
        64,
        0.5,
        True,
        "dense",
        None,
        "",
    )
    verdict = serving_of(checkpoint).verdict([layer])
    assert "run sparse after: vllm-sparse convert" in verdict
    assert "--quantization" not in verdict


def write_int8(family: str, folder: Path) -> Path:
    """Each row's largest weight is 127 steps."""
    if family == "llama":
        return ck.write_quantized(ck.pruned_model(family, False), folder / "int8", "int", activations=False)
    convert(write_pruned(family, folder / "dense"), folder / "int8", weights="int8")
    return folder / "int8"


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("family", "lossy"), [("llama", ".compressed"), ("qwen3-moe", "experts.*.compressed")]
)
def test_lost_values_are_told_at_load(
    family: str, lossy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row's largest weight left out, as compressed-tensors leaves out values of -128."""
    said: list[str] = []
    monkeypatch.setattr(report.logger, "warning", lambda text, *values: said.append(text % values))
    folder = write_int8(family, tmp_path)
    with engine(folder):
        assert said == []
    tensors = load_file(folder / "model.safetensors")
    lost = {name: x.where(x.abs() < 127, 0) for name, x in tensors.items() if fnmatch(name, f"*{lossy}")}
    save_file({**tensors, **lost}, folder / "model.safetensors", metadata={"format": "pt"})
    with engine(folder):
        (warning,) = said
    assert re.match(
        r"\d+ of \d+ rows of int8 weights look as if their largest value, -128, was left out", warning
    )
    assert warning.endswith("convert it: vllm-sparse convert SRC DST")
