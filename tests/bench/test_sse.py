import pytest

from bench.sse import SseDecoder

STREAM = b': hello\n\ndata: {"a": 1}\n\nevent: x\ndata: line one\ndata: line two\n\ndata:[DONE]\n\n'
PAYLOADS = [b'{"a": 1}', b"line one\nline two", b"[DONE]"]


@pytest.mark.parametrize("size", [1, 2, 3, 7, len(STREAM)])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_cuts_and_line_ends_do_not_matter(size: int, newline: bytes) -> None:
    stream = STREAM.replace(b"\n", newline)
    decoder = SseDecoder()
    found = []
    for start in range(0, len(stream), size):
        found += decoder.feed(stream[start : start + size])
    assert found == PAYLOADS
    assert not decoder.pending


def test_unfinished_event_is_pending() -> None:
    decoder = SseDecoder()
    assert decoder.feed(b"data: one\n\ndata: tw") == [b"one"]
    assert decoder.pending
