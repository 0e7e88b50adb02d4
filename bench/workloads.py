"""Prompts: random tokens, a text corpus, ShareGPT conversations, shared prefixes, recorded traces.

Every generator is a pure function of its seed. Prompts of one run differ from each other (unless sharing a
prefix is the point), so that prefix caching cannot flatter; warm-up prompts use another seed.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench import conversations
from bench.arrivals import TraceEntry, read_trace
from bench.client import Request
from bench.tokenizer import PromptTokenizer
from vllm_sparse.errors import FormatError, UserError

DATASETS = ("random", "text", "sharegpt", "prefix", "trace")
DEFAULT_VOCAB = 1000
"""Ids 0..999 exist in every usual vocabulary; used when neither tokenizer nor vocabulary size is known."""
BLOCK_TOKENS = 512
"""Tokens that one hash of a Mooncake trace stands for."""


@dataclass(frozen=True, slots=True)
class WorkloadSpec:
    """What to send.

    Attributes:
        dataset: One of :data:`DATASETS`.
        num_requests: How many requests; with several turns, how many conversations.
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
        turns: Turns of a conversation at most; later ones carry the server's answers as history. 0 takes all
            that are recorded (sharegpt). Several turns are always text.
        think_time_s: Time between an answer and the next turn.
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
    turns: int = 1
    think_time_s: float = 0.0

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
        if self.turns < 0 or (self.turns == 0 and self.dataset != "sharegpt"):
            raise UserError(
                f"--turns is {self.turns}; give 1 or more (0 for all that are recorded: sharegpt)."
            )
        if self.turns != 1 and self.dataset == "trace":
            raise UserError("--turns does not go with --dataset trace, whose requests are single ones.")
        if not 0 <= self.think_time_s < math.inf:
            raise UserError(f"--think-time is {self.think_time_s}; it must be at least 0 seconds.")
        if self.seed < 0:
            raise UserError(f"--seed is {self.seed}; it must be at least 0.")


@dataclass(frozen=True, slots=True)
class Workload:
    """What is sent.

    Attributes:
        requests: All of them, turns of a conversation one after the other.
        arrivals: Recorded arrival times in seconds if the workload is a trace.
        conversations: Indices of the requests of each conversation; None when all are single ones.
    """

    requests: list[Request]
    arrivals: list[float] | None = None
    conversations: list[list[int]] | None = None

    def firsts(self) -> list[Request]:
        """The requests that have no history."""
        return [request for request in self.requests if request.turn == 0]


def build(
    spec: WorkloadSpec,
    tokenizer: PromptTokenizer | None,
    vocab_size: int | None,
    *,
    chat: bool,
    context: int | None = None,
) -> Workload:
    """Make the workload.

    Args:
        spec: What to send.
        tokenizer: Needed for text prompts; with it, random ids avoid special tokens.
        vocab_size: Random ids stay below it when there is no tokenizer.
        chat: Prompts must be text.
        context: The server's context length, where known; recorded conversations are cut to it.

    Raises:
        UserError: The specification cannot be met, for instance text prompts without a tokenizer.
        FormatError: A dataset file does not hold what it should.
    """
    spec.check()
    text_wanted = chat or spec.as_text or spec.turns != 1
    if text_wanted and tokenizer is None and spec.dataset != "sharegpt":
        raise UserError("text prompts of a given length need --tokenizer DIR (the served model's directory).")
    rng = np.random.default_rng([spec.seed, 0x5EED])
    if spec.dataset == "sharegpt":
        return _recorded_conversations(spec, tokenizer, context, rng)
    lengths = list(_lengths(spec, rng))
    entries: list[TraceEntry] = []
    pool = _id_pool(tokenizer, vocab_size)
    if spec.dataset == "trace":
        entries = read_trace(_path(spec), speed=spec.trace_speed, limit=spec.num_requests)
        lengths = [_entry_lengths(entry, spec, drawn) for entry, drawn in zip(entries, lengths, strict=False)]
    if spec.dataset == "text":
        prompts = _corpus_windows(_path(spec), [n for n, _ in lengths], tokenizer, rng)
    else:
        prompts = _random_ids([n for n, _ in lengths], pool, rng)
    if spec.dataset == "prefix":
        prompts = _with_prefixes(prompts, spec, pool, rng)
    if any(entry.blocks for entry in entries):
        prompts = [
            _with_blocks(ids, entry.blocks, pool, spec.seed)
            for ids, entry in zip(prompts, entries, strict=True)
        ]
    requests = []
    for index, (ids, (_, output_len)) in enumerate(zip(prompts, lengths, strict=True)):
        prompt: str | list[int] = ids
        if text_wanted and tokenizer is not None:
            prompt = text_of_length(ids, tokenizer)
        requests.append(Request(index, prompt, output_len, spec.ignore_eos, turn=index % spec.turns))
    arrivals = [entry.at for entry in entries] if spec.dataset == "trace" else None
    return Workload(requests, arrivals, _grouped(requests) if spec.turns > 1 else None)


def _grouped(requests: Sequence[Request]) -> list[list[int]]:
    """Indices of each conversation: a new one begins with every turn 0."""
    groups: list[list[int]] = []
    for request in requests:
        if request.turn == 0:
            groups.append([])
        groups[-1].append(request.index)
    return groups


def _recorded_conversations(
    spec: WorkloadSpec, tokenizer: PromptTokenizer | None, context: int | None, rng: np.random.Generator
) -> Workload:
    chosen = conversations.sample(
        _path(spec),
        spec.num_requests,
        turns=spec.turns,
        output_len=spec.output_len,
        tokenizer=tokenizer,
        context=context,
        rng=rng,
    )
    turns = [(question, length, turn) for one in chosen for turn, (question, length) in enumerate(one)]
    requests = [
        Request(index, question, length, spec.ignore_eos, turn)
        for index, (question, length, turn) in enumerate(turns)
    ]
    return Workload(requests, None, _grouped(requests) if spec.turns != 1 else None)


def _entry_lengths(entry: TraceEntry, spec: WorkloadSpec, drawn: tuple[int, int]) -> tuple[int, int]:
    """Prompt and output tokens of a trace entry; what it does not say comes from the specification."""
    if entry.input_len is None or entry.output_len is None:
        return drawn
    return max(1, entry.input_len), spec.output_len or entry.output_len


def _with_blocks(ids: list[int], blocks: Sequence[int], pool: np.ndarray, seed: int) -> list[int]:
    """``ids`` with the tokens that recorded block hashes stand for: equal hashes give equal tokens.

    The first tokens come from the blocks, the last block is usually a part of one.
    """
    whole = [_block(hash_id, pool, seed) for hash_id in blocks]
    shared = [token for block in whole for token in block][: len(ids)]
    return shared + ids[len(shared) :]


def _block(hash_id: int, pool: np.ndarray, seed: int) -> list[int]:
    rng = np.random.default_rng([seed, 0xB10C, hash_id])
    return pool[rng.integers(0, len(pool), size=BLOCK_TOKENS)].tolist()


def _path(spec: WorkloadSpec) -> Path:
    if spec.path is None or not spec.path.is_file():
        raise FormatError(f"--dataset-path {spec.path}: no such file.")
    return spec.path


def _lengths(spec: WorkloadSpec, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    count = spec.num_requests * spec.turns

    def draw(mean: int) -> np.ndarray:
        low, high = round(mean * (1 - spec.range_ratio)), round(mean * (1 + spec.range_ratio))
        return rng.integers(max(1, low), high + 1, size=count)

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
