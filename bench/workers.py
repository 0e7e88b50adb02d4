"""Runs a plan in this process, or in several when one event loop could not keep up."""

import asyncio
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import Synchronized, SynchronizedArray
from typing import Any

from bench.engine import Engine, EngineResult, Plan
from bench.records import NANOSECONDS
from bench.tally import SIZE, Progress

STREAMS_PER_WORKER = 256
"""Streams one event loop serves with timestamps good to a millisecond (measured; docs/benchmarking.md)."""
RATE_PER_WORKER = 150.0
_START_DELAY_S = 0.2
_POLL_S = 0.1

ProgressCallback = Callable[[Progress], None]


class WorkerError(RuntimeError):
    """A client process died; its records are lost, so the run has no result."""


@dataclass(slots=True)
class LoadResult:
    """Everything the engines recorded, merged; ``interrupted`` after Ctrl-C, SIGTERM or ``until``."""

    result: EngineResult
    workers: int
    interrupted: bool = False


def choose_workers(plan: Plan, rate: float | None) -> int:
    """Client processes that keep one event loop below its limit, at most one per core."""
    streams = plan.concurrency or 0
    if plan.offsets_ns is not None and plan.concurrency is None:
        streams = plan.size if rate is None else 0
    wanted = max(1, -(-streams // STREAMS_PER_WORKER))
    if rate is not None:
        wanted = max(wanted, -(-int(rate) // int(RATE_PER_WORKER)))
    return min(wanted, os.cpu_count() or 1, plan.size)


def execute(
    plan: Plan,
    *,
    workers: int = 1,
    on_progress: ProgressCallback | None = None,
    apart: bool = False,
    until: threading.Event | None = None,
) -> LoadResult:
    """Run the plan and wait for it; SIGINT and SIGTERM end it early with what there is.

    Args:
        plan: What to send.
        workers: Client processes, at most one per user; 1 stays in this one.
        on_progress: Called with totals now and then, from this process.
        apart: Use a process of its own even for one worker, because this one has other work.
        until: Ends the run early, as a signal would, once another thread has set it.
    """
    # Every process has at least one user, so more of them would be more users than asked for.
    workers = min(workers, plan.concurrency or workers, plan.size)
    if workers <= 1 and not apart:
        return asyncio.run(_execute_here(plan, on_progress, until))
    return _Pool(plan, max(1, workers), on_progress, until).run()


async def _execute_here(
    plan: Plan, on_progress: ProgressCallback | None, until: threading.Event | None
) -> LoadResult:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    # asyncio would put back the defaults, not the handlers that were there.
    previous = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        before = signal.getsignal(number)
        try:
            loop.add_signal_handler(number, stop.set)
        except (ValueError, RuntimeError, NotImplementedError):
            continue  # not the main thread: whoever owns it handles signals
        previous[number] = before
    follower = None if until is None else asyncio.create_task(_follow(until, stop))
    try:
        result = await Engine(plan, on_progress=on_progress).run(stop=stop)
    finally:
        if follower is not None:
            follower.cancel()
        for number in previous:
            loop.remove_signal_handler(number)
        _set_handlers(previous)
    return LoadResult(result, workers=1, interrupted=stop.is_set())


async def _follow(until: threading.Event, stop: asyncio.Event) -> None:
    while not until.is_set():
        await asyncio.sleep(_POLL_S)
    stop.set()


class _Pool:
    """Client processes that share a counter and a progress array."""

    def __init__(
        self,
        plan: Plan,
        workers: int,
        on_progress: ProgressCallback | None,
        until: threading.Event | None,
    ) -> None:
        # Spawned, not forked: the caller may hold threads (a display, torch).
        context = multiprocessing.get_context("spawn")
        self._plan = plan
        self._on_progress = on_progress
        self._until = until or threading.Event()
        self._next: Synchronized[int] = context.Value("q", 0)
        self._start: Synchronized[int] = context.Value("q", 0)
        self._counts: SynchronizedArray[int] = context.Array("q", workers * SIZE, lock=False)  # type: ignore[assignment]
        self._connections: list[Connection] = []
        self._far_ends: list[Connection] = []
        self._processes: list[BaseProcess] = []
        for rank in range(workers):
            ours, theirs = context.Pipe()
            share = _share(plan, rank, workers)
            arguments = (rank, workers, share, self._next, self._start, self._counts, theirs)
            self._processes.append(context.Process(target=_worker_main, args=arguments, daemon=True))
            self._connections.append(ours)
            self._far_ends.append(theirs)

    def run(self) -> LoadResult:
        interrupted = False
        previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        stopping = False

        def ask_to_stop(*_: object) -> None:
            nonlocal stopping
            stopping = True

        on_main_thread = _set_handlers(dict.fromkeys(previous, ask_to_stop))
        try:
            for process, far_end in zip(self._processes, self._far_ends, strict=True):
                process.start()
                far_end.close()  # or a worker's death would not end the connection
            for connection in self._connections:
                self._receive(connection)  # ready
            self._start.value = time.monotonic_ns() + int(_START_DELAY_S * NANOSECONDS)
            while not all(connection.poll(_POLL_S) for connection in self._connections):
                self._report()
                self._check_alive()
                if (stopping or self._until.is_set()) and not interrupted:
                    interrupted = True
                    for process in self._processes:
                        process.terminate()  # the worker's handler ends its run and sends what it has
            results = [self._receive(connection) for connection in self._connections]
        finally:
            for process in self._processes:
                if process.pid is not None:
                    process.join(timeout=5)
                if process.is_alive():
                    process.kill()
            if on_main_thread:
                _set_handlers(previous)
        self._report()
        return LoadResult(_merge(results), workers=len(self._processes), interrupted=interrupted)

    def _receive(self, connection: Connection) -> Any:
        try:
            return connection.recv()
        except EOFError as error:
            raise WorkerError(
                "a client process died before it could hand over its records; its message is above. Programs "
                "that call this must start under `if __name__ == '__main__':`, or use workers=1."
            ) from error

    def _check_alive(self) -> None:
        for process, connection in zip(self._processes, self._connections, strict=True):
            if not process.is_alive() and not connection.poll():
                raise WorkerError(f"client process {process.pid} died with exit code {process.exitcode}")

    def _report(self) -> None:
        if self._on_progress is not None:
            parts = [self._counts[begin : begin + SIZE] for begin in range(0, len(self._counts), SIZE)]
            self._on_progress(Progress.sum_of(parts))


def _set_handlers(handlers: dict[signal.Signals, Any]) -> bool:
    try:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    except ValueError:  # not the main thread
        return False
    return True


def _share(plan: Plan, rank: int, workers: int) -> Plan:
    """The plan of one worker: its part of the concurrency; bodies stay complete, they are drawn by index."""
    if plan.concurrency is None:
        return plan
    base, extra = divmod(plan.concurrency, workers)
    return replace(plan, concurrency=base + (rank < extra))


def _worker_main(
    rank: int,
    workers: int,
    plan: Plan,
    counter: "Synchronized[int]",
    start: "Synchronized[int]",
    counts: "SynchronizedArray[int]",
    connection: Connection,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides

    def draw() -> int:
        with counter.get_lock():
            index = int(counter.value)
            counter.value = index + 1
        return index

    def publish(progress: Progress) -> None:
        counts[rank * SIZE : (rank + 1) * SIZE] = progress.values.tolist()

    async def main() -> EngineResult:
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        numbers = range(rank, plan.size, workers)
        engine = Engine(plan, next_number=draw, numbers=numbers, on_progress=publish)

        async def begin() -> int:
            connection.send("ready")
            while not start.value:
                await asyncio.sleep(0.002)
            return int(start.value)

        return await engine.run(begin, stop)

    connection.send(asyncio.run(main()))
    connection.close()


def _merge(results: list[EngineResult]) -> EngineResult:
    return EngineResult(
        records=[record for result in results for record in result.records],
        loop_lag_ns=[lag for result in results for lag in result.loop_lag_ns],
        start_ns=min(result.start_ns for result in results),
        end_ns=max(result.end_ns for result in results),
    )
