"""Sends a plan's requests when they are due and collects the records; runs in one event loop.

Several engines can share one plan in several processes (:mod:`bench.workers`): they draw request numbers
from the same counter and report progress into the same array, and nothing else passes between them.
"""

import asyncio
import contextlib
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace

import aiohttp

from bench.client import Target, make_session, send
from bench.records import Outcome, RequestRecord

LAG_PROBE_INTERVAL_S = 0.01
NANOSECONDS = 1_000_000_000
# Idle connections are dropped after 4 s, so opening them must not take longer than that.
_CONNECT_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What one engine does.

    Attributes:
        target: Where requests go.
        bodies: Encoded request bodies by request index.
        offsets_ns: Due times after the start by request index; None for a closed loop.
        concurrency: Requests in flight at most; None for no limit (open loop only).
        max_seconds: Stop sending, and cancel what is in flight, after that long.
    """

    target: Target
    bodies: Sequence[bytes]
    offsets_ns: Sequence[int] | None = None
    concurrency: int | None = None
    max_seconds: float | None = None


@dataclass(slots=True)
class Progress:
    """Running counts for the display."""

    sent: int = 0
    completed: int = 0
    failed: int = 0
    output_tokens: int = 0

    @property
    def in_flight(self) -> int:
        """Requests sent and not yet answered."""
        return self.sent - self.completed - self.failed


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
        next_index: Draws the next request number in a closed loop; shared between processes.
        indices: The requests that are this engine's in an open loop; None for all.
        on_progress: Called after every change of the counts.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        next_index: Callable[[], int] | None = None,
        indices: Sequence[int] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self._plan = plan
        self._next_index = next_index or itertools.count().__next__
        self._indices = range(len(plan.bodies)) if indices is None else indices
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
        result.end_ns = time.monotonic_ns()
        return result

    async def _connect(self, session: aiohttp.ClientSession) -> None:
        """Open one connection per user beforehand: users keep theirs from request to request.

        An open loop without a cap has no users; its connections are opened as requests need them.
        """
        users = min(self._plan.concurrency or 0, len(self._plan.bodies))

        async def touch() -> None:
            # Whether anybody serves this page does not matter; trouble shows in the requests themselves.
            with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
                async with session.get(self._plan.target.base_url + "/health") as response:
                    await response.read()

        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*(touch() for _ in range(users))), _CONNECT_SECONDS)

    async def _drive(self, session: aiohttp.ClientSession) -> None:
        if self._plan.offsets_ns is None:
            slots = min(self._plan.concurrency or 1, len(self._plan.bodies))
            await asyncio.gather(*(self._closed_slot(session) for _ in range(slots)))
        else:
            await self._open_loop(session, self._plan.offsets_ns)

    async def _closed_slot(self, session: aiohttp.ClientSession) -> None:
        """One simulated user: the next request as soon as the last one is answered."""
        await _sleep_until(self._result.start_ns)
        while (index := self._next_index()) < len(self._plan.bodies):
            await self._one(session, RequestRecord(index, scheduled_ns=time.monotonic_ns()))

    async def _open_loop(self, session: aiohttp.ClientSession, offsets_ns: Sequence[int]) -> None:
        limit = self._plan.concurrency
        gate = asyncio.Semaphore(limit) if limit else None
        for index in self._indices:
            due = self._result.start_ns + offsets_ns[index]
            if due > time.monotonic_ns():
                await _sleep_until(due)
            record = RequestRecord(index, scheduled_ns=due)
            task = asyncio.create_task(self._gated(session, record, gate))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        while self._tasks:
            await asyncio.wait(tuple(self._tasks))

    async def _gated(
        self, session: aiohttp.ClientSession, record: RequestRecord, gate: asyncio.Semaphore | None
    ) -> None:
        if gate is None:
            await self._one(session, record)
            return
        async with gate:
            await self._one(session, record)

    async def _one(self, session: aiohttp.ClientSession, record: RequestRecord) -> None:
        self._result.records.append(record)
        self._count(sent=1)
        await send(session, self._plan.target, self._plan.bodies[record.index], record)
        completed = record.outcome is Outcome.COMPLETED
        self._count(
            completed=int(completed), failed=int(not completed), output_tokens=record.output_tokens or 0
        )

    def _count(self, *, sent: int = 0, completed: int = 0, failed: int = 0, output_tokens: int = 0) -> None:
        progress = self.progress
        progress.sent += sent
        progress.completed += completed
        progress.failed += failed
        progress.output_tokens += output_tokens
        if self._on_progress is not None:
            self._on_progress(replace(progress))

    async def _probe_lag(self) -> None:
        """How much later than asked the event loop wakes up: time that every timestamp may be off by."""
        while True:
            before = time.monotonic_ns()
            await asyncio.sleep(LAG_PROBE_INTERVAL_S)
            late = time.monotonic_ns() - before - int(LAG_PROBE_INTERVAL_S * NANOSECONDS)
            self._result.loop_lag_ns.append(max(0, late))


async def _sleep_until(moment_ns: int) -> None:
    remaining = moment_ns - time.monotonic_ns()
    if remaining > 0:
        await asyncio.sleep(remaining / NANOSECONDS)
