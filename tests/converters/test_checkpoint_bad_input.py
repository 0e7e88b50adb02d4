"""Broken and hostile checkpoint folders: one clear error each, found before any weight is read."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from converters.checkpoint import open_checkpoint
from converters.safetensors_io import TensorSpec, header_bytes, read_header
from vllm_sparse.errors import FormatError, UnsupportedError, UserError


def write_raw(path: Path, header: dict | bytes, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(dtype="F32", shape=(2,), begin=0, end=8) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        ({"a": entry(end=4)}, b"\0" * 4, "needs 8 bytes"),
        ({"a": entry("F99")}, b"\0" * 8, "unknown dtype"),
        ({"a": entry(shape=[1 << 62, 4], end=8)}, b"\0" * 8, "absurd shape"),
        ({"a": entry(shape=[-2], end=8)}, b"\0" * 8, "absurd shape"),
        ({"a": entry(shape=[True, 2], end=8)}, b"\0" * 8, "absurd shape"),
        ({"a": entry(shape=[1 << 39, 1 << 39], end=8)}, b"\0" * 8, "needs"),
        ({"a": entry(begin=8, end=0)}, b"\0" * 8, "needs 8 bytes"),
        ({"a": entry(), "b": entry(begin=4, end=12)}, b"\0" * 12, "overlaps"),
        ({"a": entry(), "b": entry(begin=12, end=20)}, b"\0" * 20, "belong to no tensor"),
        ({"a": entry()}, b"\0" * 4, "truncated"),
        ({"a": entry()}, b"\0" * 12, "belong to no tensor"),
        ({"a": {"dtype": "F32"}}, b"", "must have"),
        (b'{"a": 1', b"", "not JSON"),
        (b"[]", b"", "not a JSON object"),
        (b"[" * 100_000, b"", "not JSON"),
        (
            b'{"a": {"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
            b' "a": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
            b"\0" * 8,
            "twice",
        ),
    ],
)
def test_bad_headers(tmp_path, header, data, says):
    path = write_raw(tmp_path / "x.safetensors", header, data)
    with pytest.raises(FormatError, match=says):
        read_header(path)


@pytest.mark.parametrize("length", [1 << 62, 10_000, (1 << 64) - 1])
def test_header_larger_than_file(tmp_path, length):
    path = write_raw(tmp_path / "x.safetensors", {}, length=length)
    with pytest.raises(FormatError, match="claims"):
        read_header(path)


def test_file_too_short(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"abc")
    with pytest.raises(FormatError, match="only 3 bytes"):
        read_header(tmp_path / "x.safetensors")


def test_header_written_here_is_read_by_the_library(tmp_path):
    from safetensors import safe_open

    specs = [TensorSpec("é", torch.int64, (2, 1)), TensorSpec("w", torch.bfloat16, (2, 3))]
    path = tmp_path / "x.safetensors"
    path.write_bytes(header_bytes(specs, {"format": "pt"}) + bytes(range(28)))
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {"é", "w"}
        assert file.get_tensor("w").view(torch.uint8).flatten().tolist() == list(range(16, 28))


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        "",
        "a\\b.safetensors",
        "x\0.safetensors",
    ],
)
def test_shard_names_cannot_leave_the_folder(make_checkpoint, name):
    folder = make_checkpoint()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(FormatError, match="not a plain file name"):
        open_checkpoint(folder)


def test_shard_link_cannot_leave_the_folder(make_checkpoint, tmp_path):
    folder = make_checkpoint()
    outside = tmp_path / "outside.safetensors"
    os.rename(folder / "model.safetensors", outside)
    (folder / "model.safetensors").symlink_to(outside)
    with pytest.raises(FormatError, match="leaves"):
        open_checkpoint(folder)


def test_side_file_link_cannot_leave_the_folder(make_checkpoint, tmp_path):
    folder = make_checkpoint()
    (tmp_path / "secret").write_text("secret")
    (folder / "vocab.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(FormatError, match="leaves"):
        list(open_checkpoint(folder).side_files())


def test_hub_cache_links_are_followed(make_checkpoint, tmp_path):
    source = make_checkpoint("plain")
    blobs, snapshot = tmp_path / "models--x/blobs", tmp_path / "models--x/snapshots/abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in list(source.iterdir()):
        os.rename(path, blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert "lm_head.weight" in open_checkpoint(snapshot).tensors


def test_tensor_in_two_shards(tmp_path, make_checkpoint):
    folder = make_checkpoint(shards=2)
    (folder / "model.safetensors.index.json").unlink()
    save_file({"lm_head.weight": torch.zeros(2)}, folder / "model-extra.safetensors")
    with pytest.raises(FormatError, match="is in both"):
        open_checkpoint(folder)


def test_index_and_shards_disagree(make_checkpoint):
    folder = make_checkpoint(shards=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    missing = dict(index["weight_map"], ghost="model-00001-of-00002.safetensors")
    path.write_text(json.dumps({"weight_map": missing}))
    with pytest.raises(FormatError, match="'ghost'"):
        open_checkpoint(folder)
    extra = dict(index["weight_map"])
    extra.pop("lm_head.weight")
    path.write_text(json.dumps({"weight_map": extra}))
    with pytest.raises(FormatError, match="not in"):
        open_checkpoint(folder)
    path.write_text(json.dumps({"weight_map": dict(extra, x="model-00009-of-00002.safetensors")}))
    with pytest.raises(FormatError, match="is not in"):
        open_checkpoint(folder)


def test_truncated_shard(make_checkpoint):
    folder = make_checkpoint()
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 10)
    with pytest.raises(FormatError, match="truncated"):
        open_checkpoint(folder)


def test_folders_that_are_no_checkpoints(tmp_path, make_checkpoint):
    with pytest.raises(FormatError, match="no such folder"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(FormatError, match=r"no config\.json"):
        open_checkpoint(tmp_path)
    folder = make_checkpoint()
    (folder / "model.safetensors").unlink()
    with pytest.raises(FormatError, match=r"no \*\.safetensors weights"):
        open_checkpoint(folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UnsupportedError, match="allow-pickle"):
        open_checkpoint(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(FormatError, match="not valid JSON"):
        open_checkpoint(folder)


def test_hub_failure_is_one_message(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="neither a folder here nor a model"):
        open_checkpoint("no-such-org-here/no-such-model")


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ({"a": {**entry(), "dtype": ["F32"]}}, "unknown dtype"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, ' + b"8" * 5000 + b"]}}", "not JSON"),
        (b'{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', "not valid Unicode"),
    ],
)
def test_headers_that_python_cannot_take(tmp_path, header, says):
    with pytest.raises(FormatError, match=says):
        read_header(write_raw(tmp_path / "x.safetensors", header, b"\0" * 8))


@pytest.mark.parametrize(
    ("config", "says"), [('{"a": ' + "1" * 5000 + "}", "not valid JSON"), ('{"a": "\\ud800"}', "Unicode")]
)
def test_configs_that_python_cannot_take(make_checkpoint, config, says):
    folder = make_checkpoint()
    (folder / "config.json").write_text(config)
    with pytest.raises(FormatError, match=says):
        open_checkpoint(folder)


def test_whole_characters_may_be_escaped(make_checkpoint):
    folder = make_checkpoint()
    (folder / "config.json").write_text('{"a": "\\ud83d\\ude00"}')
    assert open_checkpoint(folder).config == {"a": "\U0001f600"}


def test_a_missing_shard_without_an_index(make_checkpoint):
    folder = make_checkpoint(shards=3)
    (folder / "model.safetensors.index.json").unlink()
    assert len(open_checkpoint(folder).shards) == 3
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FormatError, match="has no model-00002-of-00003"):
        open_checkpoint(folder)
