"""Mixed load without an end: streams, whole answers, chat, shared prefixes, hang-ups and wrong requests.

Nothing is kept per request but counts, so that the client's own memory does not grow with time.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from bench.client import Request, Target, make_session, send
from bench.records import FailureKind, Outcome, RequestRecord
from bench.tokenizer import PromptTokenizer
from bench.workloads import text_of_length

DETAILS_KEPT = 20
# How often each kind is sent, in percent.
MIX = {
    "stream": 30,
    "whole": 20,
    "chat": 15,
    "prefix": 15,
    "long": 5,
    "hang-up": 10,
    "refused": 5,
}
_PREFIXES = 4


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the requests in tokens; ``max_len`` is the server's limit for prompt and answer."""

    max_len: int
    prompt: tuple[int, int] = (8, 96)
    output: tuple[int, int] = (4, 48)

    @property
    def prefix_len(self) -> int:
        """Length of the shared prefixes."""
        return self.max_len // 4

    @property
    def long_len(self) -> int:
        """Prompt length that leaves just enough room for an answer."""
        return self.max_len - self.output[1] - 2


@dataclass(slots=True)
class Tally:
    """What has been sent so far.

    Attributes:
        sent: requests by kind.
        completed: complete answers by kind; for ``refused``: properly refused with status 400.
        hung_up: streams that the client cut off on purpose.
        failed: everything else by kind.
        details: the first failures in words.
        output_tokens: generated tokens of complete answers, in the server's count.
    """

    sent: Counter[str] = field(default_factory=Counter)
    completed: Counter[str] = field(default_factory=Counter)
    hung_up: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    details: list[str] = field(default_factory=list)
    output_tokens: int = 0

    def fail(self, kind: str, detail: str) -> None:
        """Count one failure of ``kind``."""
        self.failed[kind] += 1
        if len(self.details) < DETAILS_KEPT:
            self.details.append(f"{kind}: {detail}")


class MixedLoad:
    """``users`` clients that send one request after the other, each of a random kind.

    Args:
        target: server and model; endpoint and streaming are chosen per request.
        tokenizer: the served model's.
        shape: sizes of requests.
        users: most requests in flight at a time.
        seed: of the sequence of kinds and contents.
        rate: requests per second of all users together, at even gaps; None sends without a pause.
    """

    def __init__(
        self,
        target: Target,
        tokenizer: PromptTokenizer,
        shape: Shape,
        users: int,
        seed: int = 0,
        rate: float | None = None,
    ) -> None:
        self.tally = Tally()
        self._target = target
        self._tokenizer = tokenizer
        self._shape = shape
        self._users = users
        self._rng = np.random.default_rng(seed)
        self._pool: np.ndarray = np.asarray(tokenizer.allowed_ids)
        self._prefixes = [self._ids(shape.prefix_len) for _ in range(_PREFIXES)]
        self._sent = 0
        self._gap_s = 0.0 if rate is None else 1 / rate
        self._next_at = 0.0

    async def run(self, until: float) -> None:
        """Send until :func:`time.monotonic` passes ``until``; requests in flight are finished."""
        await asyncio.gather(*(self._user(until) for _ in range(self._users)))

    async def _user(self, until: float) -> None:
        kinds, weights = list(MIX), np.asarray(list(MIX.values())) / sum(MIX.values())
        while time.monotonic() < until:
            # A session each, closed after some requests: connections come and go as they do in life.
            async with contextlib.AsyncExitStack() as stack:
                session = await stack.enter_async_context(make_session(self._target))
                for _ in range(16):
                    if time.monotonic() >= until:
                        return
                    if not await self._turn(until):
                        return
                    failed = sum(self.tally.failed.values())
                    await self._one(session, str(self._rng.choice(kinds, p=weights)))
                    if sum(self.tally.failed.values()) > failed:
                        await asyncio.sleep(1.0)

    async def _turn(self, until: float) -> bool:
        """Wait until the next request is due; False if that is after ``until``."""
        if not self._gap_s:
            return True
        due = max(time.monotonic(), self._next_at)
        self._next_at = due + self._gap_s
        await asyncio.sleep(max(0.0, min(due, until) - time.monotonic()))
        return due < until

    async def _one(self, session: object, kind: str) -> None:
        target, request = self._request(kind)
        record = RequestRecord(request.index, time.monotonic_ns())
        self.tally.sent[kind] += 1
        sending = send(session, target, request.encode(target), record)  # type: ignore[arg-type]
        if kind == "hang-up":
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(sending, float(self._rng.uniform(0.01, 0.5)))
        else:
            await sending
        self._count(kind, record)

    def _count(self, kind: str, record: RequestRecord) -> None:
        tally = self.tally
        if kind == "refused":
            if record.failure is FailureKind.HTTP and record.http_status == 400:
                tally.completed[kind] += 1
            else:
                tally.fail(kind, f"expected status 400, got {record.http_status} {record.detail}")
        elif record.outcome is Outcome.COMPLETED:
            tally.completed[kind] += 1
            tally.output_tokens += record.output_tokens or 0
        elif kind == "hang-up" and record.outcome is Outcome.CANCELLED:
            tally.hung_up += 1
        else:
            tally.fail(kind, record.detail or str(record.outcome))

    def _request(self, kind: str) -> tuple[Target, Request]:
        self._sent += 1
        low, high = self._shape.prompt
        ids = self._ids(int(self._rng.integers(low, high + 1)))
        output = int(self._rng.integers(self._shape.output[0], self._shape.output[1] + 1))
        target = self._target
        if kind == "chat":
            text = text_of_length(ids, self._tokenizer)
            target = replace(target, endpoint="chat", stream=bool(self._rng.integers(2)))
            return target, Request(self._sent, text, output)
        if kind == "whole":
            text = text_of_length(ids, self._tokenizer)
            return replace(target, stream=False), Request(self._sent, text, output)
        if kind == "prefix":
            ids = self._prefixes[int(self._rng.integers(_PREFIXES))] + ids
        elif kind == "long":
            ids = self._ids(self._shape.long_len)
        elif kind == "refused":
            ids = self._ids(self._shape.max_len + 1)
        elif kind == "hang-up":
            output = self._shape.max_len - len(ids) - 1
        return target, Request(self._sent, ids, output, ignore_eos=True)

    def _ids(self, length: int) -> list[int]:
        picked: Sequence[int] = self._pool[self._rng.integers(0, len(self._pool), size=length)].tolist()
        return list(picked)
