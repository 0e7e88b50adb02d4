"""What the client writes down about one request: raw monotonic timestamps, nothing derived.

All times are :func:`time.monotonic_ns` readings. On Linux that clock is shared by every process of the
machine, so records of several client processes (and of a loopback server) can be put side by side.
A moment that never came is ``None``, never 0.
"""

from array import array
from dataclasses import dataclass, field
from enum import StrEnum

NANOSECONDS = 1_000_000_000
"""In a second."""

UNKNOWN_TOKENS = -1
"""Entry of :attr:`RequestRecord.chunk_tokens` when the server sent no running token count."""


class Outcome(StrEnum):
    """How a request ended; every request that was sent has exactly one."""

    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class FailureKind(StrEnum):
    """Why a request failed, coarse enough to count."""

    CONNECT = "connect"
    DISCONNECTED = "disconnected"
    TIMEOUT = "timeout"
    HTTP = "http"
    SERVER_ERROR = "server_error"
    TRUNCATED = "truncated"
    MALFORMED = "malformed"


def _empty() -> "array[int]":
    return array("q")


@dataclass(slots=True)
class RequestRecord:
    """Raw observations of one request.

    Attributes:
        index: Position in the workload (not the order of sending).
        scheduled_ns: When the arrival process wanted it sent. In a closed loop: when the slot became free.
        dispatched_ns: When the client handed it to the HTTP stack.
        first_byte_ns: When the response headers were there.
        first_token_ns: When the first chunk that carries a generated token was read.
        last_token_ns: When the last such chunk was read (without streaming: when the body was complete).
        finished_ns: When the client was done with it, whatever the outcome.
        chunk_ns: Time of every token-carrying chunk, int64 nanoseconds.
        chunk_tokens: Tokens generated up to and including that chunk as the server counts them, or -1.
        prompt_tokens: Prompt length in the server's own count (``usage``).
        output_tokens: Generated tokens in the server's own count, or the number of chunks if it sent none.
        output_tokens_counted: False when ``output_tokens`` is only the number of chunks.
        turn: Position in its conversation, from 0.
        answer: Generated text in pieces, while a later turn needs it; None when nobody does.
    """

    index: int
    scheduled_ns: int
    dispatched_ns: int | None = None
    first_byte_ns: int | None = None
    first_token_ns: int | None = None
    last_token_ns: int | None = None
    finished_ns: int | None = None
    chunk_ns: "array[int]" = field(default_factory=_empty)
    chunk_tokens: "array[int]" = field(default_factory=_empty)
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    output_tokens_counted: bool = True
    http_status: int | None = None
    finish_reason: str | None = None
    attempts: int = 0
    turn: int = 0
    answer: list[str] | None = None
    outcome: Outcome = Outcome.CANCELLED
    failure: FailureKind | None = None
    detail: str = ""

    def fail(self, kind: FailureKind, detail: str) -> None:
        """Mark the request as failed; ``detail`` is kept short, it ends up in the report."""
        self.outcome = Outcome.FAILED
        self.failure = kind
        self.detail = " ".join(detail.split())[:300]

    def token_seen(self, now_ns: int, total_tokens: int) -> None:
        """Note a chunk that carries at least one token."""
        if self.first_token_ns is None:
            self.first_token_ns = now_ns
        self.last_token_ns = now_ns
        self.chunk_ns.append(now_ns)
        self.chunk_tokens.append(total_tokens)
