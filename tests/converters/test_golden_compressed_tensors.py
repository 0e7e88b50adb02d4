"""Our bytes against compressed-tensors 0.13, the last release that can write and read 2:4.

It lives in a folder of its own (vLLM needs a newer one) and runs in another process, once for all tests.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_maker import CONFIG, llama_tensors, prune, write_checkpoint
from safetensors.torch import load_file, save_file

from converters.checkpoint import open_checkpoint
from converters.convert import convert
from converters.inspect import inspect
from converters.readers import make_reader
from converters.readers.base import dequantize
from vllm_sparse.sparse24 import compress

HERE = Path(__file__).parent
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
BLOCK = {
    "quant_method": "compressed-tensors",
    "sparsity_config": {
        "format": "sparse-24-bitmask",
        "sparsity_structure": "2:4",
        "targets": ["Linear"],
        "ignore": ["lm_head"],
    },
}


def dense_weights(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """2:4 weights with short groups, negatives, the extremes of int8 and ties."""
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for name, shape in {"a": (64, 128), "b": (32, 24), "c": (8, 8)}.items():
        weight = prune(torch.randn(*shape, generator=generator) * 30)
        weight[torch.rand(*shape, generator=generator) < 0.2] = 0
        weight[0, :8] = torch.tensor([127.0, 0, 0, -127, 5, 5, 0, 0])
        weight[1, :8] = torch.tensor([0.0, 0, 0, -5, 0, 0, 0, 0])
        weight = weight.to(dtype)
        if dtype == torch.float8_e4m3fn:
            raw = weight.view(torch.uint8)
            raw[raw == 0x80] = 0
        weights[f"model.{name}.weight"] = weight
    return weights


def to_127_and_a_half(rows: int = 64) -> torch.Tensor:
    """2:4 int8 ``[rows, 128]`` whose rows' largest weight is 127.5 steps, as llm-compressor scales them."""
    weight = prune(torch.randn(rows, 128, generator=torch.Generator().manual_seed(4)))
    return (weight / weight.abs().amax(1, keepdim=True) * 127.5).round().clamp(-128, 127).to(torch.int8)


@pytest.fixture(scope="session")
def golden(library, tmp_path_factory) -> Path:
    """A folder with everything the library wrote, and our checkpoints that it read."""
    root = tmp_path_factory.mktemp("golden")
    jobs = []
    for name, dtype in DTYPES.items():
        save_file(dense_weights(dtype), root / f"dense-{name}.safetensors")
        for do in ("compress24", "bitmask"):
            jobs.append({"do": do, "in": f"dense-{name}.safetensors", "out": f"{do}-{name}.safetensors"})
    save_file({"model.a.weight": to_127_and_a_half()}, root / "dense-minimum.safetensors")
    jobs.append(
        {"do": "compress24", "in": "dense-minimum.safetensors", "out": "compress24-minimum.safetensors"}
    )
    source = write_checkpoint(root / "src", llama_tensors())
    for weights in ("keep", "int8", "fp8"):
        convert(source, root / weights, weights=weights)
        jobs += [
            {
                "do": "decompress24",
                "in": f"{weights}/model.safetensors",
                "out": f"back-{weights}.safetensors",
            },
            {"do": "load_model", "folder": weights, "out": f"model-{weights}.safetensors"},
            {"do": "parse_config", "config": f"{weights}/config.json", "quantized": weights != "keep"},
        ]
    generator = torch.Generator().manual_seed(4)
    shapes = {"one": (64, 256), "two": (256, 512), "three": (128, 128)}
    weights = {f"model.{n}.weight": prune(torch.randn(*s, generator=generator)) for n, s in shapes.items()}
    weights["model.three.weight"][::3] = 0
    weights["model.three.weight"][::3, 5] = 1
    save_file(weights, root / "marlin.safetensors")
    jobs += [
        {
            "do": "marlin24",
            "in": "marlin.safetensors",
            "bits": b,
            "group_size": g,
            "out": f"m{b}-{g}.safetensors",
        }
        for b in (4, 8)
        for g in (None, 128)
    ]
    (root / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, str(HERE / "ct13_worker.py"), "jobs.json"],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(library), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return root


def same_bytes(one: torch.Tensor, two: torch.Tensor) -> bool:
    return one.dtype == two.dtype and torch.equal(
        one.contiguous().view(torch.uint8), two.contiguous().view(torch.uint8)
    )


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
def test_compressed_bytes_of_floats(golden, tmp_path, name):
    theirs = load_file(golden / f"compress24-{name}.safetensors")
    convert(write_checkpoint(tmp_path / "src", dense_weights(DTYPES[name])), tmp_path / "out")
    ours = load_file(tmp_path / "out/model.safetensors")
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        assert ours[key].shape == value.shape, key
        assert same_bytes(ours[key], value), key


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_compressed_bytes_of_quantised(golden, name):
    from vllm_sparse.sparse24 import compress

    theirs = load_file(golden / f"compress24-{name}.safetensors")
    for key, weight in dense_weights(DTYPES[name]).items():
        module = key.removesuffix(".weight")
        values, bitmask = compress(weight)
        assert same_bytes(values, theirs[f"{module}.compressed"])
        assert same_bytes(bitmask, theirs[f"{module}.bitmask"])


@pytest.mark.parametrize("name", DTYPES)
def test_their_files_are_read_exactly(golden, tmp_path, name):
    tensors = load_file(golden / f"compress24-{name}.safetensors")
    block = dict(BLOCK)
    if name in ("int8", "fp8"):
        number = "int" if name == "int8" else "float"
        weights = {"num_bits": 8, "type": number, "strategy": "channel", "symmetric": True, "dynamic": False}
        block |= {
            "format": f"{number}-quantized",
            "config_groups": {"g": {"targets": ["Linear"], "weights": weights}},
        }
        for module in ("a", "b", "c"):
            rows = tensors[f"model.{module}.compressed"].shape[0]
            tensors[f"model.{module}.weight_scale"] = torch.ones(rows, 1, dtype=torch.bfloat16)
    source = write_checkpoint(tmp_path / "src", tensors, CONFIG | {"quantization_config": block})
    reader = make_reader(open_checkpoint(source))
    loaded = {entry.name: reader.load(entry).weight for entry in reader.entries()}
    expected = dense_weights(DTYPES[name])
    assert set(loaded) == set(expected)
    assert all(same_bytes(loaded[key], expected[key]) for key in expected)


@pytest.mark.parametrize("weights", ["keep", "int8", "fp8"])
def test_the_library_decompresses_our_files(golden, weights):
    theirs = load_file(golden / f"back-{weights}.safetensors")
    reader = make_reader(open_checkpoint(golden / weights))
    packed = [entry for entry in reader.entries() if entry.stored != "dense"]
    assert len(packed) == 14
    for entry in packed:
        assert same_bytes(theirs[entry.name], reader.load(entry).weight), entry.name


@pytest.mark.parametrize("weights", ["keep", "int8", "fp8"])
def test_the_library_loads_our_checkpoint_into_a_model(golden, weights):
    theirs = load_file(golden / f"model-{weights}.safetensors")
    assert len(theirs) == 14
    reader = make_reader(open_checkpoint(golden / weights))
    for entry in reader.entries():
        if entry.name not in theirs:
            continue
        loaded = reader.load(entry)
        numbers = dequantize(loaded.weight, loaded.scale(entry)).to(torch.bfloat16)
        # The library multiplies in its own precision, hence one bf16 rounding.
        assert torch.allclose(theirs[entry.name].float(), numbers.float(), rtol=2**-7, atol=0), entry.name


def marlin_checkpoint(golden: Path, folder: Path, bits: int, group: int | None) -> tuple[Path, dict]:
    tensors = load_file(golden / f"m{bits}-{group}.safetensors")
    expected = {name: tensors.pop(name) for name in list(tensors) if name.endswith(".expected")}
    weights = {
        "num_bits": bits,
        "type": "int",
        "strategy": "group" if group else "channel",
        "group_size": group,
        "symmetric": True,
    }
    block = {
        "quant_method": "compressed-tensors",
        "format": "marlin-24",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    return write_checkpoint(folder, tensors, CONFIG | {"quantization_config": block}), expected


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [None, 128])
def test_marlin_24_is_inverted_exactly(golden, tmp_path, bits, group):
    source, expected = marlin_checkpoint(golden, tmp_path / "src", bits, group)
    reader = make_reader(open_checkpoint(source))
    assert reader.format == "marlin-24"
    entries = reader.entries()
    assert len(entries) == 3
    for entry in entries:
        loaded = reader.load(entry)
        numbers = dequantize(loaded.weight, loaded.scale(entry), entry.group_size)
        assert torch.equal(numbers, expected[f"{entry.module}.expected"]), entry.name


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [None, 128])
def test_marlin_24_is_converted_exactly(golden, tmp_path, bits, group):
    source, expected = marlin_checkpoint(golden, tmp_path / "src", bits, group)
    report = convert(source, tmp_path / "out")
    assert report.packed == 3
    reader = make_reader(open_checkpoint(tmp_path / "out"))
    for entry in reader.entries():
        loaded = reader.load(entry)
        numbers = dequantize(loaded.weight, loaded.scale(entry), entry.group_size)
        assert torch.equal(numbers, expected[f"{entry.module}.expected"]), entry.name
    block = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert block["quant_method"] == ("compressed-tensors" if (bits, group) == (8, None) else "sparse24")
    assert block.get("format") != "marlin-24"


def test_marlin_24_that_is_broken(golden, tmp_path):
    from vllm_sparse.errors import FormatError

    source, _ = marlin_checkpoint(golden, tmp_path / "src", 4, 128)
    good = load_file(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())

    def refused(says, **changes):
        tensors = {**good, **{f"model.one.{name}": value for name, value in changes.items()}}
        broken = write_checkpoint(
            tmp_path / "broken", {k: v for k, v in tensors.items() if v is not None}, config
        )
        with pytest.raises(FormatError, match=says):
            convert(broken, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    meta, scale = good["model.one.meta"], good["model.one.scale_packed"]
    refused("one position twice", meta=torch.zeros_like(meta))
    refused("needs meta", meta=meta[:, :64].contiguous())
    refused("meta.*missing", meta=None)
    refused("and scales", scale_packed=scale[:1].contiguous())
    refused("weight_shape.*says", weight_shape=torch.tensor([1, 2]))


@pytest.mark.parametrize("name", DTYPES)
def test_their_sparse_bitmask_is_read_exactly(golden, tmp_path, name):
    tensors = load_file(golden / f"bitmask-{name}.safetensors")
    sparsity = {"format": "sparse-bitmask", "sparsity_structure": "unstructured", "targets": ["Linear"]}
    for module in ("a", "b", "c") if name in ("int8", "fp8") else ():
        tensors[f"model.{module}.weight_scale"] = torch.ones(1)
    config = CONFIG | {"quantization_config": BLOCK | {"sparsity_config": sparsity}}
    reader = make_reader(open_checkpoint(write_checkpoint(tmp_path / "src", tensors, config)))
    loaded = {entry.name: reader.load(entry).weight for entry in reader.entries()}
    expected = dense_weights(DTYPES[name])
    assert set(loaded) == set(expected)
    assert all(torch.equal(loaded[key].float(), expected[key].float()) for key in expected)


def test_values_that_their_packing_loses_are_noticed(golden, tmp_path):
    """The library drops every -128: its abs() as int8 is the smallest number of all."""
    tensors = load_file(golden / "compress24-minimum.safetensors")
    weight, values = to_127_and_a_half(), tensors["model.a.compressed"]
    lost = weight == -128
    assert 20 < int(lost.sum()) < 44
    assert int(values.min()) > -128
    tensors["model.a.weight_scale"] = torch.ones(64, 1)
    source = write_checkpoint(tmp_path / "src", tensors, CONFIG | {"quantization_config": BLOCK})
    reader = make_reader(open_checkpoint(source))
    (entry,) = reader.entries()
    loaded = reader.load(entry)
    assert torch.equal(loaded.weight, torch.where(lost, 0, weight))
    (note,) = loaded.notes
    assert re.match(r"model\.a: \d+ of 64 rows of int8 weights look as if their largest value, -128", note)
    (warning,) = inspect(source).warnings
    assert "disable_sparse_compression=True" in warning


@pytest.mark.parametrize("steps", [127.0, 127.5])
def test_our_own_packing_loses_none(steps, tmp_path):
    weight = prune(torch.randn(64, 128, generator=torch.Generator().manual_seed(4)))
    weight[:16, ::4] = 0  # short groups: zeros among the kept values
    scaled = weight / weight.abs().amax(1, keepdim=True) * steps
    values, bitmask = compress(scaled.round().clamp(-128, 127).to(torch.int8))
    tensors = {
        "model.a.compressed": values,
        "model.a.bitmask": bitmask,
        "model.a.shape": torch.tensor([[64], [128]]),
        "model.a.weight_scale": torch.ones(64, 1),
    }
    source = write_checkpoint(tmp_path / "src", tensors, CONFIG | {"quantization_config": BLOCK})
    assert inspect(source).warnings == ()
