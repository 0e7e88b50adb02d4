import json
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from bench import server
from bench.loopback import LoopbackServer, Script


@pytest.fixture(scope="session")
def fast_server() -> Iterator[LoopbackServer]:
    """A scripted server without faults, shared by tests that do not look at its notes."""
    with LoopbackServer(Script(ttft_ms=10, gap_ms=2)) as server:
        yield server


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A word-level tokenizer of 200 words and one special token."""
    directory = tmp_path_factory.mktemp("tokenizer")
    vocabulary = {"<unk>": 0, **{f"w{i}": i + 1 for i in range(200)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<unk>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture
def fake_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Has servers run tests/bench/fake_vllm.py instead of vLLM."""
    here = Path(__file__).parent
    program = tmp_path / "vllm"
    program.write_text(
        f'#!/bin/sh\nPYTHONPATH={here.parents[1]} exec {sys.executable} {here}/fake_vllm.py "$@"\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(server, "vllm_program", lambda: str(program))
    return program


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Path]:
    """Makes directories that the stand-in for vLLM serves, ``slowdown`` times slower than its usual."""

    def make(name: str, slowdown: float = 1.0, weights: int = 64) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        (directory / "config.json").write_text(
            json.dumps({"vocab_size": 900, "max_position_embeddings": 1024})
        )
        save_file({"w": np.zeros(weights, dtype=np.float32)}, directory / "model.safetensors")
        (directory / "slowdown").write_text(str(slowdown))
        return directory

    return make


@pytest.fixture
def model(make_model: Callable[..., Path]) -> Path:
    return make_model("model")
