"""What can be wrong with a checkpoint, case by case, through the command line.

Each case ends with exit code 2 and one readable paragraph, the source stays as it was, and nothing is left
where the result would have been. Cases that several formats share are tested with their readers.
"""

import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_maker import CONFIG, llama_tensors, write_checkpoint
from safetensors.torch import load_file, save_file

from converters.cli import run
from converters.convert import convert
from converters.verify import verify

NAME = "model.layers.1.mlp.up_proj"
REVERSED = torch.from_numpy(
    np.packbits(np.unpackbits(np.arange(256, dtype=np.uint8)).reshape(256, 8)[:, ::-1])
)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change a single-shard checkpoint's tensors."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def set_block(folder: Path, **fields: object) -> None:
    """Change fields of the quantization_config."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= fields
    path.write_text(json.dumps(config))


def popcount(folder: Path) -> None:
    rewrite(folder, lambda t: t[f"{NAME}.bitmask"].__setitem__((4, 1), 0b0111_0011))


def shape(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({f"{NAME}.shape": torch.tensor([[96], [128]])}))


def missing(folder: Path) -> None:
    rewrite(folder, lambda t: t.pop(f"{NAME}.bitmask"))


def extra_mask(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"model.layers.1.mlp.side_proj.bitmask": torch.zeros(2, 2)}))


def stored_twice(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({f"{NAME}.weight": torch.zeros(96, 64)}))


def nan(folder: Path) -> None:
    rewrite(folder, lambda t: t[f"{NAME}.compressed"].__setitem__((3, 3), float("nan")))


def nan_scale(folder: Path) -> None:
    rewrite(folder, lambda t: t[f"{NAME}.weight_scale"].__setitem__(3, float("nan")))


def infinite_scale(folder: Path) -> None:
    rewrite(folder, lambda t: t[f"{NAME}.weight_scale"].__setitem__(3, float("inf")))


def overlapping_shards(folder: Path) -> None:
    save_file({f"{NAME}.shape": torch.tensor([[96], [64]])}, folder / "model-2.safetensors")
    os.rename(folder / "model.safetensors", folder / "model-1.safetensors")


def overlapping_tensors(folder: Path) -> None:
    entry = {"dtype": "F32", "shape": [2]}
    header = {"a": {**entry, "data_offsets": [0, 8]}, "b": {**entry, "data_offsets": [4, 12]}}
    raw = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(12))


def traversal(folder: Path) -> None:
    index = {"weight_map": {f"{NAME}.compressed": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def absurd_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 61) + path.read_bytes()[8:])


def absurd_tensor(folder: Path) -> None:
    raw = json.dumps({"a": {"dtype": "F32", "shape": [1 << 39, 1 << 39], "data_offsets": [0, 8]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(8))


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)


def regex_bomb(folder: Path) -> None:
    module = "model.layers.0." + "a" * 60 + "!"
    rewrite(folder, lambda t: t.update({f"{module}.weight": torch.zeros(8, 8)}))
    block = {"format": "sparse-24-bitmask", "sparsity_structure": "2:4", "targets": [r"re:.*\.(a|a|aa)+$"]}
    set_block(folder, sparsity_config=block)


def too_many_regexes(folder: Path) -> None:
    set_block(folder, ignore=["re:" + "(a" * 300 + ")" * 300])


def unknown_format(folder: Path) -> None:
    block = {"format": "os.system", "sparsity_structure": "2:4", "targets": ["Linear"]}
    set_block(folder, sparsity_config=block)


CASES: list[tuple[str, Callable[[Path], None], str]] = [
    ("keep", popcount, rf"{NAME}: bitmask is not 2:4: 1 of .* row 4, columns 12\.\.15"),
    ("keep", shape, rf"{NAME}: declared shape \[96, 128\] disagrees with compressed"),
    ("keep", missing, rf"{NAME}\.bitmask', which is missing"),
    ("keep", extra_mask, r"side_proj\.bitmask' has no matching \.compressed"),
    ("keep", stored_twice, rf"{NAME}\.weight' is stored both dense and packed"),
    ("keep", nan, rf"{NAME}\.compressed' holds NaN or Inf"),
    ("int8", nan_scale, rf"{NAME}\.weight_scale.* NaN or Inf"),
    ("fp8", infinite_scale, rf"{NAME}\.weight_scale.* NaN or Inf"),
    ("keep", overlapping_shards, rf"{NAME}\.shape' is in both model-1\.safetensors and model-2"),
    ("keep", overlapping_tensors, r"tensor 'b' overlaps the tensor stored before it"),
    ("keep", traversal, r"not a plain file name"),
    ("keep", absurd_header, r"claims 2305843009213693952 bytes"),
    ("keep", absurd_tensor, r"tensor 'a': .* needs \d+ bytes"),
    ("keep", truncated, r"truncated"),
    ("keep", regex_bomb, r"regular expression .* takes over"),
    ("keep", too_many_regexes, r"characters"),
    ("keep", unknown_format, r"found 'os\.system'"),
]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def assert_refused(root: Path, source: Path, message: str, capsys: Any, *flags: str) -> None:
    """Exit code 2, one paragraph that says it, the source untouched, nothing else in ``root``."""
    before, beside = contents(source), sorted(path.name for path in root.iterdir())
    assert run(["convert", str(source), str(root / "out"), *flags]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    one_line = " ".join(said.split())
    assert one_line.startswith("error: ")
    assert re.search(message, one_line), one_line
    assert contents(source) == before
    assert sorted(path.name for path in root.iterdir()) == beside


@pytest.mark.parametrize(("weights", "damage", "message"), CASES, ids=[case[1].__name__ for case in CASES])
def test_refused(tmp_path, capsys, weights, damage, message):
    convert(write_checkpoint(tmp_path / "dense", llama_tensors()), tmp_path / "src", weights=weights)
    damage(tmp_path / "src")
    capsys.readouterr()
    assert_refused(tmp_path, tmp_path / "src", message, capsys)


def test_pickles_need_a_flag(tmp_path, capsys):
    """With it they are opened in a sandbox: test_pickles_and_trained.py."""
    folder = tmp_path / "src"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    torch.save({"model.norm.weight": torch.zeros(2)}, folder / "pytorch_model.bin")
    assert_refused(tmp_path, folder, "--allow-pickle", capsys)


def test_wrong_bit_order_with_pad_bits(tmp_path, capsys):
    """Rows that end within a byte: the pad bits would be set."""
    tensors = llama_tensors()
    weight = tensors[f"{NAME}.weight"][:, :60].contiguous()
    packed = {
        "w.compressed": weight[weight != 0].reshape(96, 30),
        "w.bitmask": torch.from_numpy(np.packbits((weight != 0).numpy(), axis=-1, bitorder="big")),
        "w.shape": torch.tensor([[96], [60]]),
    }
    sparsity = {"format": "sparse-24-bitmask", "sparsity_structure": "2:4", "targets": ["Linear"]}
    block = {"quant_method": "compressed-tensors", "sparsity_config": sparsity}
    source = write_checkpoint(tmp_path / "src", packed, CONFIG | {"quantization_config": block})
    assert_refused(tmp_path, source, r"w: bitmask .*(not 2:4|pad bits)", capsys)


def test_wrong_bit_order_in_whole_bytes_is_found_by_verify(tmp_path):
    """Two kept of four read from either end, so such a mask is sound by itself; the weights are not."""
    dense = write_checkpoint(tmp_path / "dense", llama_tensors())
    convert(dense, tmp_path / "packed")
    assert verify(dense, tmp_path / "packed", logits=False).ok
    rewrite(
        tmp_path / "packed",
        lambda t: t.update({f"{NAME}.bitmask": REVERSED[t[f"{NAME}.bitmask"].long()].contiguous()}),
    )
    found = verify(dense, tmp_path / "packed", logits=False)
    assert not found.ok
    assert found.different == (f"{NAME}.weight",)
