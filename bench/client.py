"""One request over the OpenAI API, observed: completions and chat, streaming or not.

Timestamps are taken when the socket is read (:mod:`bench.sockets`), before any parsing; everything else is
computed after the run. Request bodies are encoded beforehand, so sending costs no JSON work.
"""

import asyncio
import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import orjson

from bench.records import UNKNOWN_TOKENS, FailureKind, Outcome, RequestRecord
from bench.sockets import StampedConnector, handler_of
from bench.sse import SseDecoder
from vllm_sparse.errors import UserError

ENDPOINTS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
RETRY_STATUSES = frozenset({429, 502, 503, 504})
_CHAT_TEXT_FIELDS = ("content", "reasoning_content", "reasoning", "tool_calls")


@dataclass(frozen=True, slots=True)
class Target:
    """Where and how requests are sent.

    Attributes:
        base_url: Server root without ``/v1``; see :func:`normalise_base_url`.
        model: Name as the server knows it.
        endpoint: ``completions`` or ``chat``.
        stream: Ask for server-sent events; without it only end-to-end latency can be measured.
        continuous_usage: Ask for a running token count in every chunk, so that gaps are per token.
        timeout_s: Longest time one request may take in all.
        retries: Further attempts after a refused connection or status 429/502/503/504.
        api_key: Sent as a bearer token; kept out of ``repr``, logs and reports.
        extra_body: Fields merged into every request body.
    """

    base_url: str
    model: str
    endpoint: str = "completions"
    stream: bool = True
    continuous_usage: bool = True
    timeout_s: float = 600.0
    retries: int = 0
    api_key: str | None = field(default=None, repr=False)
    extra_body: Mapping[str, Any] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """Full address of the endpoint."""
        return self.base_url + ENDPOINTS[self.endpoint]

    @property
    def headers(self) -> dict[str, str]:
        """Headers of every request."""
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        return headers


def normalise_base_url(url: str) -> str:
    """``http://host:port`` from what people write: with or without scheme, ``/v1``, final slash."""
    text = url.strip()
    scheme, separator, rest = text.partition("://")
    scheme, rest = (scheme.lower(), rest) if separator else ("http", text)
    text = f"{scheme}://" + rest.rstrip("/").removesuffix("/v1").rstrip("/")
    try:
        parts = urlsplit(text)
        usable = bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none, a bracket without its other
        usable = False
    if not usable or scheme not in ("http", "https") or set("?# ") & set(text):
        raise UserError(f"--base-url is {url!r}; expected something like http://127.0.0.1:8000.")
    return text


def check_api_key(key: str | None) -> None:
    """Raise :class:`UserError` for a key that no header can carry, such as one with a line break."""
    if key is not None and not key.isprintable():
        raise UserError("the API key holds a line break or another control character.")


@dataclass(frozen=True, slots=True)
class Request:
    """One request of the workload.

    Attributes:
        index: Position in the workload.
        prompt: Text, token ids, or chat messages; of a later turn only what the user adds.
        output_len: ``max_tokens``.
        ignore_eos: Generate exactly that many.
        turn: Position in its conversation, from 0.
    """

    index: int
    prompt: str | list[int] | list[dict[str, str]]
    output_len: int
    ignore_eos: bool = False
    turn: int = 0

    def encode(self, target: Target, history: Sequence[str] = ()) -> bytes:
        """The JSON body for ``target``.

        Args:
            target: Where it goes.
            history: What was said before, questions and answers in turns. Chat gets it as messages,
                completions as one text with a line for each.
        """
        body: dict[str, Any] = {"model": target.model, "max_tokens": self.output_len, "temperature": 0.0}
        if target.endpoint == "chat":
            roles = itertools.cycle(("user", "assistant"))
            before = [{"role": role, "content": text} for role, text in zip(roles, history, strict=False)]
            is_text = isinstance(self.prompt, str)
            now = [{"role": "user", "content": self.prompt}] if is_text else self.prompt
            body["messages"] = [*before, *now]
        else:
            body["prompt"] = "\n".join((*history, str(self.prompt))) if history else self.prompt
        if target.stream:
            body["stream"] = True
            body["stream_options"] = {"include_usage": True}
            if target.continuous_usage:
                body["stream_options"]["continuous_usage_stats"] = True
        if self.ignore_eos:
            body["ignore_eos"] = True
        return orjson.dumps(body | dict(target.extra_body))


class MalformedError(Exception):
    """The server sent something that is not the protocol."""


def make_session(target: Target, *, lag_free_bytes: int = 2**18) -> aiohttp.ClientSession:
    """A session without a connection limit: queueing in the client would be measured as latency.

    Args:
        target: Where the session is used.
        lag_free_bytes: Read buffer per connection; a small one pauses the socket on long contexts.
    """
    # uvicorn closes idle connections after 5 s; reusing one in that instant would look like a failure.
    return aiohttp.ClientSession(
        connector=StampedConnector(keepalive_timeout=4),
        timeout=aiohttp.ClientTimeout(total=None if math.isinf(target.timeout_s) else target.timeout_s),
        headers=target.headers,
        read_bufsize=lag_free_bytes,
        auto_decompress=True,
        trust_env=False,
        # Cookies would make requests depend on each other.
        cookie_jar=aiohttp.DummyCookieJar(),
    )


async def send(
    session: aiohttp.ClientSession, target: Target, body: bytes, record: RequestRecord
) -> RequestRecord:
    """Send one request and fill in ``record``; only cancellation is raised, errors are recorded."""
    record.dispatched_ns = time.monotonic_ns()
    while True:
        record.attempts += 1
        await _attempt(session, target, body, record)
        if record.attempts > target.retries or not _retryable(record):
            return record
        await asyncio.sleep(min(2.0, 0.1 * 2 ** (record.attempts - 1)))
        record.failure, record.detail, record.first_byte_ns = None, "", None
        if record.answer is not None:
            record.answer.clear()


def _retryable(record: RequestRecord) -> bool:
    if record.failure is FailureKind.CONNECT:
        return True
    return record.failure is FailureKind.HTTP and record.http_status in RETRY_STATUSES


async def _attempt(
    session: aiohttp.ClientSession, target: Target, body: bytes, record: RequestRecord
) -> None:
    try:
        async with session.post(target.url, data=body) as response:
            record.first_byte_ns = handler_of(response).received_ns
            record.http_status = response.status
            if response.status != 200:
                text = (await response.content.read(2048)).decode("utf-8", "replace")
                record.fail(FailureKind.HTTP, f"HTTP {response.status}: {_error_text(text)}")
            elif target.stream:
                await _read_stream(response, target.endpoint, record)
            else:
                await _read_whole(response, record)
    except asyncio.CancelledError:
        record.outcome = Outcome.CANCELLED
        raise
    except TimeoutError:
        record.fail(FailureKind.TIMEOUT, f"no complete answer within {target.timeout_s:g} s")
    except aiohttp.ClientConnectorError as error:
        record.fail(FailureKind.CONNECT, str(error))
    except aiohttp.ClientPayloadError as error:
        record.fail(FailureKind.TRUNCATED, f"connection closed in mid-answer: {error}")
    except (aiohttp.ClientError, ConnectionError, OSError) as error:
        record.fail(FailureKind.DISCONNECTED, f"{type(error).__name__}: {error}")
    except MalformedError as error:
        record.fail(FailureKind.MALFORMED, str(error))
    finally:
        record.finished_ns = time.monotonic_ns()


def _error_text(text: str) -> str:
    """The message inside an OpenAI-style error body, or the body itself."""
    try:
        body = orjson.loads(text)
    except orjson.JSONDecodeError:
        return text
    error = body.get("error", body) if isinstance(body, dict) else body
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


async def _read_stream(response: aiohttp.ClientResponse, endpoint: str, record: RequestRecord) -> None:
    decoder = SseDecoder()
    is_chat = endpoint == "chat"
    done = False
    connection, content = handler_of(response), response.content
    while data := await content.readany():
        now = connection.received_ns
        for payload in decoder.feed(data):
            if payload == b"[DONE]":
                done = True
            elif not done and not _take_event(payload, is_chat, now, record):
                return
    _close_stream(record, done, decoder.pending)


def _take_event(payload: bytes, is_chat: bool, now: int, record: RequestRecord) -> bool:
    """Account for one event; False when the server reported an error in it."""
    try:
        event = orjson.loads(payload)
    except orjson.JSONDecodeError as error:
        raise MalformedError(f"event is not JSON: {payload[:120].decode('utf-8', 'replace')}") from error
    if not isinstance(event, dict):
        raise MalformedError(f"event is a JSON {type(event).__name__}, expected an object")
    if event.get("error"):
        record.fail(FailureKind.SERVER_ERROR, _error_text(payload.decode("utf-8", "replace")))
        return False
    total = _take_usage(event.get("usage"), record)
    choices = event.get("choices")
    if choices:
        _take_choice(choices, is_chat, now, total, record)
    return True


def _take_usage(usage: object, record: RequestRecord) -> int:
    """Note the server's token counts; returns the running output count or -1."""
    if not isinstance(usage, dict):
        return UNKNOWN_TOKENS
    prompt, output = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if isinstance(prompt, int):
        record.prompt_tokens = prompt
    if not isinstance(output, int):
        return UNKNOWN_TOKENS
    record.output_tokens = output
    return output


def _first_choice(choices: object) -> dict[str, Any]:
    """The first of ``choices``, which is not empty."""
    if not isinstance(choices, list) or not isinstance(choices[0], dict):
        raise MalformedError("'choices' is not a list of objects")
    return choices[0]


def _object(choice: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object inside a choice; empty where it is missing or null."""
    found = choice.get(name) or {}
    if not isinstance(found, dict):
        raise MalformedError(f"{name!r} is a JSON {type(found).__name__}, expected an object")
    return found


def _take_answer(text: object, record: RequestRecord) -> None:
    """Keep generated text where a later turn needs it."""
    if record.answer is None:
        return
    if text is not None and not isinstance(text, str):
        raise MalformedError(f"generated text is a JSON {type(text).__name__}, expected a string")
    record.answer.append(text or "")


def _take_choice(choices: object, is_chat: bool, now: int, total: int, record: RequestRecord) -> None:
    choice = _first_choice(choices)
    delta = _object(choice, "delta") if is_chat else {}
    finish = choice.get("finish_reason")
    if finish:
        record.finish_reason = str(finish)
    if total != UNKNOWN_TOKENS:
        tokens = record.chunk_tokens
        before = tokens[-1] if tokens else 0
        carries_token = total > max(before, 0)
    elif is_chat:
        carries_token = any(delta.get(name) for name in _CHAT_TEXT_FIELDS)
    else:
        # A token that is half a UTF-8 character comes as empty text; a closing chunk does too.
        carries_token = bool(choice.get("text")) or not finish
    _take_answer(delta.get("content") if is_chat else choice.get("text"), record)
    if carries_token:
        record.token_seen(now, total)


def _close_stream(record: RequestRecord, done: bool, pending: bool) -> None:
    if not done and record.finish_reason is None:
        detail = "stream ended without a finish reason and without [DONE]"
        if record.first_token_ns is None and not pending:
            record.fail(FailureKind.MALFORMED, detail + "; it held no usable event")
        else:
            record.fail(FailureKind.TRUNCATED, f"{detail}, after {len(record.chunk_ns)} chunks")
        return
    if record.first_token_ns is None:
        record.fail(FailureKind.MALFORMED, "stream ended properly but carried no token")
        return
    if record.output_tokens is None:
        record.output_tokens = len(record.chunk_ns)
        record.output_tokens_counted = False
    record.outcome = Outcome.COMPLETED


async def _read_whole(response: aiohttp.ClientResponse, record: RequestRecord) -> None:
    connection = handler_of(response)
    data = await response.read()
    now = connection.received_ns
    try:
        body = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise MalformedError(f"answer is not JSON: {data[:120].decode('utf-8', 'replace')}") from error
    if not isinstance(body, dict) or not isinstance(body.get("choices"), list) or not body["choices"]:
        raise MalformedError("answer has no 'choices'")
    _take_usage(body.get("usage"), record)
    if record.output_tokens is None:
        raise MalformedError("answer has no 'usage', so its tokens cannot be counted")
    choice = _first_choice(body["choices"])
    record.finish_reason = choice.get("finish_reason")
    _take_answer(choice.get("text") or _object(choice, "message").get("content"), record)
    record.last_token_ns = now
    record.outcome = Outcome.COMPLETED
