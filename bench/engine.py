"""Sends a plan's requests when they are due and collects the records; runs in one event loop.

The unit of scheduling is the conversation; an ordinary request is one of a single turn. Several engines can
share one plan in several processes (:mod:`bench.workers`): they draw conversation numbers from the same
counter and report progress into the same array, and nothing else passes between them.
"""

import asyncio
import contextlib
import gc
import itertools
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field

import aiohttp

from bench.client import Request, Target, make_session, send
from bench.records import NANOSECONDS, Outcome, RequestRecord
from bench.tally import Progress

LAG_PROBE_INTERVAL_S = 0.01
# Idle connections are dropped after 4 s, so opening them must not take longer than that.
_CONNECT_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What one engine does.

    Attributes:
        target: Where requests go.
        bodies: Encoded request bodies by request index; a turn of a conversation is a request that is
            encoded when the answers before it are known.
        conversations: Request indices of each conversation in order; None: every request is one of its own.
        offsets_ns: Due times after the start by conversation; None for a closed loop.
        concurrency: Requests in flight at most; None for no limit (open loop only).
        think_time_s: Time between an answer and the next turn of its conversation.
        max_seconds: Stop sending, and cancel what is in flight, after that long.
    """

    target: Target
    bodies: Sequence[bytes | Request]
    conversations: Sequence[Sequence[int]] | None = None
    offsets_ns: Sequence[int] | None = None
    concurrency: int | None = None
    think_time_s: float = 0.0
    max_seconds: float | None = None

    @property
    def size(self) -> int:
        """Number of conversations."""
        return len(self.bodies if self.conversations is None else self.conversations)

    def turns(self, number: int) -> Sequence[int]:
        """Request indices of a conversation."""
        return (number,) if self.conversations is None else self.conversations[number]


@dataclass(slots=True)
class EngineResult:
    """Records of the requests this engine sent, and how late its event loop woke up."""

    records: list[RequestRecord] = field(default_factory=list)
    loop_lag_ns: list[int] = field(default_factory=list)
    start_ns: int = 0
    end_ns: int = 0


class Engine:
    """Executes a :class:`Plan`.

    Args:
        plan: What to send.
        next_number: Draws the next conversation in a closed loop; shared between processes.
        numbers: The conversations that are this engine's in an open loop; None for all.
        on_progress: Called after every change of the counts.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        next_number: Callable[[], int] | None = None,
        numbers: Sequence[int] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self._plan = plan
        self._next_number = next_number or itertools.count().__next__
        self._numbers = range(plan.size) if numbers is None else numbers
        self._on_progress = on_progress
        self._result = EngineResult()
        self._tasks: set[asyncio.Task[None]] = set()
        self.progress = Progress()

    async def run(
        self, begin: Callable[[], Awaitable[int]] | None = None, stop: asyncio.Event | None = None
    ) -> EngineResult:
        """Run to the end, or until ``stop`` is set; what is in flight then is cancelled and says so.

        Args:
            begin: Called when the connections are open; returns the common start on the monotonic clock.
                Without it the run starts at once.
            stop: Ends the run early.
        """
        result = self._result
        async with make_session(self._plan.target) as session:
            await self._connect(session)
            with _no_full_collections():
                await self._watched(session, begin, stop)
        result.end_ns = time.monotonic_ns()
        return result

    async def _watched(
        self,
        session: aiohttp.ClientSession,
        begin: Callable[[], Awaitable[int]] | None,
        stop: asyncio.Event | None,
    ) -> None:
        """The run itself, until it is done, stopped or out of time."""
        result = self._result
        result.start_ns = time.monotonic_ns() if begin is None else await begin()
        probe = asyncio.create_task(self._probe_lag())
        work = asyncio.create_task(self._drive(session))
        watchers = [asyncio.create_task(stop.wait())] if stop is not None else []
        timeout = None
        if self._plan.max_seconds is not None:
            timeout = self._plan.max_seconds + (result.start_ns - time.monotonic_ns()) / NANOSECONDS
        try:
            await asyncio.wait([work, *watchers], timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leftovers = [task for task in (work, probe, *watchers, *self._tasks) if not task.done()]
            for task in leftovers:
                task.cancel()
            await asyncio.gather(*leftovers, return_exceptions=True)
        if work.done() and not work.cancelled():
            work.result()

    async def _connect(self, session: aiohttp.ClientSession) -> None:
        """Open one connection per user beforehand: users keep theirs from request to request.

        An open loop without a cap has no users; its connections are opened as requests need them.
        """
        users = min(self._plan.concurrency or 0, self._plan.size)

        async def touch() -> None:
            # Whether anybody serves this page does not matter; trouble shows in the requests themselves.
            with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
                async with session.get(self._plan.target.base_url + "/health") as response:
                    await response.read()

        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*(touch() for _ in range(users))), _CONNECT_SECONDS)

    async def _drive(self, session: aiohttp.ClientSession) -> None:
        if self._plan.offsets_ns is None:
            slots = min(self._plan.concurrency or 1, self._plan.size)
            await asyncio.gather(*(self._closed_slot(session) for _ in range(slots)))
        else:
            await self._open_loop(session, self._plan.offsets_ns)

    async def _closed_slot(self, session: aiohttp.ClientSession) -> None:
        """One simulated user: the next conversation as soon as the last one is over."""
        await _sleep_until(self._result.start_ns)
        while (number := self._next_number()) < self._plan.size:
            await self._converse(session, number, time.monotonic_ns())

    async def _open_loop(self, session: aiohttp.ClientSession, offsets_ns: Sequence[int]) -> None:
        limit = self._plan.concurrency
        gate = asyncio.Semaphore(limit) if limit else None
        for number in self._numbers:
            due = self._result.start_ns + offsets_ns[number]
            if due > time.monotonic_ns():
                await _sleep_until(due)
            task = asyncio.create_task(self._converse(session, number, due, gate))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        while self._tasks:
            await asyncio.wait(tuple(self._tasks))

    async def _converse(
        self, session: aiohttp.ClientSession, number: int, due: int, gate: asyncio.Semaphore | None = None
    ) -> None:
        """All turns of a conversation; it ends early when one of them is not answered."""
        history: list[str] = []
        turns = self._plan.turns(number)
        for turn, index in enumerate(turns):
            record = RequestRecord(index, scheduled_ns=due, turn=turn)
            body = self._plan.bodies[index]
            question = ""
            if isinstance(body, Request):
                question, body = str(body.prompt), body.encode(self._plan.target, history)
                record.answer = []
            if gate is None:
                await self._one(session, record, body)
            else:
                async with gate:
                    await self._one(session, record, body)
            if record.answer is not None:
                history += (question, "".join(record.answer))
                record.answer = None
            if record.outcome is not Outcome.COMPLETED:
                return
            if turn + 1 < len(turns):
                due = (record.finished_ns or due) + round(self._plan.think_time_s * NANOSECONDS)
                await _sleep_until(due)

    async def _one(self, session: aiohttp.ClientSession, record: RequestRecord, body: bytes) -> None:
        self._result.records.append(record)
        self.progress.begin()
        self._report()
        await send(session, self._plan.target, body, record)
        self.progress.end(record)
        self._report()

    def _report(self) -> None:
        if self._on_progress is not None:
            self._on_progress(self.progress)

    async def _probe_lag(self) -> None:
        """How much later than asked the event loop wakes up: time that every timestamp may be off by."""
        while True:
            before = time.monotonic_ns()
            await asyncio.sleep(LAG_PROBE_INTERVAL_S)
            late = time.monotonic_ns() - before - int(LAG_PROBE_INTERVAL_S * NANOSECONDS)
            self._result.loop_lag_ns.append(max(0, late))


@contextlib.contextmanager
def _no_full_collections() -> Iterator[None]:
    """Keep the garbage collector from walking everything, which takes tens of ms with thousands of streams.

    Young objects are still collected; those are few at a time.
    """
    usual = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*usual[:2], 1_000_000)
    try:
        yield
    finally:
        gc.set_threshold(*usual)
        gc.unfreeze()


async def _sleep_until(moment_ns: int) -> None:
    remaining = moment_ns - time.monotonic_ns()
    if remaining > 0:
        await asyncio.sleep(remaining / NANOSECONDS)
