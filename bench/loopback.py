"""A scripted OpenAI-compatible server: known delays and known faults, for checking the client itself.

It generates nothing; it sends tokens at scripted times and notes when it really did. ``GET /truth`` returns
those notes on the same monotonic clock that the client uses, so that the client's figures can be compared
with what happened. Run in a process of its own: ``with LoopbackServer(Script(ttft_ms=20)) as server: ...``
"""

import asyncio
import gc
import itertools
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any

import orjson
from aiohttp import web

from bench.direct import open_url

FAULTS = ("status_429", "status_500", "truncated", "malformed", "slow_loris", "error_event", "die", "not_sse")
MODEL = "loopback"


@dataclass(frozen=True, slots=True)
class Script:
    """What the server does.

    Attributes:
        ttft_ms: Delay of the first token.
        gap_ms: Delay between tokens.
        jitter: Delays vary deterministically within ±that share.
        tokens_per_chunk: Tokens that come together in one event.
        stall_at_s: After that time from the first request on, nothing is sent ...
        stall_for_s: ... for so long.
        faults: Fault by request number, counted from 0 in order of arrival, warm-ups included.
        fault_every: Applies ``fault`` to every n-th request instead (0: none).
        fault: See ``fault_every``.
        openai_only: Refuse vLLM's own fields, as stricter servers do.
        logprob_shift: Added to every second prompt log-probability (``prompt_logprobs``).
        keep_prompts: Note whole prompts, too.
        max_model_len: Context length that is told, and beyond which requests are refused.
    """

    ttft_ms: float = 20.0
    gap_ms: float = 5.0
    jitter: float = 0.0
    tokens_per_chunk: int = 1
    stall_at_s: float | None = None
    stall_for_s: float = 0.0
    faults: dict[int, str] = field(default_factory=dict)
    fault_every: int = 0
    fault: str = "status_500"
    openai_only: bool = False
    logprob_shift: float = 0.0
    keep_prompts: bool = False
    max_model_len: int | None = None

    def fault_of(self, number: int) -> str | None:
        """The fault of the given request."""
        if self.fault_every and number % self.fault_every == self.fault_every - 1:
            return self.fault
        return self.faults.get(number)

    def delay_s(self, number: int, token: int) -> float:
        """Scripted delay before the given token of the given request."""
        base = self.ttft_ms if token == 0 else self.gap_ms
        # A fixed low-discrepancy sequence: spread evenly, the same in every run.
        phase = (number * 0.6180339887 + token * 0.7548776662) % 1.0
        return base * (1 + self.jitter * (2 * phase - 1)) / 1000


@dataclass(slots=True)
class _Call:
    """What one request asks for."""

    chat: bool
    stream: bool
    max_tokens: int
    prompt_tokens: int
    usage: bool
    continuous: bool
    key: str

    @classmethod
    def read(cls, body: dict[str, Any], chat: bool) -> "_Call":
        options = body.get("stream_options") or {}
        prompt = body.get("messages") if chat else body.get("prompt")
        length = len(prompt) if isinstance(prompt, list) and not chat else len(str(prompt).split())
        return cls(
            chat=chat,
            stream=bool(body.get("stream")),
            max_tokens=int(body.get("max_tokens", 16)),
            prompt_tokens=length,
            usage=bool(options.get("include_usage")),
            continuous=bool(options.get("continuous_usage_stats")),
            key=prompt_key(prompt),
        )

    def usage_at(self, tokens: int) -> dict[str, int]:
        total = self.prompt_tokens + tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": tokens, "total_tokens": total}

    def event(self, tokens: int, text: str, finish: str | None) -> bytes:
        delta = {"delta": {"content": text}} if self.chat else {"text": text}
        event: dict[str, Any] = {"id": "x", "choices": [{"index": 0, **delta, "finish_reason": finish}]}
        if self.continuous:
            event["usage"] = self.usage_at(tokens)
        return b"data: " + orjson.dumps(event) + b"\n\n"


def prompt_key(prompt: object) -> str:
    """The start of a prompt as text: enough to tell random prompts apart."""
    return orjson.dumps(prompt[:12] if isinstance(prompt, str | list) else prompt).decode()


def scripted_logprobs(ids: list[int], shift: float = 0.0) -> list[dict[str, dict[str, Any]] | None]:
    """Made-up prompt log-probabilities in vLLM's form: the prompt's token, and a better one for odd ones."""
    rows: list[dict[str, dict[str, Any]] | None] = [None]
    for position, (before, token) in enumerate(itertools.pairwise(ids), start=1):
        logprob = -0.5 - (31 * before + 17 * token) % 97 / 20 + (shift if position % 2 else 0.0)
        odd = token % 2 == 1
        row = {str(token): {"logprob": logprob, "rank": 5 if odd else 1, "decoded_token": "x"}}
        if odd:
            row[str(token + 1)] = {"logprob": -0.1, "rank": 1, "decoded_token": "y"}
        rows.append(row)
    return rows


class _App:
    """Request handlers and the notes of what was sent when."""

    def __init__(self, script: Script, model: str) -> None:
        self._script = script
        self._model = model
        self._count = 0
        self._first_ns: int | None = None
        self.truth: list[dict[str, Any]] = []

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/completions", self._completions),
            web.post("/v1/chat/completions", self._chat),
            web.get("/v1/models", self._models),
            web.get("/truth", self._truth),
            web.get("/metrics", self._metrics),
            web.get("/health", self._health),
        ]

    async def _models(self, _: web.Request) -> web.Response:
        card: dict[str, Any] = {"id": self._model, "object": "model"}
        if self._script.max_model_len is not None:
            card["max_model_len"] = self._script.max_model_len
        return web.json_response({"object": "list", "data": [card]})

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _truth(self, _: web.Request) -> web.Response:
        return web.json_response(self.truth)

    async def _metrics(self, _: web.Request) -> web.Response:
        """The few lines of vLLM's page that a client reads."""
        begun = [note for note in self.truth if note["sent_ns"]]
        waited = sum(note["sent_ns"][0] - note["received_ns"] for note in begun) / 1e9
        lines = {
            "num_requests_running": sum(not note["done"] for note in self.truth),
            "prompt_tokens_total": sum(note["prompt_tokens"] for note in self.truth),
            "generation_tokens_total": self._script.tokens_per_chunk
            * sum(len(n["sent_ns"]) for n in self.truth),
            "time_to_first_token_seconds_sum": waited,
            "time_to_first_token_seconds_count": len(begun),
        }
        text = "".join(f'vllm:{name}{{engine="0"}} {value}\n' for name, value in lines.items())
        return web.Response(text="# HELP scripted\n" + text)

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, chat=False)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, chat=True)

    async def _answer(self, request: web.Request, *, chat: bool) -> web.StreamResponse:
        received = time.monotonic_ns()
        if self._first_ns is None:
            self._first_ns = received
        number = self._count
        self._count += 1
        body = orjson.loads(await request.read())
        if body.get("model") != self._model:
            return _error(404, f"The model `{body.get('model')}` does not exist.")
        call = _Call.read(body, chat)
        if self._script.openai_only and (call.continuous or "ignore_eos" in body):
            return _error(400, "Unrecognized request argument supplied: continuous_usage_stats")
        limit = self._script.max_model_len
        if limit is not None and call.prompt_tokens + call.max_tokens > limit:
            return _error(400, f"This model's maximum context length is {limit} tokens.")
        fault = self._script.fault_of(number)
        if fault is not None and fault.startswith("status_"):
            return _error(int(fault.removeprefix("status_")), f"scripted {fault}")
        note: dict[str, Any] = {"number": number, "key": call.key, "received_ns": received, "sent_ns": []}
        note |= {"prompt_tokens": call.prompt_tokens, "done": False}
        if self._script.keep_prompts:
            note["prompt"] = body.get("messages") if chat else body.get("prompt")
        self.truth.append(note)
        try:
            return await self._generate(request, body, call, note, fault)
        finally:
            note["done"] = True

    async def _generate(
        self, request: web.Request, body: dict[str, Any], call: _Call, note: dict[str, Any], fault: str | None
    ) -> web.StreamResponse:
        if not call.stream:
            async for _ in self._tokens(note["number"], call, note["received_ns"]):
                note["sent_ns"].append(time.monotonic_ns())
            text = {"message": {"role": "assistant", "content": "x"}} if call.chat else {"text": "x"}
            choice: dict[str, Any] = {"index": 0, **text, "finish_reason": "length"}
            if body.get("prompt_logprobs"):
                choice["prompt_logprobs"] = scripted_logprobs(body["prompt"], self._script.logprob_shift)
            return web.json_response({"choices": [choice], "usage": call.usage_at(call.max_tokens)})
        return await self._stream(request, note["number"], call, note, fault)

    async def _tokens(self, number: int, call: _Call, received: int) -> AsyncIterator[int]:
        """Yields the running token count when the next chunk is due."""
        step = self._script.tokens_per_chunk
        due = received / 1e9
        for first in range(0, call.max_tokens, step):
            due += self._script.delay_s(number, first)
            await self._sleep_until(due)
            yield min(first + step, call.max_tokens)

    async def _sleep_until(self, due: float) -> None:
        stall = self._script.stall_at_s
        if stall is not None and self._first_ns is not None:
            begin = self._first_ns / 1e9 + stall
            if begin <= due < begin + self._script.stall_for_s:
                due = begin + self._script.stall_for_s
        remaining = due - time.monotonic()
        if remaining > 0:
            await asyncio.sleep(remaining)

    async def _stream(
        self, request: web.Request, number: int, call: _Call, note: dict[str, Any], fault: str | None
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if fault == "slow_loris":
            while True:  # one comment byte now and then, never an event; ends with the connection
                await response.write(b":")
                await asyncio.sleep(0.05)
        async for tokens in self._tokens(number, call, note["received_ns"]):
            last = tokens == call.max_tokens
            note["sent_ns"].append(time.monotonic_ns())
            await response.write(call.event(tokens, " x", "length" if last else None))
            if fault is not None and len(note["sent_ns"]) == 2:
                return await _misbehave(fault, request, response)
        if call.usage:
            final = {"id": "x", "choices": [], "usage": call.usage_at(call.max_tokens)}
            await response.write(b"data: " + orjson.dumps(final) + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response


async def _misbehave(fault: str, request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
    """Spoil a stream that has begun."""
    if fault == "die":
        os._exit(1)  # at once, as a crash would; sys.exit would wait for the thread that reads standard input
    if fault == "truncated" and request.transport is not None:
        request.transport.abort()
    elif fault == "malformed":
        await response.write(b'data: {"choices": [{"text": "cut\n\n')
    elif fault == "error_event":
        await response.write(b'data: {"error": {"message": "scripted error [/INST]", "code": 500}}\n\n')
    elif fault == "not_sse":
        await response.write(b"<html>proxy says no</html>\n\n")
    return response


def _error(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"message": message, "code": status}}, status=status)


def serve(script: Script, port: int = 0, model: str = MODEL) -> None:
    """Serve on the loopback interface until standard input ends; the port is written to standard output."""
    gc.disable()  # a collection would delay what is due meanwhile; the process is short-lived

    async def main() -> None:
        app = web.Application(client_max_size=2**26)
        app.add_routes(_App(script, model).routes())
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", port, backlog=4096)
        await site.start()
        sys.stdout.write(f"{runner.addresses[0][1]}\n")
        sys.stdout.flush()
        # Ends when the parent closes our standard input, even if it was killed.
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        await runner.cleanup()

    asyncio.run(main())


class LoopbackServer:
    """The scripted server in a child process, as a context manager."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self._process: subprocess.Popen[bytes] | None = None
        self.base_url = ""

    def __enter__(self) -> "LoopbackServer":
        command = [sys.executable, "-m", "bench.loopback", orjson.dumps(_script_json(self._script)).decode()]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if self._process.stdout is None:
            raise RuntimeError("the loopback server's output is not piped")
        line = self._process.stdout.readline().strip()
        if not line.isdigit():
            raise RuntimeError("the loopback server did not start")
        self.base_url = f"http://127.0.0.1:{int(line)}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """End the server at once, as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process = None

    def truth(self) -> list[dict[str, Any]]:
        """Of each answered request: ``number``, ``key`` of its prompt, ``received_ns``, ``sent_ns``."""
        with open_url(self.base_url + "/truth", 30) as response:
            return list(orjson.loads(response.read()))


def _script_json(script: Script) -> dict[str, Any]:
    return {**asdict(script), "faults": {str(number): fault for number, fault in script.faults.items()}}


def _main() -> None:
    fields = orjson.loads(sys.argv[1])
    fields["faults"] = {int(number): fault for number, fault in fields["faults"].items()}
    serve(Script(**fields))


if __name__ == "__main__":
    _main()
