"""aiohttp connections that note when their socket was read.

A task that waits for data runs one pass of the event loop after the read, behind the reads of all other
connections; with hundreds of streams that is up to milliseconds. The note is taken before any of it.
"""

import asyncio
import functools
import time

import aiohttp
from aiohttp.client_proto import ResponseHandler


class StampedHandler(ResponseHandler):
    """aiohttp's protocol, with the time of the last read.

    Attributes:
        received_ns: :func:`time.monotonic_ns` when the socket was last read.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self.received_ns = 0

    def data_received(self, data: bytes) -> None:
        """Note the time, then parse."""
        self.received_ns = time.monotonic_ns()
        super().data_received(data)


class StampedConnector(aiohttp.TCPConnector):
    """A connector whose connections are :class:`StampedHandler`."""

    def __init__(self, *, keepalive_timeout: float) -> None:
        # No limit: queueing in the client would be measured as latency.
        super().__init__(limit=0, limit_per_host=0, keepalive_timeout=keepalive_timeout, ttl_dns_cache=300)
        self._factory = functools.partial(StampedHandler, loop=self._loop)  # type: ignore[assignment]


def handler_of(response: aiohttp.ClientResponse) -> StampedHandler:
    """The connection that ``response`` comes from, also when it was read to its end already."""
    handler = response._protocol
    if not isinstance(handler, StampedHandler):
        raise TypeError(f"a session of StampedConnector is needed; this response came by {type(handler)}")
    return handler
