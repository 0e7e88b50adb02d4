"""Server-sent events, as far as the OpenAI streaming API uses them (WHATWG HTML, section 9.2)."""


class SseDecoder:
    r"""Splits a byte stream into the payloads of its ``data:`` fields.

    Events may be cut anywhere by the network; comments, other fields and ``\r\n`` line ends are
    accepted. Only bytes are handled here: whether a payload is JSON is the caller's business.
    """

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Add received bytes; returns the payloads of the events they complete, in order."""
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        # A "\r\n" cut between two reads leaves its "\r" at the end of the buffer.
        if self._buffer.endswith(b"\r") and data.startswith(b"\n"):
            self._buffer = self._buffer[:-1]
        buffer = self._buffer + data if self._buffer else data
        *events, self._buffer = buffer.split(b"\n\n")
        payloads = (_payload(event) for event in events)
        return [payload for payload in payloads if payload is not None]

    @property
    def pending(self) -> bool:
        """Whether an incomplete event is left over."""
        return bool(self._buffer.strip())


def _payload(event: bytes) -> bytes | None:
    """The joined ``data`` lines of one event, None when it has none (a comment, a keep-alive)."""
    if event.startswith(b"data: ") and b"\n" not in event:
        return event[6:]
    lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None
