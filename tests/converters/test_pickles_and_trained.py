"""Pickles only by opt-in and in a sandbox; training checkpoints become what the trainer computed with."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_maker import CONFIG, llama_tensors, prune, write_checkpoint
from safetensors.torch import load_file
from torch.nn import functional as F

from converters import sandbox
from converters.checkpoint import open_checkpoint
from converters.convert import convert
from converters.hf import load_for_evaluation
from converters.readers import make_reader
from converters.readers.trained import canonical_name, pooling_width, transposable_mask, transposable_patterns
from vllm_sparse.errors import FormatError, UnsupportedError, UserError
from vllm_sparse.sparse24 import is_24


@pytest.fixture
def pickled(tmp_path) -> Path:
    """A checkpoint in two .bin shards with an index, as old transformers wrote it."""
    folder = tmp_path / "src"
    folder.mkdir()
    tensors = llama_tensors()
    names = list(tensors)
    weight_map = {}
    for shard, part in enumerate((names[:9], names[9:]), 1):
        file = f"pytorch_model-{shard:05d}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def test_bin_shards(pickled, tmp_path):
    with pytest.raises(UnsupportedError, match="--allow-pickle"):
        convert(pickled, tmp_path / "out")
    report = convert(pickled, tmp_path / "out", allow_pickle=True)
    assert report.packed == 14
    convert(tmp_path / "out", tmp_path / "dense", to="dense")
    tensors = llama_tensors()
    back = {k: v for p in (tmp_path / "dense").glob("*.safetensors") for k, v in load_file(p).items()}
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out", "src"]
    assert not list((tmp_path / "out").glob("*.bin"))
    assert "--allow-pickle" in (tmp_path / "out/README.md").read_text()


def test_a_single_file_can_be_converted_into_its_own_folder(tmp_path):
    torch.save(llama_tensors(), tmp_path / "model.pt")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert convert(tmp_path / "model.pt", tmp_path / "out", allow_pickle=True).packed == 14
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.pt", "out"]


def test_a_dry_run_leaves_no_folders(pickled, tmp_path):
    assert convert(pickled, tmp_path / "a" / "b" / "out", allow_pickle=True, dry_run=True).packed == 14
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]
    with pytest.raises(UserError, match="never changed"):
        convert(pickled, pickled / "out", allow_pickle=True)


class Evil:
    """Runs code when unpickled without care."""

    def __reduce__(self):
        return (os.system, (f"touch {os.environ['EVIL_FILE']}",))


@pytest.mark.parametrize("content", ["evil", "empty", "garbage", "no tensors"])
def test_hostile_pickles(tmp_path, monkeypatch, content):
    folder = tmp_path / "src"
    folder.mkdir()
    monkeypatch.setenv("EVIL_FILE", str(tmp_path / "pwned"))
    path = folder / "pytorch_model.bin"
    if content == "evil":
        torch.save({"weight": torch.zeros(2), "x": Evil()}, path)
    elif content == "no tensors":
        torch.save({"a": 1}, path)
    else:
        path.write_bytes(b"" if content == "empty" else b"garbage" * 100)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(FormatError, match="cannot be opened as tensors alone"):
        convert(folder, tmp_path / "out", allow_pickle=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src"]


def test_pickle_index_cannot_leave_the_folder(pickled, tmp_path):
    index = {"weight_map": {"a": "../evil.bin"}}
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match="plain file names"):
        convert(pickled, tmp_path / "out", allow_pickle=True)


def test_the_sandbox_holds(tmp_path):
    """In it: no network, no writing outside the folder, no program started, as far as this kernel allows."""
    (tmp_path / "in").mkdir()
    script = (
        "import json, os, socket, subprocess, sys\nfrom pathlib import Path\nfrom converters import sandbox\n"
        "missing = sandbox.enter(Path('in'), 4 << 30, 60, 1 << 30)\n"
        "def blocked(action):\n"
        "    try:\n        action()\n    except OSError:\n        return True\n    return False\n"
        "print(json.dumps({'missing': missing,\n"
        "  'inside': blocked(lambda: Path('in/x').write_text('x')),\n"
        "  'outside': blocked(lambda: Path('y').write_text('y')),\n"
        "  'run': blocked(lambda: subprocess.run(['/bin/true'], check=True)),\n"
        "  'network': blocked(lambda: socket.create_connection(('127.0.0.1', int(sys.argv[1])), "
        "timeout=5))}))\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-c", script, port], cwd=tmp_path, capture_output=True, text=True, check=True
        )
    found = json.loads(done.stdout)
    missing = " ".join(found["missing"])
    assert not found["inside"]
    assert found["outside"] is found["run"] is ("landlock" not in missing)
    assert found["network"] is ("network" not in missing)


def test_limits_are_set():
    import resource

    code = subprocess.run(
        [
            sys.executable,
            "-c",
            "from converters import sandbox; sandbox.set_limits(1 << 30, 5, 100)\n"
            "import resource; print(resource.getrlimit(resource.RLIMIT_AS)[0])\n"
            "try:\n    bytearray(2 << 30)\nexcept MemoryError:\n    print('bounded')",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert code.stdout.split() == [str(1 << 30), "bounded"]
    assert resource.getrlimit(resource.RLIMIT_CORE) is not None
    assert sandbox.logger.name == "converters.sandbox"


ARGS = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "block_size": 64,
    "vocab_size": 96,
    "bias": False,
    "dropout": 0.0,
}


def nanogpt(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows, cols):
        return torch.randn(rows, cols, generator=generator) * 0.1

    state = {"transformer.wte.weight": matrix(96, 32), "transformer.wpe.weight": matrix(64, 32)}
    for layer in range(2):
        prefix = f"transformer.h.{layer}"
        state |= {
            f"{prefix}.ln_1.weight": torch.ones(32),
            f"{prefix}.ln_2.weight": torch.ones(32),
            f"{prefix}.attn.c_attn.weight": matrix(96, 32),
            f"{prefix}.attn.c_proj.weight": matrix(32, 32),
            f"{prefix}.mlp.c_fc.weight": matrix(128, 32),
            f"{prefix}.mlp.c_proj.weight": matrix(32, 128),
        }
    return state | {
        "transformer.ln_f.weight": torch.ones(32),
        "lm_head.weight": state["transformer.wte.weight"],
    }


def forward(state: dict[str, torch.Tensor], tokens: torch.Tensor, linear) -> torch.Tensor:
    """nanoGPT's forward pass, written out; ``linear(name, x)`` is the masked layer."""
    x = state["transformer.wte.weight"][tokens] + state["transformer.wpe.weight"][: tokens.shape[1]]
    for layer in range(2):
        prefix = f"transformer.h.{layer}"
        h = F.layer_norm(x, (32,), state[f"{prefix}.ln_1.weight"], None, 1e-5)
        q, k, v = (
            part.unflatten(-1, (2, 16)).transpose(1, 2)
            for part in linear(f"{prefix}.attn.c_attn", h).split(32, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + linear(f"{prefix}.attn.c_proj", y)
        h = F.layer_norm(x, (32,), state[f"{prefix}.ln_2.weight"], None, 1e-5)
        x = x + linear(f"{prefix}.mlp.c_proj", F.gelu(linear(f"{prefix}.mlp.c_fc", h)))
    return F.layer_norm(x, (32,), state["transformer.ln_f.weight"], None, 1e-5) @ state["lm_head.weight"].t()


TOKENS = torch.arange(40).reshape(2, 20) * 3 % 96


def logits(path):
    with torch.no_grad():
        return load_for_evaluation(path)(input_ids=TOKENS, use_cache=False).logits


def save_training(folder: Path, state: dict) -> Path:
    folder.mkdir(exist_ok=True)
    wrapped = {f"_orig_mod.{name}": tensor for name, tensor in state.items()}
    path = folder / "ckpt.pt"
    torch.save({"model": wrapped, "optimizer": {"lr": 1.0}, "model_args": ARGS, "iter_num": 7}, path)
    return path


def test_nanogpt_as_it_is(tmp_path):
    state = nanogpt()
    source = save_training(tmp_path / "src", state)
    convert(source, tmp_path / "out", to="dense", format="nanogpt", allow_pickle=True)
    expected = forward(state, TOKENS, lambda name, x: x @ state[f"{name}.weight"].t())
    assert torch.allclose(logits(tmp_path / "out"), expected, atol=1e-4)


def test_ast_gpt2_recomputes_the_mask(tmp_path):
    state = nanogpt()
    source = save_training(tmp_path / "src", state)
    report = convert(source, tmp_path / "out", format="ast", allow_pickle=True)
    assert report.packed == 8
    expected = forward(state, TOKENS, lambda name, x: x @ prune(state[f"{name}.weight"]).t())
    assert torch.allclose(logits(tmp_path / "out"), expected, atol=1e-4)


@pytest.mark.parametrize("pooled", [True, False])
def test_ast_slorb_becomes_a_low_rank_branch(tmp_path, pooled):
    state = nanogpt()
    generator = torch.Generator().manual_seed(9)
    for name in [n for n in state if ".c_" in n]:
        module, cols = name.removesuffix(".weight"), state[name].shape[1]
        projection = torch.eye(cols // 8).repeat_interleave(8, dim=1)
        state[f"{module}.x_proj"] = projection if pooled else projection + 0.01
        state[f"{module}.SLoRB_Weight"] = (
            torch.randn(state[name].shape[0], cols // 8, generator=generator) * 0.1
        )
    source = save_training(tmp_path / "src", state)
    convert(source, tmp_path / "out", format="ast", allow_pickle=True)

    def linear(name, x):
        branch = (x @ state[f"{name}.x_proj"].t()) @ state[f"{name}.SLoRB_Weight"].t()
        return x @ prune(state[f"{name}.weight"]).t() + branch

    assert torch.allclose(logits(tmp_path / "out"), forward(state, TOKENS, linear), atol=1e-4)
    block = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert block["quant_method"] == "sparse24"
    assert block["linear"]["low_rank"] == {
        "projection": "pooled" if pooled else "dense",
        "columns_per_rank": 8,
    }
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert ("transformer.h.0.mlp.c_fc.low_rank_a" in tensors) is not pooled
    assert tensors["transformer.h.0.mlp.c_fc.low_rank_b"].shape == (128, 4)
    convert(tmp_path / "out", tmp_path / "dense", to="dense")
    assert torch.allclose(logits(tmp_path / "dense"), forward(state, TOKENS, linear), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_rank_branches_keep_their_bits(tmp_path, dtype):
    state = {name: tensor.to(dtype) for name, tensor in nanogpt().items()}
    for name in [n for n in state if ".c_" in n]:
        module = name.removesuffix(".weight")
        state[f"{module}.x_proj"] = torch.rand(4, state[name].shape[1]).to(dtype)
        state[f"{module}.SLoRB_Weight"] = torch.rand(state[name].shape[0], 4).to(dtype)
    # Widths 32 and 128 with one rank are two kinds of branch, which the format cannot say.
    with pytest.raises(UnsupportedError, match="differ between layers"):
        convert(save_training(tmp_path / "src", state), tmp_path / "out", format="ast", allow_pickle=True)
    for layer in range(2):
        for suffix, shape in {"x_proj": (16, 128), "SLoRB_Weight": (32, 16)}.items():
            state[f"transformer.h.{layer}.mlp.c_proj.{suffix}"] = torch.rand(shape).to(dtype)
    convert(save_training(tmp_path / "src", state), tmp_path / "out", format="ast", allow_pickle=True)
    reader = make_reader(open_checkpoint(tmp_path / "out"))
    packed = [entry for entry in reader.entries() if entry.stored != "dense"]
    assert len(packed) == 8
    for entry in packed:
        loaded = reader.load(entry)
        # Equal magnitudes may be broken either way; what is kept weighs the same.
        kept = loaded.weight != 0
        assert is_24(loaded.weight)
        assert torch.equal(loaded.weight[kept], state[entry.name][kept])
        assert torch.equal(
            loaded.weight.double().abs().sum(-1), prune(state[entry.name]).double().abs().sum(-1)
        )
        assert torch.equal(loaded.companions[f"{entry.module}.low_rank_a"], state[f"{entry.module}.x_proj"])
        assert torch.equal(
            loaded.companions[f"{entry.module}.low_rank_b"], state[f"{entry.module}.SLoRB_Weight"]
        )
    config = json.loads((tmp_path / "out/config.json").read_text())
    config["quantization_config"]["linear"]["low_rank"]["columns_per_rank"] = 4
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"config\.json asks for"):
        make_reader(open_checkpoint(tmp_path / "out")).entries()


def test_2by4_takes_the_transposable_mask_on_the_ffn(tmp_path):
    state = nanogpt()
    source = save_training(tmp_path / "src", state)
    report = convert(source, tmp_path / "out", format="2by4", allow_pickle=True)
    assert report.packed == 4
    assert len(report.dense) == 4

    def linear(name, x):
        weight = state[f"{name}.weight"]
        return x @ (weight * transposable_mask(weight) if ".mlp." in name else weight).t()

    assert torch.allclose(logits(tmp_path / "out"), forward(state, TOKENS, linear), atol=1e-4)


def test_transposable_masks():
    assert transposable_patterns().shape == (90, 4, 4)
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(2))
    mask = transposable_mask(weight)
    assert is_24(weight * mask)
    assert is_24((weight * mask).t())
    assert int(mask.sum()) == mask.numel() // 2
    block, kept = weight[:4, :4].abs(), mask[:4, :4]
    assert float((block * kept).sum()) == pytest.approx(
        max(float((block * pattern).sum()) for pattern in transposable_patterns())
    )


def test_ast_llama_uses_the_saved_mask(tmp_path):
    tensors = llama_tensors(torch.float32, pruned=False)
    names = {
        "self_attn.q_proj": "attn.wq",
        "self_attn.k_proj": "attn.wk",
        "self_attn.v_proj": "attn.wv",
        "self_attn.o_proj": "attn.out_proj",
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
    }
    state, expected = {}, {}
    for name, tensor in tensors.items():
        expected[name] = tensor
        new = (
            name.replace("model.embed_tokens", "wte")
            .replace("model.norm", "ln_f")
            .replace("lm_head", "output")
        )
        new = new.replace("model.layers.", "blocks.")
        for theirs, ours in names.items():
            new = new.replace(theirs, ours)
        state[f"model.transformer.{new}"] = tensor
        if "_proj" in name:
            # A mask that is not the top 2, as after the weights moved on.
            mask = torch.tensor([True, True, False, False]).repeat(tensor.numel() // 4).reshape(tensor.shape)
            state[f"model.transformer.{new.removesuffix('.weight')}.mask"] = mask
            state[f"model.transformer.{new.removesuffix('.weight')}.inital_mask"] = ~mask
            expected[name] = tensor * mask
    state["model.teacher.transformer.wte.weight"] = torch.zeros(3)
    folder = tmp_path / "src"
    folder.mkdir()
    torch.save({"state": {"model": state, "timestamp": 1}, "rng": []}, folder / "latest.pt")
    (folder / "config.json").write_text(json.dumps(CONFIG | {"dtype": "float32"}))
    report = convert(folder, tmp_path / "out", format="ast", allow_pickle=True)
    assert report.packed == 14
    reader = make_reader(open_checkpoint(tmp_path / "out"))
    got = {entry.name: reader.load(entry).weight for entry in reader.entries()}
    assert set(got) == set(expected)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_names_of_training_checkpoints():
    assert canonical_name("_orig_mod.transformer.h.3.attn.c_attn.bias") == "transformer.h.3.attn.c_attn.bias"
    assert canonical_name("transformer.h.3.attn.bias") is None
    assert canonical_name("state.model.model.transformer.ln_f.weight") == "model.norm.weight"
    with pytest.raises(FormatError, match="not a tensor of a known"):
        canonical_name("model.transformer.blocks.0.strange.weight")
    assert pooling_width(torch.eye(4).repeat_interleave(3, dim=1)) == 3
    assert pooling_width(torch.rand(4, 12)) is None


def test_a_training_checkpoint_without_sizes(tmp_path):
    folder = tmp_path / "src"
    folder.mkdir()
    torch.save({"model": nanogpt()}, folder / "ckpt.pt")
    with pytest.raises(FormatError, match=r"n_layer.*config\.json"):
        convert(folder, tmp_path / "out", format="ast", allow_pickle=True)
    with pytest.raises(UnsupportedError, match="pickle"):
        convert(folder / "ckpt.pt", tmp_path / "out")
    with pytest.raises(UserError, match=r"no such folder|pickle"):
        convert(tmp_path / "nothing.pt", tmp_path / "out", allow_pickle=True)
    write_checkpoint(tmp_path / "fine", llama_tensors())
    assert convert(tmp_path / "fine", tmp_path / "out", allow_pickle=True).packed == 14
