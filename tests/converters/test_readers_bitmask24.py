"""Broken ``sparse-24-bitmask`` checkpoints, and quantised ones."""

import json

import pytest
import torch
from checkpoint_maker import CONFIG, llama_tensors, write_checkpoint
from safetensors.torch import load_file

from converters.checkpoint import open_checkpoint
from converters.convert import convert
from converters.readers import detect_format, make_reader
from converters.readers.base import dequantize
from vllm_sparse.errors import FormatError, NumericsError, UnsupportedError, UserError

NAME = "model.layers.0.mlp.up_proj"


@pytest.fixture
def packed(make_checkpoint, tmp_path):
    """Tensors and config of a packed checkpoint, to be damaged."""

    def make(weights: str = "keep"):
        convert(make_checkpoint("clean"), tmp_path / "packed", weights=weights)
        return (
            load_file(tmp_path / "packed/model.safetensors"),
            json.loads((tmp_path / "packed/config.json").read_text()),
        )

    return make


def refused(tmp_path, tensors, config, error, says):
    source = write_checkpoint(tmp_path / "broken", tensors, config)
    before = {path: path.read_bytes() for path in source.iterdir()}
    for to in ("sparse24", "dense"):
        with pytest.raises(error, match=says) as caught:
            convert(source, tmp_path / "out", to=to)
        assert isinstance(caught.value, UserError)
    assert {path: path.read_bytes() for path in source.iterdir()} == before
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_wrong_popcount(packed, tmp_path):
    tensors, config = packed()
    tensors[f"{NAME}.bitmask"][5, 2] ^= 0b1
    refused(tmp_path, tensors, config, FormatError, rf"{NAME}: bitmask is not 2:4")


def test_wrong_shape(packed, tmp_path):
    tensors, config = packed()
    tensors[f"{NAME}.shape"] = torch.tensor([[64], [96]])
    refused(tmp_path, tensors, config, FormatError, rf"{NAME}: declared shape \[64, 96\] disagrees")


@pytest.mark.parametrize("value", [[[-96], [64]], [[0], [0]], [[1 << 62], [1 << 62]]])
def test_absurd_shape(packed, tmp_path, value):
    tensors, config = packed()
    tensors[f"{NAME}.shape"] = torch.tensor(value)
    refused(tmp_path, tensors, config, FormatError, "disagrees")


@pytest.mark.parametrize("part", ["bitmask", "shape"])
def test_missing_part(packed, tmp_path, part):
    tensors, config = packed()
    del tensors[f"{NAME}.{part}"]
    refused(tmp_path, tensors, config, FormatError, f"{NAME}.{part}.*missing")


def test_bitmask_alone(packed, tmp_path):
    tensors, config = packed()
    del tensors[f"{NAME}.compressed"]
    refused(tmp_path, tensors, config, FormatError, "no matching .compressed")


def test_dense_and_packed(packed, tmp_path):
    tensors, config = packed()
    tensors[f"{NAME}.weight"] = torch.zeros(96, 64)
    refused(tmp_path, tensors, config, FormatError, "both dense and packed")


def test_packed_tensors_without_config(packed, tmp_path):
    tensors, _ = packed()
    refused(tmp_path, tensors, CONFIG, FormatError, "no sparsity_config")


def test_config_without_packed_tensors(packed, tmp_path):
    _, config = packed()
    refused(tmp_path, llama_tensors(), config, FormatError, r"no tensor is called \*\.compressed")


def test_wrong_bitmask_size(packed, tmp_path):
    tensors, config = packed()
    tensors[f"{NAME}.bitmask"] = tensors[f"{NAME}.bitmask"][:, :4].contiguous()
    refused(tmp_path, tensors, config, FormatError, r"needs uint8 \[96, 8\]")


def test_nan_in_values(packed, tmp_path):
    tensors, config = packed()
    tensors[f"{NAME}.compressed"][0, 0] = float("nan")
    refused(tmp_path, tensors, config, NumericsError, "NaN or Inf")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_bad_scales(packed, tmp_path, weights, value):
    tensors, config = packed(weights)
    tensors[f"{NAME}.weight_scale"][7] = value
    refused(tmp_path, tensors, config, NumericsError, f"{NAME}.weight_scale")


def test_scale_of_wrong_shape_or_missing(packed, tmp_path):
    tensors, config = packed("int8")
    scale = tensors.pop(f"{NAME}.weight_scale")
    refused(tmp_path, tensors, config, FormatError, "weight_scale is missing")
    tensors[f"{NAME}.weight_scale"] = scale[:5].contiguous()
    refused(tmp_path, tensors, config, FormatError, "needs 1, 96 or")


def test_zero_points(packed, tmp_path):
    tensors, config = packed("int8")
    tensors[f"{NAME}.weight_zero_point"] = torch.ones(96, 1, dtype=torch.int8)
    refused(tmp_path, tensors, config, UnsupportedError, "asymmetric")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sparsity_config": {"format": "os.system", "sparsity_structure": "2:4"}}, "sparse-24-bitmask"),
        ({"sparsity_config": {"format": "sparse-24-bitmask", "sparsity_structure": "3:4"}}, "2:4"),
        ({"format": "__import__"}, "int-quantized"),
        ({"ignore": ["re:("]}, "invalid regular expression"),
        ({"ignore": ["re:" + "a" * 10_000]}, "characters"),
        ({"ignore": "lm_head"}, "list"),
        ({"quant_method": "awq"}, "awq"),
    ],
)
def test_config_values_are_closed(packed, tmp_path, change, says):
    tensors, config = packed()
    config["quantization_config"] |= change
    refused(tmp_path, tensors, config, UserError, says)


def test_regex_bomb_is_stopped(make_checkpoint, tmp_path):
    tensors = llama_tensors()
    name = "model.layers.0." + "a" * 60 + "!.up_proj.weight"
    tensors[name] = tensors[f"{NAME}.weight"].clone()
    block = {
        "quant_method": "compressed-tensors",
        "sparsity_config": {
            "format": "dense",
            "sparsity_structure": "2:4",
            "targets": [r"re:.*\.(a|a|aa)+$"],
        },
    }
    source = make_checkpoint(tensors=tensors, config=CONFIG | {"quantization_config": block})
    with pytest.raises(FormatError, match="regular expression"):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize("holder", ["quantization_config", "compression_config", "text_config"])
def test_every_place_of_the_block_is_found(packed, tmp_path, holder):
    tensors, config = packed()
    block = config.pop("quantization_config")
    config |= {"text_config": {"quantization_config": block}} if holder == "text_config" else {holder: block}
    source = write_checkpoint(tmp_path / "moved", tensors, config)
    assert detect_format(open_checkpoint(source)) == "sparse-24-bitmask"
    convert(source, tmp_path / "back", to="dense")
    back = load_file(tmp_path / "back/model.safetensors")
    assert torch.equal(back[f"{NAME}.weight"], llama_tensors()[f"{NAME}.weight"])


@pytest.mark.parametrize(("weights", "top"), [("int8", 127), ("fp8", 448), ("int4", 7), ("w4a8", 7)])
def test_quantised_weights(make_checkpoint, tmp_path, weights, top):
    source = make_checkpoint()
    convert(source, tmp_path / "q", weights=weights)
    dense = llama_tensors()[f"{NAME}.weight"].float()
    tensors = load_file(tmp_path / "q/model.safetensors")
    scale = tensors[f"{NAME}.weight_scale"]
    assert scale.dtype == torch.float32
    assert scale.shape == ((96, 2) if top == 7 else (96, 1))
    if top == 7:
        linear = json.loads((tmp_path / "q/config.json").read_text())["quantization_config"]["linear"]
        assert linear["weights"] == "int4"
        assert linear["activations"] == ("int8_per_token" if weights == "w4a8" else "none")
        return
    reader = make_reader(open_checkpoint(tmp_path / "q"))
    entry = next(entry for entry in reader.entries() if entry.name == f"{NAME}.weight")
    loaded = reader.load(entry)
    got = dequantize(loaded.weight, loaded.scale(entry))
    assert bool((got[dense == 0] == 0).all())
    step = scale if weights == "int8" else dense.abs() / 8
    assert bool(((got - dense).abs() <= step / 2 + 1e-6 * scale + 2**-9 * scale).all())
    assert torch.allclose(dense.abs().amax(-1), got.abs().amax(-1), rtol=1e-3)
    assert int(loaded.weight.float().abs().max()) == top
    block = json.loads((tmp_path / "q/config.json").read_text())["quantization_config"]
    assert block["format"] == ("int-quantized" if weights == "int8" else "float-quantized")
    assert block["config_groups"]["group_0"]["input_activations"]["strategy"] == "token"


def test_negative_zeros_of_fp8_are_cleared_and_noted(packed, tmp_path):
    tensors, config = packed("fp8")
    values = tensors[f"{NAME}.compressed"].view(torch.uint8)
    values[3, 4] = 0x80
    source = write_checkpoint(tmp_path / "minus", tensors, config)
    report = convert(source, tmp_path / "out")
    assert report.notes == (f"{NAME}: 1 fp8 values of -0.0 written as 0.0",)
    assert (
        int(load_file(tmp_path / "out/model.safetensors")[f"{NAME}.compressed"].view(torch.uint8)[3, 4]) == 0
    )
    assert report.notes[0] in json.loads((tmp_path / "out/vllm-sparse-manifest.json").read_text())["notes"]


def test_requantising_is_refused_and_keeping_is_exact(packed, tmp_path):
    tensors, _ = packed("int8")
    with pytest.raises(UnsupportedError, match="int8 already"):
        convert(tmp_path / "packed", tmp_path / "out", weights="fp8")
    convert(tmp_path / "packed", tmp_path / "again")
    again = load_file(tmp_path / "again/model.safetensors")
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    first, second = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("packed", "again")
    )
    # Rounding to int8 made a few more zeros, which the second conversion counts.
    for config in (first, second):
        assert config["quantization_config"]["sparsity_config"].pop("global_sparsity") == pytest.approx(
            0.5, abs=0.05
        )
    assert first == second


@pytest.mark.parametrize(("weights", "dtype"), [("int8", torch.int8), ("fp8", torch.float8_e4m3fn)])
def test_quantised_weights_stored_whole(packed, tmp_path, weights, dtype):
    """W8A8 stored dense, as writers without sparse compression leave it: packed, and back to floats."""
    tensors, config = packed(weights)
    reader = make_reader(open_checkpoint(tmp_path / "packed"))
    whole = {entry.name: reader.load(entry).weight for entry in reader.entries()}
    whole |= {name: tensor for name, tensor in tensors.items() if name.endswith("weight_scale")}
    assert whole[f"{NAME}.weight"].dtype == dtype
    config["quantization_config"]["sparsity_config"]["format"] = "dense"
    source = write_checkpoint(tmp_path / "whole", whole, config)
    assert convert(source, tmp_path / "out").packed == 14
    again = load_file(tmp_path / "out/model.safetensors")
    assert set(again) == set(tensors)
    assert all(torch.equal(again[name].float(), tensors[name].float()) for name in tensors)
    convert(source, tmp_path / "floats", to="dense")
    floats = load_file(tmp_path / "floats/model.safetensors")
    scale = tensors[f"{NAME}.weight_scale"]
    assert torch.equal(floats[f"{NAME}.weight"], (whole[f"{NAME}.weight"].float() * scale).to(torch.bfloat16))
    del whole[f"{NAME}.weight_scale"]
    with pytest.raises(FormatError, match=r"has no .*weight_scale"):
        convert(write_checkpoint(tmp_path / "broken", whole, config), tmp_path / "no")


def test_int8_minimum_survives(packed, tmp_path):
    tensors, config = packed("int8")
    tensors[f"{NAME}.compressed"][2, 3] = -128
    convert(write_checkpoint(tmp_path / "min", tensors, config), tmp_path / "out")
    written = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(written[f"{NAME}.compressed"], tensors[f"{NAME}.compressed"])


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"format_version": 3}, UnsupportedError, "format_version is 3"),
        ({"linear": {"pattern": "2:4", "weights": "int3"}}, FormatError, "int3"),
        ({"linear": {"pattern": "4:8", "weights": "int4"}}, FormatError, "2:4"),
        ({"linear": {"pattern": "2:4", "weights": "int4", "group_size": 0}}, FormatError, "group_size"),
        (
            {"linear": {"pattern": "2:4", "weights": "int4", "group_size": 16}},
            FormatError,
            "one scale per row and group",
        ),
        ({"surprise": 1}, FormatError, "surprise"),
    ],
)
def test_sparse24_blocks_are_closed(packed, tmp_path, change, error, says):
    tensors, config = packed("int4")
    config["quantization_config"] |= change
    refused(tmp_path, tensors, config, error, says)


@pytest.mark.parametrize("weights", ["keep", "int4"])
@pytest.mark.parametrize("rows", [0, 96])
def test_a_packed_weight_of_nothing(packed, tmp_path, weights, rows):
    tensors, config = packed(weights)
    columns = 0 if rows else 64
    values = tensors[f"{NAME}.compressed"].dtype
    tensors |= {
        f"{NAME}.compressed": torch.empty(rows, columns // 2, dtype=values),
        f"{NAME}.bitmask": torch.empty(rows, columns // 8, dtype=torch.uint8),
        f"{NAME}.shape": torch.tensor([[rows], [columns]]),
    }
    refused(tmp_path, tensors, config, FormatError, "which holds nothing")
