from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

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
