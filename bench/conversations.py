"""Recorded conversations in ShareGPT's form, as requests: the first question, or several turns.

A file is one JSON list of ``{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}]}``;
``messages`` with ``role`` and ``content`` is taken as well. Recorded answers decide how many tokens are asked
for; what a later turn sees as history is what the *server* answered.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import orjson

from bench.tokenizer import PromptTokenizer
from vllm_sparse.errors import FormatError, UserError

Pair = tuple[str, str]
Turn = tuple[str, int]
"""Question, and tokens to generate."""

_ANSWERS = frozenset({"gpt", "assistant", "chatgpt", "bing", "bard", "model"})
# Room for what a chat template adds to a turn and for answers that encode to more tokens than were generated.
_TURN_SLACK = 16


def read_conversations(path: Path) -> list[list[Pair]]:
    """Question and answer pairs of every conversation that has one.

    Raises:
        FormatError: The file is not JSON, not a list, or holds no conversation.
    """
    try:
        data = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise FormatError(f"{path}: not JSON ({error}). ShareGPT files are one JSON list.") from error
    if not isinstance(data, list):
        raise FormatError(f"{path}: expected a JSON list of conversations, found {type(data).__name__}.")
    found = [pairs for pairs in map(_pairs, data) if pairs]
    if not found:
        raise FormatError(f"{path}: no conversation with a question and an answer under 'conversations'.")
    return found


def _pairs(entry: object) -> list[Pair]:
    turns = (entry.get("conversations") or entry.get("messages")) if isinstance(entry, dict) else None
    pairs: list[Pair] = []
    question: str | None = None
    for turn in turns if isinstance(turns, list) else []:
        text = (turn.get("value") or turn.get("content")) if isinstance(turn, dict) else None
        if not isinstance(text, str) or not text:
            break
        role = turn.get("from") or turn.get("role")
        if role == "system":
            continue
        if question is not None and (role is None or role in _ANSWERS):
            pairs.append((question, text))
            question = None
        elif role not in _ANSWERS:
            question = text
    return pairs


def sample(
    path: Path,
    count: int,
    *,
    turns: int,
    output_len: int | None,
    tokenizer: PromptTokenizer | None,
    context: int | None,
    rng: np.random.Generator,
) -> list[list[Turn]]:
    """``count`` different conversations in random order.

    Args:
        path: The file.
        count: How many.
        turns: Turns of each at most; 0 for all.
        output_len: Tokens to generate in every turn; None for the length of the recorded answer.
        tokenizer: Counts tokens; needed without ``output_len``.
        context: The server's limit; turns that would not fit are left out. Needs the tokenizer.
        rng: Decides the order.

    Raises:
        UserError: There are fewer conversations than asked, or answers' lengths are not known.
        FormatError: See :func:`read_conversations`.
    """
    if output_len is None and tokenizer is None:
        raise UserError("answers' lengths need --tokenizer DIR; or give --output-len.")
    recorded = read_conversations(path)
    chosen: list[list[Turn]] = []
    for position in rng.permutation(len(recorded)):
        pairs = recorded[position][: turns or None]
        kept = _fitting(pairs, output_len, tokenizer, context)
        if kept:
            chosen.append(kept)
        if len(chosen) == count:
            return chosen
    raise UserError(
        f"{path}: {len(chosen)} usable conversations, {count} asked for with --num-requests; "
        "repeating prompts would let prefix caching flatter. Lower --num-requests."
    )


def _fitting(
    pairs: Sequence[Pair], output_len: int | None, tokenizer: PromptTokenizer | None, context: int | None
) -> list[Turn]:
    """The turns from the first on that fit the context together."""
    kept: list[Turn] = []
    used = 0
    for question, answer in pairs:
        length = output_len
        if length is None and tokenizer is not None:
            length = max(1, len(tokenizer.encode(answer)))
        length = length or 1
        if context is not None and tokenizer is not None:
            used += len(tokenizer.encode(question)) + length + _TURN_SLACK
            if used > context:
                break
        kept.append((question, length))
    return kept
