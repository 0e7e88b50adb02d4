"""The set of checkpoints that rivals are compared on, and how llama.cpp's side is asked."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bench.rivals import llama, serving
from bench.rivals.checkpoints import GROUP, SHAPES, Shape, write_set
from bench.rivals.cli import main
from vllm_sparse.errors import UserError

SMALL = Shape("small", 128, 256, 1, 2, 1, 64)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_set(tmp_path_factory.mktemp("set"), SMALL, lambda name: None)


def test_all_formats_hold_the_same_weights(checkpoints: dict[str, Path]) -> None:
    tensors = {name: load_file(path / "model.safetensors") for name, path in checkpoints.items()}
    module = "model.layers.0.mlp.up_proj"
    dense = tensors["bf16"][f"{module}.weight"]
    assert bool((dense.reshape(-1, 4) != 0).sum(-1).eq(2).all())
    scale = tensors["w8a8"][f"{module}.weight_scale"]
    int8 = tensors["w8a8"][f"{module}.weight"].float() * scale
    assert (int8 - dense.float()).abs().max() <= 0.501 * scale.max()
    packed = tensors["w4a16"][f"{module}.weight_packed"]
    nibbles = torch.stack([packed >> 4 * i & 15 for i in range(8)], -1).flatten(1).float() - 8
    step = tensors["w4a16"][f"{module}.weight_scale"].float().repeat_interleave(GROUP, 1)
    assert ((nibbles * step - dense.float()).abs() <= 0.51 * step + 2**-8 * dense.float().abs()).all()
    for name in ("2of4-bf16", "2of4-int8", "2of4-int4", "2of4-w4a8"):
        assert f"{module}.bitmask" in tensors[name]
        assert torch.equal(
            tensors[name]["model.embed_tokens.weight"], tensors["bf16"]["model.embed_tokens.weight"]
        )
    assert all(torch.equal(tensors["2of4-w4a8"][name], one) for name, one in tensors["2of4-int4"].items())
    for name, path in checkpoints.items():
        config = json.loads((path / "config.json").read_text())
        assert ("quantization_config" in config) == (name != "bf16")
        if name in ("2of4-int4", "2of4-w4a8"):
            activations = config["quantization_config"]["linear"]["activations"]
            assert activations == ("int8_per_token" if name == "2of4-w4a8" else "none")


def test_pairs_name_checkpoints_of_the_set(checkpoints: dict[str, Path]) -> None:
    assert {name for pair in serving.PAIRS.values() for name in pair} == set(checkpoints)
    assert {sparse for _, sparse in llama.PAIRS.values()} <= set(checkpoints)


def test_the_real_shape_has_its_number_of_weights() -> None:
    shape = SHAPES["llama-3.2-1b"]
    linears = shape.layers * sum(n * k for n, k in shape.linears().values())
    assert linears + shape.vocab * shape.hidden == 1_235_746_816  # Llama-3.2-1B without its norms


def test_an_interpreter_without_llama_cpp_is_a_readable_error(
    checkpoints: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = checkpoints["bf16"].parent
    broken = tmp_path / "python"
    broken.write_text(f"#!/bin/sh\nexec {sys.executable} -S -c 'import gguf'\n")
    broken.chmod(0o755)
    with pytest.raises(UserError, match="gguf"):
        llama.write_gguf(str(broken), folder, "q4_0")
    monkeypatch.setattr(
        sys, "argv", ["x", "llama-cpp", "--python", str(broken), "--kind", "q4_0", str(folder)]
    )
    assert main() == 2
    assert "llama-cpp-python" in capsys.readouterr().err
    assert not (folder / "q4_0.gguf").exists()


_FAKE_LLAMA = """
import json, pathlib, sys
if sys.argv[2] == "write":
    pathlib.Path(sys.argv[4]).write_bytes(b"GGUF")
else:
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        times = {"prefill_ms": [1e4] * asked["batch"], "step_ms": [0] + [1e4] * (asked["tokens"] - 1)}
        print(json.dumps(times), flush=True)
"""


@pytest.mark.serial
@pytest.mark.parametrize("float32_too", [False, True])
def test_both_commands_print_ratios_and_write_reports(
    fake_vllm: Path,
    make_model: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    float32_too: bool,
) -> None:
    monkeypatch.setattr(serving, "is_float32_a_rival", lambda: float32_too)
    for module in (serving, llama):  # the stand-in does not know vLLM's other flags
        monkeypatch.setattr(module, "FLAGS", "--max-model-len 1024")
    folder = make_model("bf16").parent
    make_model("2of4-bf16", slowdown=2.0)
    report = tmp_path / "report.json"
    words = ["vllm", "--pair", "bf16", "--repeats", "1", "--scenario", "decode-1", "--json", str(report)]
    monkeypatch.setattr(sys, "argv", ["x", *words, str(folder)])
    assert main() == 0
    out = capsys.readouterr().out
    assert "decode, batch 1" in out
    assert ("tpot_ms: bf16-dtype-float32 " in out) is float32_too
    entry = json.loads(report.read_text())["bf16"]["scenarios"][0]
    assert entry["ratio"]["tpot_ms"]["value"] < 0.8

    (tmp_path / "fake.py").write_text(_FAKE_LLAMA)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/fake.py "$@"\n')
    python.chmod(0o755)
    words = ["llama-cpp", "--python", str(python), "--kind", "bf16", "--repeats", "2", "--json", str(report)]
    monkeypatch.setattr(sys, "argv", ["x", *words, str(folder)])
    assert main() == 0
    out = capsys.readouterr().out
    assert "llama.cpp bf16 10000.0 ms" in out
    entries = json.loads(report.read_text())["bf16"]["scenarios"]
    assert [entry["name"] for entry in entries] == [scenario.name for scenario in serving.SCENARIOS]
    assert all(entry["ratio"]["value"] > 10 and len(entry["vllm_ms"]) == 2 for entry in entries)
