"""Prompts: random tokens, a text corpus, ShareGPT conversations, shared prefixes, recorded lengths.

Every generator is a pure function of its seed. Prompts of one run differ from each other (unless sharing a
prefix is the point), so that prefix caching cannot flatter; warm-up prompts use another seed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson

from bench.arrivals import read_trace
from bench.client import Request
from bench.tokenizer import PromptTokenizer
from vllm_sparse.errors import FormatError, UserError

DATASETS = ("random", "text", "sharegpt", "prefix", "trace")
DEFAULT_VOCAB = 1000
"""Ids 0..999 exist in every usual vocabulary; used when neither tokenizer nor vocabulary size is known."""


@dataclass(frozen=True, slots=True)
class WorkloadSpec:
    """What to send.

    Attributes:
        dataset: One of :data:`DATASETS`.
        num_requests: How many requests.
        input_len: Prompt tokens (random, text: exactly; prefix: the part that is not shared).
        output_len: ``max_tokens``; None takes the recorded answer's length (sharegpt, trace).
        path: Corpus, conversation or trace file.
        range_ratio: Lengths vary uniformly within ±that share of input_len and output_len.
        prefix_len: Shared prefix in tokens (prefix).
        num_prefixes: How many different prefixes (prefix).
        ignore_eos: Have the server generate exactly ``output_len`` tokens (vLLM, SGLang).
        seed: Seed of lengths and contents.
        as_text: Send text even where token ids would do; chat always sends text.
        trace_speed: Replay speed (trace).
    """

    dataset: str = "random"
    num_requests: int = 100
    input_len: int = 512
    output_len: int | None = 128
    path: Path | None = None
    range_ratio: float = 0.0
    prefix_len: int = 256
    num_prefixes: int = 1
    ignore_eos: bool = False
    seed: int = 0
    as_text: bool = False
    trace_speed: float = 1.0

    def check(self) -> None:
        """Raise :class:`UserError` for values that make no workload."""
        if self.dataset not in DATASETS:
            raise UserError(f"--dataset is {self.dataset!r}; choose one of {', '.join(DATASETS)}.")
        if self.num_requests < 1 or self.input_len < 1 or (self.output_len or 1) < 1:
            raise UserError(
                f"{self.num_requests} requests of {self.input_len} in, {self.output_len} out; "
                "each of the three must be at least 1."
            )
        if not 0 <= self.range_ratio < 1:
            raise UserError(f"--range-ratio is {self.range_ratio}; it must be at least 0 and below 1.")
        if self.dataset in ("text", "sharegpt", "trace") and self.path is None:
            raise UserError(f"--dataset {self.dataset} needs --dataset-path FILE.")
        if self.dataset == "prefix" and (self.prefix_len < 1 or self.num_prefixes < 1):
            raise UserError("--dataset prefix needs --prefix-len and --num-prefixes of at least 1.")


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests, and their recorded arrival times in seconds if the workload is a trace."""

    requests: list[Request]
    arrivals: list[float] | None = None


def build(
    spec: WorkloadSpec, tokenizer: PromptTokenizer | None, vocab_size: int | None, *, chat: bool
) -> Workload:
    """Make the workload.

    Args:
        spec: What to send.
        tokenizer: Needed for text prompts; with it, random ids avoid special tokens.
        vocab_size: Random ids stay below it when there is no tokenizer.
        chat: Prompts must be text.

    Raises:
        UserError: The specification cannot be met, for instance text prompts without a tokenizer.
        FormatError: A dataset file does not hold what it should.
    """
    spec.check()
    text_wanted = chat or spec.as_text
    if text_wanted and tokenizer is None and spec.dataset != "sharegpt":
        raise UserError("text prompts of a given length need --tokenizer DIR (the served model's directory).")
    rng = np.random.default_rng([spec.seed, 0x5EED])
    if spec.dataset == "sharegpt":
        return Workload(_sharegpt(spec, tokenizer, rng))
    arrivals: list[float] | None = None
    lengths = list(_lengths(spec, rng))
    if spec.dataset == "trace":
        entries = read_trace(_path(spec), speed=spec.trace_speed, limit=spec.num_requests)
        lengths = [(max(1, e.input_len), spec.output_len or e.output_len) for e in entries]
        arrivals = [e.at for e in entries]
    if spec.dataset == "text":
        prompts = _corpus_windows(_path(spec), [n for n, _ in lengths], tokenizer, rng)
    else:
        prompts = _random_ids([n for n, _ in lengths], _id_pool(tokenizer, vocab_size), rng)
    if spec.dataset == "prefix":
        prompts = _with_prefixes(prompts, spec, _id_pool(tokenizer, vocab_size), rng)
    requests = []
    for index, (ids, (_, output_len)) in enumerate(zip(prompts, lengths, strict=True)):
        prompt: str | list[int] = ids
        if text_wanted and tokenizer is not None:
            prompt = text_of_length(ids, tokenizer)
        requests.append(Request(index, prompt, output_len, spec.ignore_eos))
    return Workload(requests, arrivals)


def _path(spec: WorkloadSpec) -> Path:
    if spec.path is None or not spec.path.is_file():
        raise FormatError(f"--dataset-path {spec.path}: no such file.")
    return spec.path


def _lengths(spec: WorkloadSpec, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    def draw(mean: int) -> np.ndarray:
        low, high = round(mean * (1 - spec.range_ratio)), round(mean * (1 + spec.range_ratio))
        return rng.integers(max(1, low), high + 1, size=spec.num_requests)

    inputs, outputs = draw(spec.input_len), draw(spec.output_len or 128)
    return ((int(i), int(o)) for i, o in zip(inputs, outputs, strict=True))


def _id_pool(tokenizer: PromptTokenizer | None, vocab_size: int | None) -> np.ndarray:
    if tokenizer is not None:
        return np.asarray(tokenizer.allowed_ids)
    return np.arange(vocab_size or DEFAULT_VOCAB)


def _random_ids(lengths: Sequence[int], pool: np.ndarray, rng: np.random.Generator) -> list[list[int]]:
    return [pool[rng.integers(0, len(pool), size=n)].tolist() for n in lengths]


def _with_prefixes(
    prompts: list[list[int]], spec: WorkloadSpec, pool: np.ndarray, rng: np.random.Generator
) -> list[list[int]]:
    prefixes = _random_ids([spec.prefix_len] * spec.num_prefixes, pool, rng)
    owners = rng.integers(0, spec.num_prefixes, size=len(prompts))
    return [prefixes[owner] + prompt for owner, prompt in zip(owners, prompts, strict=True)]


def text_of_length(ids: list[int], tokenizer: PromptTokenizer, *, rounds: int = 8) -> str:
    """Text that encodes to about ``len(ids)`` tokens.

    Decoding random ids and encoding the text again merges some of them, so the ids are extended or cut
    until the count fits. A small rest may stay; the report holds the count the server saw.
    """
    target = len(ids)
    current = list(ids)
    text = tokenizer.decode(current)
    for _ in range(rounds):
        again = tokenizer.encode(text)
        if len(again) == target:
            break
        missing = target - len(again)
        current = again[:target] if missing < 0 else again + ids[:missing]
        text = tokenizer.decode(current)
    return text


def _corpus_windows(
    path: Path, lengths: Sequence[int], tokenizer: PromptTokenizer | None, rng: np.random.Generator
) -> list[list[int]]:
    if tokenizer is None:
        raise UserError("--dataset text needs --tokenizer DIR to cut prompts of a given length.")
    text = path.read_text(encoding="utf-8", errors="replace")
    # Only as much text as the longest sensible run can use: encoding gigabytes would take minutes.
    ids = tokenizer.encode(text[: max(1_000_000, 8 * sum(lengths))])
    longest = max(lengths)
    if len(ids) < longest:
        raise FormatError(
            f"{path}: {len(ids)} tokens of text, but a prompt needs {longest}. Use a longer corpus."
        )
    room = len(ids) - longest + 1
    # Distinct starts while there are enough of them, so that no two prompts are equal.
    starts = rng.choice(room, size=len(lengths), replace=room < len(lengths))
    return [ids[start : start + n] for start, n in zip(starts, lengths, strict=True)]


def _sharegpt(
    spec: WorkloadSpec, tokenizer: PromptTokenizer | None, rng: np.random.Generator
) -> list[Request]:
    """First question of each conversation, in random order; see :func:`_first_turn` for the shape."""
    path = _path(spec)
    try:
        data = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise FormatError(f"{path}: not JSON ({error}). ShareGPT files are one JSON list.") from error
    if not isinstance(data, list):
        raise FormatError(f"{path}: expected a JSON list of conversations, found {type(data).__name__}.")
    turns = [turn for turn in map(_first_turn, data) if turn is not None]
    if not turns:
        raise FormatError(f"{path}: no conversation with a question and an answer under 'conversations'.")
    if spec.output_len is None and tokenizer is None:
        raise UserError("answers' lengths need --tokenizer DIR; or give --output-len.")
    order = rng.permutation(len(turns))
    if len(turns) < spec.num_requests:
        raise UserError(
            f"{path}: {len(turns)} usable conversations, {spec.num_requests} requests asked; "
            "repeating prompts would let prefix caching flatter. Lower --num-requests."
        )
    requests = []
    for index, position in enumerate(order[: spec.num_requests]):
        question, answer = turns[position]
        length = spec.output_len
        if length is None and tokenizer is not None:
            length = max(1, len(tokenizer.encode(answer)))
        requests.append(Request(index, question, length or 1, spec.ignore_eos))
    return requests


def _first_turn(entry: object) -> tuple[str, str] | None:
    """First question and answer of ``{"conversations": [{"from": "human", "value": ...}, ...]}``."""
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    if not isinstance(turns, list) or len(turns) < 2:
        return None
    values = [turn.get("value") or turn.get("content") for turn in turns[:2] if isinstance(turn, dict)]
    if len(values) < 2 or not all(isinstance(value, str) and value for value in values):
        return None
    return str(values[0]), str(values[1])
