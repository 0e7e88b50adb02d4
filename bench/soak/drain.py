"""SIGTERM with streams in flight: every one must come to its proper end, then the server must go."""

import asyncio
import time
from typing import Any

from bench.client import Request, Target, make_session, send
from bench.records import Outcome, RequestRecord
from bench.server import Server
from vllm_sparse.errors import UserError

_START_S = 120.0


async def drain(server: Server, target: Target, requests: list[Request], timeout_s: float) -> dict[str, Any]:
    """Start ``requests``, terminate the server once all of them stream, and see what becomes of them.

    Args:
        server: runs with a ``--shutdown-timeout`` of at least ``timeout_s``.
        target: streaming completions.
        requests: long enough to be in flight when the signal comes.
        timeout_s: how long all of it may take.
    """
    records = [RequestRecord(request.index, time.monotonic_ns()) for request in requests]
    async with make_session(target) as session:
        tasks = [
            asyncio.create_task(send(session, target, request.encode(target), record))
            for request, record in zip(requests, records, strict=True)
        ]
        await _all_streaming(records)
        in_flight = sum(not task.done() for task in tasks)
        signalled = time.monotonic()
        exit_code = await asyncio.to_thread(server.terminate, timeout_s)
        seconds = time.monotonic() - signalled
        await asyncio.wait(tasks, timeout=5.0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    completed = [r for r in records if r.outcome is Outcome.COMPLETED]
    whole = sum(r.output_tokens == q.output_len for r, q in zip(records, requests, strict=True))
    failures = sorted({r.detail or str(r.outcome) for r in records if r.outcome is not Outcome.COMPLETED})
    return {
        "ok": in_flight > 0 and whole == len(requests) and exit_code == 0,
        "in_flight": in_flight,
        "completed": len(completed),
        "with_all_tokens": whole,
        "failures": failures,
        "exit_code": exit_code,
        "seconds": round(seconds, 2),
    }


async def _all_streaming(records: list[RequestRecord]) -> None:
    deadline = time.monotonic() + _START_S
    while any(record.first_token_ns is None for record in records):
        failed = [record.detail for record in records if record.outcome is Outcome.FAILED]
        if failed:
            raise UserError(f"a request failed before the server was asked to stop: {failed[0]}")
        if time.monotonic() > deadline:
            raise UserError(f"not every stream had begun after {_START_S:.0f} s; send fewer at a time.")
        await asyncio.sleep(0.01)
