"""How far two served models' answers are apart, teacher-forced, through the OpenAI completions API.

Greedy texts part ways from rounding alone, so both servers are given the same prompts and asked for the
log-probability they assign to each prompt token. Perplexity comes from the same numbers.

    a = score("http://127.0.0.1:8000", "dense", prompts)
    b = score("http://127.0.0.1:8001", "compressed", prompts)
    compare(a, b).mean_dlogprob, perplexity(b)
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.client import normalise_base_url
from bench.tokenizer import load_tokenizer, vocabulary_size
from vllm_sparse.errors import FormatError, NumericsError, UserError

MIN_POSITIONS = 4000
"""Positions below which a comparison says little; :func:`text_prompts` cuts enough windows."""
CONTEXT = 256
"""Tokens of a prompt where the server's context allows it."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What a server said about the prompts.

    Attributes:
        logprobs: float64 [positions], natural logarithm of the probability of each prompt token but the
            first of every prompt, prompts one after the other.
        top1: int64 [positions], id of the token the model finds most likely there.
        lengths: int64 [prompts], positions of each prompt (its length - 1).
        tokens: int64 [positions], the prompt tokens that were scored.
    """

    logprobs: npt.NDArray[np.float64]
    top1: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]

    @property
    def positions(self) -> int:
        """Number of scored tokens."""
        return int(self.logprobs.size)


@dataclass(frozen=True, slots=True)
class Parity:
    """Distance of two :class:`Scores` of the same prompts.

    Attributes:
        mean_dlogprob: Mean absolute difference of the log-probabilities of the prompt tokens.
        top1_agreement: Share of positions where both find the same token most likely.
        positions: How many positions were compared.
        max_dlogprob: Largest absolute difference.
        p99_dlogprob: 99th percentile of the absolute differences.
    """

    mean_dlogprob: float
    top1_agreement: float
    positions: int
    max_dlogprob: float
    p99_dlogprob: float

    def as_json(self) -> dict[str, float | int]:
        """The ``parity`` block of a report."""
        return {
            "mean_dlogprob": self.mean_dlogprob,
            "top1_agreement": self.top1_agreement,
            "positions": self.positions,
            "max_dlogprob": self.max_dlogprob,
            "p99_dlogprob": self.p99_dlogprob,
        }


def score(
    base_url: str,
    model: str,
    token_id_prompts: Sequence[Sequence[int]],
    *,
    api_key: str | None = None,
    concurrency: int = 4,
    timeout_s: float = 600.0,
) -> Scores:
    """Ask a vLLM server for the log-probabilities of the prompts' tokens.

    Uses vLLM's ``prompt_logprobs`` field, one request per prompt, with the ``openai`` client.

    Args:
        base_url: Server root, with or without ``/v1``.
        model: Served name.
        token_id_prompts: Prompts of at least two token ids each.
        api_key: Bearer token, if the server wants one.
        concurrency: Requests at a time.
        timeout_s: Longest time for one request.

    Raises:
        UserError: The server refuses or cannot be reached, the ``openai`` package is missing, or the
            answer holds no prompt log-probabilities.
        NumericsError: A log-probability is not finite.
    """
    prompts = [list(map(int, prompt)) for prompt in token_id_prompts]
    if not prompts or min(map(len, prompts)) < 2:
        raise UserError("every prompt needs at least two tokens: the first one is not predicted.")
    client = _client(base_url, api_key, timeout_s)
    with client, ThreadPoolExecutor(concurrency) as pool:
        rows = list(pool.map(lambda prompt: _score_one(client, model, prompt), prompts))
    logprobs = np.concatenate([row[0] for row in rows])
    if not np.isfinite(logprobs).all():
        bad = int(np.count_nonzero(~np.isfinite(logprobs)))
        raise NumericsError(f"{model}: {bad} of {logprobs.size} log-probabilities are not finite.")
    return Scores(
        logprobs=logprobs,
        top1=np.concatenate([row[1] for row in rows]),
        lengths=np.asarray([len(prompt) - 1 for prompt in prompts]),
        tokens=np.concatenate([np.asarray(prompt[1:]) for prompt in prompts]),
    )


def _client(base_url: str, api_key: str | None, timeout_s: float) -> Any:
    try:
        import openai
    except ImportError as error:
        raise UserError("comparing answers needs the openai package: pip install openai.") from error
    return openai.OpenAI(
        base_url=normalise_base_url(base_url) + "/v1",
        api_key=api_key or "none",
        timeout=timeout_s,
        max_retries=0,
        # Without a proxy, as everything else asks.
        http_client=openai.DefaultHttpxClient(mounts=dict.fromkeys(("http://", "https://", "all://"))),
    )


def _score_one(
    client: Any, model: str, prompt: list[int]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    import openai

    try:
        answer = client.completions.create(
            model=model, prompt=prompt, max_tokens=1, temperature=0.0, extra_body={"prompt_logprobs": 1}
        )
    except openai.APIStatusError as error:
        raise UserError(f"{client.base_url}: {error.message}") from error
    except openai.APIConnectionError as error:
        raise UserError(f"no answer from {client.base_url}: {error}") from error
    rows = getattr(answer.choices[0], "prompt_logprobs", None)
    if not isinstance(rows, list) or len(rows) != len(prompt):
        raise UserError(
            f"{client.base_url}: the answer holds no prompt_logprobs, which vLLM gives. "
            "Scoring prompts needs a vLLM server."
        )
    found = [_position(row, token) for row, token in zip(rows[1:], prompt[1:], strict=True)]
    return np.asarray([f[0] for f in found], dtype=np.float64), np.asarray([f[1] for f in found])


def _position(row: dict[str, dict[str, Any]], token: int) -> tuple[float, int]:
    """The prompt token's log-probability and the most likely token of one position.

    vLLM gives the prompt token always, and the best one besides when it is another.
    """
    best = min(row, key=lambda name: row[name].get("rank") or math.inf)
    return float(row[str(token)]["logprob"]), int(best)


def compare(a: Scores, b: Scores) -> Parity:
    """Distance between two servers' scores of the same prompts."""
    if not np.array_equal(a.tokens, b.tokens) or not np.array_equal(a.lengths, b.lengths):
        raise UserError("the two sets of scores belong to different prompts.")
    distance = np.abs(a.logprobs - b.logprobs)
    return Parity(
        mean_dlogprob=float(distance.mean()),
        top1_agreement=float((a.top1 == b.top1).mean()),
        positions=a.positions,
        max_dlogprob=float(distance.max()),
        p99_dlogprob=float(np.percentile(distance, 99)),
    )


def perplexity(scores: Scores) -> float:
    """exp of the mean negative log-probability over all scored positions."""
    return math.exp(-float(scores.logprobs.mean()))


def text_prompts(
    tokenizer_dir: Path,
    text: str | None = None,
    *,
    context: int = CONTEXT,
    positions: int = MIN_POSITIONS,
    seed: int = 0,
) -> list[list[int]]:
    """Cut text into prompts for :func:`score`.

    Args:
        tokenizer_dir: Directory of the models' common tokenizer.
        text: Text to score; None takes English prose that comes with Python (``pydoc`` topics).
        context: Tokens per prompt.
        positions: Scored positions wanted; as many prompts as that takes.
        seed: Chooses which windows of the text.

    Raises:
        FormatError: The text is too short.
    """
    if text is None:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics.values())
    ids = load_tokenizer(tokenizer_dir).encode(text)
    count = -(-positions // (context - 1))
    windows = len(ids) // context
    if windows < count:
        raise FormatError(
            f"{len(ids)} tokens of text give {windows} prompts of {context} tokens; {count} are needed for "
            f"{positions} positions. Use a longer text."
        )
    chosen = np.sort(np.random.default_rng(seed).choice(windows, size=count, replace=False))
    return [ids[w * context : (w + 1) * context] for w in chosen]


def random_prompts(
    model_dir: Path, *, context: int = CONTEXT, positions: int = MIN_POSITIONS, seed: int = 0
) -> list[list[int]]:
    """Random token ids for models without a tokenizer; parity of these is as telling, perplexity is not."""
    size = vocabulary_size(model_dir)
    if size is None:
        raise FormatError(f"{model_dir / 'config.json'} does not say vocab_size.")
    rng = np.random.default_rng(seed)
    count = -(-positions // (context - 1))
    return rng.integers(0, size, size=(count, context)).tolist()  # type: ignore[no-any-return]
