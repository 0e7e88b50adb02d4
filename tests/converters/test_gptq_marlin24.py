"""The GPTQ-style ``B_24`` format, from tensors that torchao 0.14 packed in another process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_maker import CONFIG, prune, write_checkpoint
from safetensors.torch import load_file, save_file

from converters.checkpoint import open_checkpoint
from converters.convert import convert
from converters.inspect import inspect
from converters.readers import make_reader
from converters.readers.base import dequantize
from vllm_sparse.errors import FormatError, UnsupportedError

HERE = Path(__file__).parent
CASES = [(bits, group) for bits in (4, 8) for group in (-1, 128)]


@pytest.fixture(scope="module")
def packed(torchao_library, tmp_path_factory) -> Path:
    """A folder with ``b{bits}-g{group}.safetensors``."""
    root = tmp_path_factory.mktemp("torchao")
    generator = torch.Generator().manual_seed(4)
    shapes = {"one": (64, 256), "two": (256, 512), "three": (128, 128)}
    weights = {f"model.{n}.weight": prune(torch.randn(*s, generator=generator)) for n, s in shapes.items()}
    weights["model.three.weight"][::3] = 0
    weights["model.three.weight"][::3, 5] = 1
    save_file(weights, root / "in.safetensors")
    jobs = [
        {"in": "in.safetensors", "bits": b, "group_size": g, "out": f"b{b}-g{g}.safetensors"}
        for b, g in CASES
    ]
    (root / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, str(HERE / "torchao_worker.py"), "jobs.json"],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(torchao_library), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return root


def block(bits: int, group: int) -> dict:
    return {
        "quant_method": "gptq",
        "checkpoint_format": "marlin_24",
        "bits": bits,
        "group_size": group,
        "desc_act": False,
        "sym": True,
    }


def checkpoint(
    packed: Path, folder: Path, bits: int, group: int, change: dict | None = None
) -> tuple[Path, dict]:
    tensors = load_file(packed / f"b{bits}-g{group}.safetensors")
    expected = {name: tensors.pop(name) for name in list(tensors) if name.endswith(".expected")}
    tensors["model.one.workspace"] = torch.zeros(64, dtype=torch.int32)
    tensors["model.one.bias"] = torch.arange(64, dtype=torch.float16)
    config = CONFIG | {"quantization_config": block(bits, group) | (change or {})}
    return write_checkpoint(folder, tensors, config), expected


@pytest.mark.parametrize(("bits", "group"), CASES)
def test_reads_gptq_marlin24_int4_and_int8(packed, tmp_path, bits, group):
    source, expected = checkpoint(packed, tmp_path / "src", bits, group)
    report = convert(source, tmp_path / "out")
    assert (report.source_format, report.packed) == ("gptq-marlin-24", 3)
    written = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(written["model.one.bias"], torch.arange(64, dtype=torch.float16))
    assert not any(name.endswith(("workspace", "B_24", "B_meta", ".s")) for name in written)
    for folder in (source, tmp_path / "out"):
        reader = make_reader(open_checkpoint(folder))
        entries = [entry for entry in reader.entries() if entry.quantized]
        assert len(entries) == 3
        for entry in entries:
            loaded = reader.load(entry)
            numbers = dequantize(loaded.weight, loaded.scale(entry), entry.group_size)
            assert torch.equal(numbers, expected[f"{entry.module}.expected"]), entry.name
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "sparse24"
    assert config["linear"]["weights"] == f"int{bits}"
    assert config["linear"]["group_size"] == (None if group == -1 else group)


@pytest.mark.parametrize("change", [{"quant_method": "marlin_24"}, {"quant_method": "gptq_marlin_24"}])
def test_other_spellings_of_the_method(packed, tmp_path, change):
    source, _ = checkpoint(packed, tmp_path / "src", 4, 128, change)
    assert inspect(source).format == "gptq-marlin-24"


def test_ordinary_gptq_is_not_taken_for_it(packed, tmp_path):
    source, _ = checkpoint(packed, tmp_path / "src", 4, 128, {"checkpoint_format": "gptq"})
    with pytest.raises(UnsupportedError, match="'gptq' cannot be converted"):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"bits": 3}, "holds 4 or 8 bits"),
        ({"bits": "4"}, "holds 4 or 8 bits"),
        ({"group_size": 0}, "group_size is 0"),
        ({"group_size": True}, "group_size is True"),
        ({"group_size": 96}, "multiples of 96"),
        ({"group_size": 64}, "and scales"),
        ({"desc_act": True}, "desc_act=True"),
        ({"sym": False}, "sym=False"),
    ],
)
def test_configs_that_are_refused(packed, tmp_path, change, says):
    source, _ = checkpoint(packed, tmp_path / "src", 4, 128, change)
    with pytest.raises((FormatError, UnsupportedError), match=says):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensors_that_are_broken(packed, tmp_path):
    source, _ = checkpoint(packed, tmp_path / "src", 4, 128)
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

    refused("one position twice", B_meta=torch.zeros_like(good["model.one.B_meta"]))
    refused("B_meta.*missing", B_meta=None)
    refused("no matching .B_24", B_24=None)
    refused("must be an int32", B_24=good["model.one.B_24"].to(torch.int64))
    refused("stored both dense and packed", weight=torch.zeros(64, 256))
