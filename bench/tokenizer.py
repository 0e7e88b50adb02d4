"""Tokenizers for building prompts; the server's own counts remain the truth in every report."""

from pathlib import Path
from typing import Any, Protocol

import orjson

from vllm_sparse.errors import FormatError


class PromptTokenizer(Protocol):
    """What prompt building needs of a tokenizer."""

    @property
    def allowed_ids(self) -> list[int]:
        """Ordinary ids: no special tokens, every id decodes to something."""

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, no special tokens added."""

    def decode(self, ids: list[int]) -> str:
        """Text of ``ids``."""


class _FastTokenizer:
    """``tokenizer.json``, read by the tokenizers library alone (importing transformers takes seconds)."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(path))
        special = {i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        self.allowed_ids = [i for i in sorted(self._tokenizer.get_vocab().values()) if i not in special]

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))


class _SlowTokenizer:
    """Any tokenizer that transformers can load."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
        special = set(self._tokenizer.all_special_ids)
        self.allowed_ids = [i for i in range(self._tokenizer.vocab_size) if i not in special]

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids))


def load_tokenizer(directory: Path) -> PromptTokenizer:
    """Load the tokenizer of a model directory.

    Raises:
        FormatError: The directory is missing or holds no tokenizer that can be read.
    """
    if not directory.is_dir():
        raise FormatError(f"--tokenizer {directory}: no such directory. Give a model or tokenizer directory.")
    fast = directory / "tokenizer.json"
    if fast.is_file():
        return _FastTokenizer(fast)
    try:
        return _SlowTokenizer(directory)
    except (OSError, ValueError, ImportError) as error:
        raise FormatError(
            f"--tokenizer {directory}: no tokenizer.json, and transformers cannot load it either: {error}"
        ) from error


def vocabulary_size(directory: Path) -> int | None:
    """``vocab_size`` of a model directory's config.json; None where it is not said."""
    try:
        config = orjson.loads((directory / "config.json").read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return None
    size = config.get("vocab_size") if isinstance(config, dict) else None
    return size if isinstance(size, int) and size > 0 else None
