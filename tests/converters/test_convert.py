"""Converting: values survive, the config says what was written, nothing is half-written."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_maker import CONFIG, llama_tensors, prune, write_checkpoint
from safetensors.torch import load_file

from converters.checkpoint import open_checkpoint
from converters.convert import convert
from converters.manifest import NAME as MANIFEST
from converters.manifest import check_manifest
from converters.staging import partial_path
from vllm_sparse.errors import FormatError, NumericsError, UserError


def load(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    ("tensor", "pattern"),
    [
        ("mlp.experts.gate_up_proj", r"re:model\.layers\.1\.mlp[.]experts[.].*"),
        ("block_sparse_moe.input_linear.weight", r"re:model\.layers\.1\.block_sparse_moe[.]experts[.].*"),
        ("mamba.conv1d.weight", None),
    ],
)
def test_experts_in_one_tensor_stay_dense_and_are_listed(make_checkpoint, tmp_path, tensor, pattern):
    """They are written as they are, and vLLM knows a layer's experts under one name."""
    tensors = {**llama_tensors(), f"model.layers.1.{tensor}": torch.randn(4, 64, 8)}
    convert(make_checkpoint(tensors=tensors), tmp_path / "out", weights="int8")
    block = config_of(tmp_path / "out")["quantization_config"]
    expected = ["lm_head", *([pattern] if pattern else [])]
    assert block["ignore"] == block["sparsity_config"]["ignore"] == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shards", [1, 3])
def test_there_and_back(make_checkpoint, tmp_path, dtype, shards):
    tensors = llama_tensors(dtype)
    source = make_checkpoint(tensors=tensors, shards=shards)
    before = tree(source)
    report = convert(source, tmp_path / "packed")
    assert report.packed == 14
    assert report.dense == {}
    assert tree(source) == before
    packed = load(tmp_path / "packed")
    name = "model.layers.1.mlp.down_proj"
    assert f"{name}.weight" not in packed
    assert packed[f"{name}.compressed"].shape == (64, 48)
    assert packed[f"{name}.compressed"].dtype == dtype
    assert packed[f"{name}.bitmask"].shape == (64, 12)
    assert packed[f"{name}.shape"].tolist() == [[64], [96]]
    block = config_of(tmp_path / "packed")["quantization_config"]
    assert block["sparsity_config"]["format"] == "sparse-24-bitmask"
    assert block["sparsity_config"]["ignore"] == ["lm_head"]
    assert "config_groups" not in block
    convert(tmp_path / "packed", tmp_path / "back", to="dense")
    back = load(tmp_path / "back")
    assert set(back) == set(tensors)
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)
    assert config_of(tmp_path / "back") == CONFIG
    assert check_manifest(tmp_path / "packed") == []


def test_side_files_card_and_manifest(make_checkpoint, tmp_path):
    source = make_checkpoint(shards=2)
    (source / "README.md").write_text("the source's card")
    (source / "eval.json").write_text(json.dumps({"perplexity": 12.5, "context_length": 256}))
    figures = {"method": "wanda", "dense": {"perplexity": 9.25, "context_length": 256}, "compressed": None}
    (source / "compression.json").write_text(json.dumps(figures))
    (source / "modeling_evil.py").write_text("raise SystemExit")
    (source / "conversion_notes.txt").write_text("a side file like any other")
    (source / "conversion.lock").write_text("left over from something")
    convert(source, tmp_path / "out")
    names = set(tree(tmp_path / "out"))
    assert {"tokenizer.json", "generation_config.json", "README.md", "README.source.md", MANIFEST} <= names
    assert "modeling_evil.py" not in names
    # That evaluation is of the source; here it would pass for one of the result.
    assert "eval.json" not in names
    assert set(json.loads((tmp_path / "out" / MANIFEST).read_text())["files"]) == names - {MANIFEST}
    assert (names & {"conversion_notes.txt", "conversion.lock"}) == {"conversion_notes.txt"}
    card = (tmp_path / "out/README.md").read_text()
    assert "| compressed | 12.5000 | 256 |" in card
    assert "| before compression | 9.2500 | 256 |" in card
    assert "Pruned with `wanda`" in card
    assert "vllm-sparse convert" in card
    (tmp_path / "out/tokenizer.json").write_text("changed")
    assert check_manifest(tmp_path / "out") == ["tokenizer.json differs from what was written"]


def test_linears_that_are_not_24_stay_dense_with_their_fused_siblings(make_checkpoint, tmp_path):
    tensors = llama_tensors()
    tensors["model.layers.0.self_attn.k_proj.weight"][3] = 1.0
    report = convert(make_checkpoint(tensors=tensors), tmp_path / "out")
    left = {f"model.layers.0.self_attn.{name}_proj" for name in "qkv"}
    assert set(report.dense) == left
    assert report.dense["model.layers.0.self_attn.k_proj"] == "not 2:4"
    assert set(config_of(tmp_path / "out")["quantization_config"]["sparsity_config"]["ignore"]) == left | {
        "lm_head"
    }
    written = load(tmp_path / "out")
    assert all(torch.equal(written[f"{name}.weight"], tensors[f"{name}.weight"]) for name in left)


def claim(**changes) -> dict:
    sparsity = {
        "format": "dense",
        "sparsity_structure": "2:4",
        "targets": ["Linear"],
        "ignore": ["lm_head"],
        "global_sparsity": 0.5,
    }
    block = {"quant_method": "compressed-tensors", "sparsity_config": sparsity | changes}
    return CONFIG | {"quantization_config": block}


def test_claimed_24_that_is_not_is_an_error(make_checkpoint, tmp_path):
    tensors = llama_tensors()
    tensors["model.layers.1.mlp.up_proj.weight"][0, :3] = 1.0
    source = make_checkpoint(tensors=tensors, config=claim())
    with pytest.raises(NumericsError, match=r"layers\.1\.mlp\.up_proj.* is not 2:4 although"):
        convert(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]
    report = convert(source, tmp_path / "out", format="dense")
    assert set(report.dense) == {"model.layers.1.mlp.up_proj", "model.layers.1.mlp.gate_proj"}


def test_vestigial_block_goes_away(make_checkpoint, tmp_path):
    source = make_checkpoint(config=claim(sparsity_structure="unstructured"))
    convert(source, tmp_path / "dense", to="dense")
    assert config_of(tmp_path / "dense") == CONFIG
    nested = {**CONFIG, "text_config": {"compression_config": claim()["quantization_config"], "x": 1}}
    convert(make_checkpoint("nested", config=nested), tmp_path / "dense2", to="dense")
    assert config_of(tmp_path / "dense2") == {**CONFIG, "text_config": {"x": 1}}


@pytest.mark.parametrize("cols", [66, 92])
def test_widths_that_cannot_be_packed(make_checkpoint, tmp_path, cols):
    tensors = llama_tensors()
    for layer in range(2):
        tensors[f"model.layers.{layer}.mlp.down_proj.weight"] = torch.zeros(64, cols, dtype=torch.bfloat16)
    report = convert(make_checkpoint(tensors=tensors), tmp_path / "out")
    assert report.dense["model.layers.0.mlp.down_proj"].startswith(f"input width {cols} is not a multiple of")
    claimed = make_checkpoint("claimed", tensors=tensors, config=claim())
    if cols % 4:
        with pytest.raises(FormatError, match="multiple of 4"):
            convert(claimed, tmp_path / "out2")
    else:
        assert convert(claimed, tmp_path / "out2").packed == 12


def test_dtypes_that_cannot_be_packed_stay_dense(make_checkpoint, tmp_path):
    tensors = llama_tensors()
    for layer in range(2):
        key = f"model.layers.{layer}.mlp.down_proj.weight"
        tensors[key] = tensors[key].to(torch.float64)
    report = convert(make_checkpoint(tensors=tensors), tmp_path / "out")
    assert report.packed == 12
    assert set(report.dense.values()) == {"torch.float64 cannot be packed"}


def test_nothing_to_pack(make_checkpoint, tmp_path):
    source = make_checkpoint(tensors=llama_tensors(pruned=False))
    with pytest.raises(FormatError, match="Prune it first"):
        convert(source, tmp_path / "out")
    assert not partial_path(tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights(make_checkpoint, tmp_path, value):
    tensors = llama_tensors()
    tensors["lm_head.weight"][5, 5] = value
    with pytest.raises(NumericsError, match=r"lm_head\.weight.*NaN or Inf"):
        convert(make_checkpoint(tensors=tensors), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


def test_gpt2_weights_are_turned(make_checkpoint, tmp_path):
    weight = prune(torch.randn(96, 32)).t().contiguous()
    tensors = {"transformer.h.0.mlp.c_fc.weight": weight, "transformer.wte.weight": torch.zeros(8, 32)}
    source = make_checkpoint(tensors=tensors, config={"model_type": "gpt2", "dtype": "float32"})
    assert convert(source, tmp_path / "out").packed == 1
    assert load(tmp_path / "out")["transformer.h.0.mlp.c_fc.shape"].flatten().tolist() == [96, 32]
    convert(tmp_path / "out", tmp_path / "back", to="dense")
    assert torch.equal(load(tmp_path / "back")["transformer.h.0.mlp.c_fc.weight"], weight)


def test_dry_run_writes_nothing(make_checkpoint, tmp_path):
    report = convert(make_checkpoint(), tmp_path / "out", dry_run=True)
    assert report.dry_run
    assert report.packed == 14
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


def test_a_side_file_that_leaves_the_folder_is_refused_before_work(make_checkpoint, tmp_path):
    source = make_checkpoint()
    (tmp_path / "elsewhere.json").write_text("{}")
    (source / "special_tokens_map.json").symlink_to(tmp_path / "elsewhere.json")
    phases = []
    for dry in (True, False):
        with pytest.raises(FormatError, match="leaves"):
            convert(source, tmp_path / "out", dry_run=dry, progress=lambda phase, *_: phases.append(phase))
    assert phases == []


def test_places_that_are_refused(make_checkpoint, tmp_path):
    source = make_checkpoint()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").touch()
    with pytest.raises(UserError, match="already exists"):
        convert(source, tmp_path / "taken")
    with pytest.raises(UserError, match="already exists"):
        convert(source, tmp_path / "taken", resume=True)
    with pytest.raises(UserError, match="never changed"):
        convert(source, source / "sub")
    (tmp_path / "empty").mkdir()
    convert(source, tmp_path / "empty")
    assert check_manifest(tmp_path / "empty") == []
    with pytest.raises(UserError, match="nothing is left to resume"):
        convert(source, tmp_path / "empty", resume=True)


@pytest.mark.parametrize("there", [True, False])
def test_a_destination_that_is_a_link(make_checkpoint, tmp_path, there):
    """What it names is filled; the link stays."""
    if there:
        (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    convert(make_checkpoint(), tmp_path / "link")
    assert check_manifest(tmp_path / "real") == []
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real", "src"]


def test_a_destination_that_is_a_mount_point_is_refused_before_work(make_checkpoint, tmp_path, monkeypatch):
    """A folder cannot be renamed onto one, as onto a volume of a container."""
    source = make_checkpoint()
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "out")
    with pytest.raises(UserError, match="mount point"):
        convert(source, tmp_path / "out", dry_run=True)
    convert(source, tmp_path / "out" / "model")


def test_an_error_leaves_no_new_folders_above_the_destination(make_checkpoint, tmp_path):
    source = make_checkpoint(tensors=llama_tensors(pruned=False))
    (tmp_path / "a").mkdir()
    with pytest.raises(FormatError, match="Prune it first"):
        convert(source, tmp_path / "a" / "b" / "c" / "out")
    assert list((tmp_path / "a").iterdir()) == []


def test_memory_limit(make_checkpoint, tmp_path):
    with pytest.raises(UserError, match="--max-memory"):
        convert(make_checkpoint(), tmp_path / "out", max_memory=1000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


def test_full_disk(make_checkpoint, tmp_path, monkeypatch):
    source = make_checkpoint(shards=3)
    calls = []

    def full(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="no space left"):
        convert(source, tmp_path / "new" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


def test_too_little_space_is_noticed_before_writing(make_checkpoint, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="no space left"):
        convert(make_checkpoint(), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


def test_interrupt_keeps_the_partial_and_resume_ends_byte_identical(make_checkpoint, tmp_path):
    source = make_checkpoint(shards=4)
    convert(source, tmp_path / "whole" / "out")

    def interrupt(phase, done, total):
        if phase == "writing" and done > total / 2:
            raise KeyboardInterrupt

    target = tmp_path / "again" / "out"
    with pytest.raises(KeyboardInterrupt):
        convert(source, target, progress=interrupt)
    assert not target.exists()
    kept = partial_path(target)
    done = [
        path
        for path in kept.glob("model-*")
        if path.name in json.loads((kept / "conversion-journal.json").read_text())["files"]
    ]
    assert done
    stamps = {path.name: path.stat().st_ino for path in done}
    # One finished shard is damaged: resume must notice and write it again.
    first, *rest = sorted(done)
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(data)
    # A limit that is too low is an error, and costs nothing of this.
    with pytest.raises(UserError, match="--max-memory"):
        convert(source, target, resume=True, max_memory=1)
    assert {path.name: path.stat().st_ino for path in done} == stamps
    phases = []
    convert(source, target, resume=True, progress=lambda phase, *_: phases.append(phase))
    assert "checking" not in phases
    assert {path.name: (target / path.name).stat().st_ino for path in rest} == {
        path.name: stamps[path.name] for path in rest
    }
    one, two = tree(tmp_path / "whole" / "out"), tree(target)
    # The card names the destination.
    for files in (one, two):
        files.pop("README.md")
        files[MANIFEST] = {k: v for k, v in json.loads(files[MANIFEST])["files"].items() if k != "README.md"}
    assert one == two
    assert not kept.exists()


def test_resume_of_another_conversion_starts_over(make_checkpoint, tmp_path):
    def interrupt(phase, *_):
        if phase == "writing":
            raise KeyboardInterrupt

    source, target = make_checkpoint(shards=2), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        convert(source, target, progress=interrupt)
    convert(source, target, weights="int8", resume=True)
    assert load(target)["model.layers.0.mlp.up_proj.compressed"].dtype == torch.int8


def test_resume_with_other_masks_starts_over(make_checkpoint, tmp_path):
    """MaskLLM's masks are a part of the source."""

    def masks(first: int) -> dict[str, np.ndarray]:
        kept = np.tile(np.arange(4) // 2 == first, 16)
        return {
            f"{name}.mask": np.packbits(np.resize(kept, value.numel()))
            for name, value in tensors.items()
            if "_proj" in name
        }

    def interrupt(phase, done, total):
        if phase == "writing" and done > total / 2:
            raise KeyboardInterrupt

    tensors = llama_tensors(pruned=False)
    source = make_checkpoint(tensors=tensors, shards=4)
    np.savez(source / "mask_compressed.npz", **masks(0))
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", progress=interrupt)
    np.savez(source / "mask_compressed.npz", **masks(1))
    convert(source, tmp_path / "out", resume=True)
    convert(source, tmp_path / "whole")
    resumed, whole = load(tmp_path / "out"), load(tmp_path / "whole")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["source"]["files"]["mask_compressed.npz"]["sha256"]


def test_kill_and_resume(tmp_path):
    """SIGKILL in the middle of writing; --resume ends with the same bytes as an undisturbed run."""
    source = write_checkpoint(tmp_path / "src", llama_tensors(), shards=5)
    script = (
        "import sys, time\nfrom converters.convert import convert\n"
        "def slow(phase, done, total):\n"
        "    if phase == 'writing':\n        time.sleep(0.2)\n"
        "convert(sys.argv[1], sys.argv[2], progress=slow)\n"
    )
    target = tmp_path / "out"
    child = subprocess.Popen([sys.executable, "-c", script, str(source), str(target)])
    journal = partial_path(target) / "conversion-journal.json"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if journal.exists() and '"model-0000' in journal.read_text():
            break
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not target.exists()
    assert journal.exists()
    convert(source, target, resume=True)
    resumed = tree(target)
    for path in target.iterdir():
        path.unlink()
    convert(source, target)
    assert tree(target) == resumed


def test_two_processes_cannot_write_one_destination(make_checkpoint, tmp_path):
    from converters.staging import Staging

    source = make_checkpoint()
    held = Staging(tmp_path / "out", "x", resume=False)
    with pytest.raises(UserError, match="another process"):
        convert(source, tmp_path / "out")
    held.discard()
    convert(source, tmp_path / "out")


def test_wrong_names_are_refused_before_work(make_checkpoint, tmp_path):
    source = make_checkpoint()
    for options, says in [
        ({"to": "gguf"}, "--to"),
        ({"weights": "int3"}, "--weights"),
        ({"format": "pickle!"}, "--format"),
        ({"to": "dense", "weights": "int8"}, "needs --to sparse24"),
    ]:
        with pytest.raises(UserError, match=says):
            convert(source, tmp_path / "out", **options)


@pytest.mark.parametrize("to", ["marlin-24", "sparse-bitmask"])
def test_formats_that_are_only_read_are_no_destination(make_checkpoint, tmp_path, to):
    with pytest.raises(UserError, match=rf"--to.*{to}.*sparse24.*dense"):
        convert(make_checkpoint(), tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()


def test_opening_twice_gives_the_same_tensors(make_checkpoint):
    source = make_checkpoint(shards=3)
    checkpoint = open_checkpoint(source)
    for name, tensor in load(source).items():
        assert torch.equal(checkpoint.read(name), tensor)


@pytest.mark.parametrize("shape", [(0, 64), (64, 0), (0, 0)])
@pytest.mark.parametrize("weights", ["keep", "int8", "fp8", "int4"])
def test_empty_weights_stay_dense(make_checkpoint, tmp_path, shape, weights):
    """An expert or adapter that was cut to nothing."""
    from converters.inspect import inspect
    from converters.verify import verify

    name = "model.layers.0.mlp.cut_proj"
    tensors = llama_tensors() | {f"{name}.weight": torch.zeros(shape, dtype=torch.bfloat16)}
    source = make_checkpoint(tensors=tensors)
    report = convert(source, tmp_path / "out", weights=weights)
    assert report.dense == {name: "it is empty"}
    assert inspect(tmp_path / "out").sparsity == pytest.approx(0.5)
    assert verify(source, tmp_path / "out", logits=False).ok


def test_a_checkpoint_of_nothing_but_empty_weights_is_inspected(make_checkpoint):
    from converters.inspect import inspect

    source = make_checkpoint(tensors={"a.weight": torch.zeros(0, 64)})
    assert inspect(source).sparsity == 0.0


@pytest.mark.parametrize("weights", ["int8", "fp8", "int4"])
def test_values_too_small_for_a_scale_become_zeros(make_checkpoint, tmp_path, weights):
    from converters.verify import verify

    tensors = llama_tensors(torch.float32)
    name = "model.layers.0.mlp.up_proj"
    tensors[f"{name}.weight"][0] = torch.tensor([1e-45, -1e-45, 0, 0]).repeat(16)
    source = make_checkpoint(tensors=tensors, config=CONFIG | {"dtype": "float32"})
    convert(source, tmp_path / "out", weights=weights)
    assert float(load(tmp_path / "out")[f"{name}.weight_scale"].min()) > 0
    assert verify(source, tmp_path / "out", logits=False).ok


def test_a_path_that_is_no_unicode(make_checkpoint, tmp_path, capsys):
    from converters.cli import run

    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    with pytest.raises(UserError, match="not valid UTF-8"):
        convert(make_checkpoint(), odd)
    os.rename(tmp_path / "src", odd)
    with pytest.raises(UserError, match="not valid UTF-8"):
        convert(odd, tmp_path / "out")
    assert run(["inspect", str(odd), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"].endswith("caf\ufffd")
