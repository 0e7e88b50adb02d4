"""Questions asked of a server before a run: is it there, what does it serve, how was it started."""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from bench.client import Target
from vllm_sparse.errors import UserError


class UnreachableError(UserError):
    """Nothing answers at the address given."""


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What the server says about itself.

    Attributes:
        models: Names it serves; empty when it does not list them.
        roots: For each name the model path it was started with, where told (vLLM tells).
        max_model_len: Context length of the first model, where told.
        version: Answer of ``/version``, where there is one.
    """

    models: list[str]
    roots: dict[str, str]
    max_model_len: int | None
    version: str | None

    def local_directory(self, model: str) -> Path | None:
        """The served model's directory, if it is on this machine."""
        root = self.roots.get(model)
        path = Path(root) if root else None
        return path if path is not None and (path / "config.json").is_file() else None


async def ask_server(base_url: str, headers: dict[str, str], timeout_s: float = 10.0) -> ServerFacts:
    """Ask ``/v1/models`` and ``/version``.

    Raises:
        UnreachableError: No HTTP server answers. A server that answers with an error status is there,
            and what it does with requests is for the run to report.
    """
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    async with aiohttp.ClientSession(timeout=timeout, headers=headers, trust_env=False) as session:
        try:
            listing = await _get_json(session, base_url + "/v1/models")
            version = await _get_json(session, base_url + "/version")
        except (aiohttp.ClientConnectionError, TimeoutError) as error:
            cause = error.os_error.strerror if isinstance(error, aiohttp.ClientConnectorError) else str(error)
            reason = cause or f"no answer within {timeout_s:g} s"
            raise UnreachableError(
                f"no server at {base_url} ({reason}). Start one, for example `vllm serve DIR`, "
                "or correct the URL."
            ) from error
    entries = listing.get("data")
    cards = [card for card in entries if isinstance(card, dict)] if isinstance(entries, list) else []
    lengths = [card["max_model_len"] for card in cards if isinstance(card.get("max_model_len"), int)]
    return ServerFacts(
        models=[str(card["id"]) for card in cards if "id" in card],
        roots={str(card["id"]): str(card["root"]) for card in cards if card.get("root")},
        max_model_len=lengths[0] if lengths else None,
        version=str(version["version"]) if "version" in version else None,
    )


def ask(base_url: str, api_key: str | None) -> ServerFacts:
    """:func:`ask_server` where nothing else runs meanwhile, with its errors."""
    return asyncio.run(ask_server(base_url, target_headers(Target(base_url, "", api_key=api_key))))


async def _get_json(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    """The JSON object at ``url``; empty when the server has none there."""
    async with session.get(url) as response:
        if response.status != 200:
            return {}
        try:
            body = await response.json(content_type=None)
        except ValueError:
            return {}
    return body if isinstance(body, dict) else {}


def choose_model(facts: ServerFacts, asked: str | None) -> str:
    """The model to ask for: the one named, else the first served.

    A name the server does not list is kept: the run then reports what the server answers to it.
    """
    if asked:
        return asked
    if facts.models:
        return facts.models[0]
    raise UserError("the server does not list its models; name one with --model.")


def refusal(facts: ServerFacts, asked: str) -> str | None:
    """A warning when the server does not list ``asked``."""
    if not facts.models or asked in facts.models:
        return None
    return f"the server does not list a model {asked!r}; it serves {', '.join(facts.models)}."


def target_headers(target: Target) -> dict[str, str]:
    """Headers for questions to the same server (the API key, if any)."""
    return {name: value for name, value in target.headers.items() if name != "Content-Type"}
