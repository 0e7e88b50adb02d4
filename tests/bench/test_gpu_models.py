"""The pair of random models for a GPU: the same weights twice, stored as the converter stores them."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from bench import gpu_models
from bench.tokenizer import load_tokenizer
from converters.checkpoint import open_checkpoint
from converters.convert import convert
from converters.layers import Kind
from converters.readers import make_reader
from vllm_sparse import sparse24
from vllm_sparse.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["tiny", "untied"])
def pair(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "out"
    shape = gpu_models.Shape("small", 256, 512, 2, 4, 2, 1024, tied=request.param == "tiny")
    gpu_models.write_models(out, shape, CPU, lambda line: None)
    return out


def test_both_hold_the_same_weights(pair):
    dense, sparse = (make_reader(open_checkpoint(pair / name)) for name in ("dense", "sparse"))
    stored = {entry.name: entry for entry in sparse.entries()}
    assert {entry.name for entry in dense.entries()} == set(stored)
    packed = 0
    for entry in dense.entries():
        weight = dense.load(entry).weight
        assert torch.equal(weight.view(torch.int16), sparse.load(stored[entry.name]).weight.view(torch.int16))
        if entry.kind is Kind.LINEAR:
            assert sparse24.is_24(weight)
            assert int((weight == 0).sum()) == weight.numel() // 2
            assert stored[entry.name].stored == "sparse-24-bitmask"
            packed += 1
    assert packed == 14


def test_the_sparse_one_is_what_the_converter_makes(pair, tmp_path):
    convert(pair / "dense", tmp_path / "converted")
    ours, theirs = (open_checkpoint(folder) for folder in (pair / "sparse", tmp_path / "converted"))
    assert ours.config == theirs.config
    assert ours.config["quantization_config"]["sparsity_config"]["format"] == "sparse-24-bitmask"
    assert ours.shards == theirs.shards
    assert set(ours.tensors) == set(theirs.tensors)
    for name in ours.tensors:
        mine, yours = ours.read(name), theirs.read(name)
        assert mine.dtype == yours.dtype
        assert torch.equal(mine.view(torch.uint8), yours.view(torch.uint8))


def test_the_official_library_reads_them_and_prompts_can_be_made(pair):
    for name in ("dense", "sparse"):
        folder = pair / name
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        for shard in set(index.values()):
            with safe_open(folder / shard, "pt") as file:
                assert set(file.keys()) == {tensor for tensor, where in index.items() if where == shard}
        assert load_tokenizer(folder).decode([5, 7]) == "w5 w7"
        assert {path.name for path in folder.iterdir()} >= {"config.json", "tokenizer_config.json"}


def test_a_folder_that_holds_something_is_left_alone(pair, capsys):
    before = sorted(path.name for path in pair.parent.iterdir())
    assert gpu_models.main([str(pair), "--shape", "tiny", "--device", "cpu"]) == 2
    assert "already exists" in capsys.readouterr().err
    assert sorted(path.name for path in pair.parent.iterdir()) == before


def test_nothing_is_left_of_what_failed(monkeypatch, tmp_path):
    shape = gpu_models.MODELS["tiny"]
    monkeypatch.setattr(gpu_models.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    with pytest.raises(UserError, match="no space left"):
        gpu_models.write_models(tmp_path / "out", shape, CPU, pytest.fail)
    monkeypatch.undo()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gpu_models, "ShardWriter", full)
    with pytest.raises(OSError, match="No space"):
        gpu_models.write_models(tmp_path / "out", shape, CPU, pytest.fail)
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path, capsys):
    out = tmp_path / "new" / "out"
    assert gpu_models.main([str(out), "--shape", "tiny", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.count("of weights") == 2
    assert sorted(path.name for path in out.iterdir()) == ["dense", "sparse"]
    assert gpu_models.main([str(tmp_path / "x"), "--device", "abacus"]) == 2
    assert "--device abacus" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert gpu_models.main([str(tmp_path / "x")]) == 2
    assert "no NVIDIA GPU" in capsys.readouterr().err
