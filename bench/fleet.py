"""The servers of a comparison: all up with one running at a time, or one after the other."""

import contextlib
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from bench import environment, probe
from bench.client import normalise_base_url
from bench.server import Server, check_model_dir
from bench.weights import checkpoint_bytes
from vllm_sparse.errors import UserError

GIB = 2**30
# What one CPU server holds besides weights and KV cache (interpreters, torch, work space), and how much more
# than the checkpoint the weights may take while they are loaded and packed. Measured, rounded up.
_BASE_BYTES = 2 * GIB
_WEIGHT_FACTOR = 1.6
_DEFAULT_CONTEXT = 2048

Say = Callable[[str], None]


@dataclass(slots=True)
class Contestant:
    """One model of a comparison: a directory to serve, or a server that is already there.

    Attributes:
        name: Unique name for reports.
        directory: Model directory to serve; None when only a URL is known.
        url: Server root; filled in while its server is up.
        server: The server we manage; None for URLs.
        served: Name it is served under.
        files: Where its files are on this machine, if they are: ``directory``, or what the server tells.
        flags: Words for its ``vllm serve`` alone, after those that all servers get.
        context: Its server's context length, where that is up and tells.
        facts: What was learnt about it (bytes, memory, times), for the report.
    """

    name: str
    directory: Path | None = None
    url: str = ""
    server: Server | None = None
    served: str = ""
    files: Path | None = None
    flags: tuple[str, ...] = ()
    context: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def contestants(
    directories: Sequence[Path], urls: Sequence[str], flags: Sequence[Sequence[str]] = ()
) -> list[Contestant]:
    """Contestants with unique names; the first one is the baseline.

    Args:
        directories: Models to serve.
        urls: Servers that are already up.
        flags: Words for the ``vllm serve`` of each directory alone; they become part of its name.
    """
    found: list[Contestant] = []
    taken: set[str] = set()
    for directory, own in zip(directories, flags or [()] * len(directories), strict=True):
        check_model_dir(directory)
        words = [directory.resolve().name, *(re.sub(r"[^\w.]+", "-", word).strip("-") for word in own)]
        name = _unique("-".join(words), taken)
        facts = {"checkpoint_bytes": checkpoint_bytes(directory)}
        found.append(Contestant(name, directory, served=name, files=directory, flags=tuple(own), facts=facts))
    found += [
        Contestant(_unique(normalise_base_url(url), taken), None, normalise_base_url(url)) for url in urls
    ]
    return found


def identify(models: Sequence[Contestant], api_key: str | None = None) -> None:
    """Ask servers given by URL what they serve; they are then called by that name.

    Raises:
        UnreachableError: One of them does not answer.
    """
    taken: set[str] = set()
    for model in models:
        if model.directory is None:
            facts = probe.ask(model.url, api_key)
            model.served = probe.choose_model(facts, None)
            model.name = _unique(model.served, taken)
            model.files = facts.local_directory(model.served)
            model.context = facts.max_model_len
            if model.files is not None:
                model.facts["checkpoint_bytes"] = checkpoint_bytes(model.files)


def _unique(name: str, taken: set[str]) -> str:
    candidate, number = name, 2
    while candidate in taken:
        candidate, number = f"{name}-{number}", number + 1
    taken.add(candidate)
    return candidate


def split_words(text: str, option: str) -> list[str]:
    """Words of ``option``'s value, quoted as in a shell.

    Raises:
        UserError: A quotation is not closed.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{option} {text!r}: {error}; quote it as in a shell.") from error


def serve_flags(text: str, directories: Sequence[Path]) -> list[str]:
    """Flags for every server, with a context length that fits the smallest model if none is given.

    Without one, vLLM wants a KV cache for the model's full context, which small machines do not have.

    Raises:
        UserError: The words cannot be split, or a model's config.json is not JSON.
    """
    flags = split_words(text, "--serve-args")
    if not any(_is_context_flag(word) for word in flags):
        lengths = [_context_length(directory) for directory in directories]
        flags += ["--max-model-len", str(min([_DEFAULT_CONTEXT, *filter(None, lengths)]))]
    return flags


def context_limit(flags: Sequence[str]) -> int | None:
    """The context length that ``flags`` ask for; None where they do not, or not by a plain number.

    Raises:
        UserError: The flag has no value.
    """
    for position, word in enumerate(flags):
        if _is_context_flag(word):
            _, equals, value = word.partition("=")
            if not equals and position + 1 == len(flags):
                raise UserError(f"--serve-args ends with {word}, which needs a number of tokens.")
            text = value if equals else flags[position + 1]
            return int(text) if text.isdigit() else None
    return None


def _is_context_flag(word: str) -> bool:
    # vLLM takes underscores as well.
    return word.split("=")[0].replace("_", "-") == "--max-model-len"


def _context_length(directory: Path) -> int | None:
    try:
        config = orjson.loads((directory / "config.json").read_bytes())
    except orjson.JSONDecodeError as error:
        raise UserError(f"{directory / 'config.json'} is not JSON: {error}") from error
    length = config.get("max_position_embeddings")
    return length if isinstance(length, int) else None


def fits_in_memory(models: Sequence[Contestant], kv_cache_bytes: int) -> bool:
    """Whether all servers can be up at once."""
    available = environment.memory_available()
    if available is None:
        return False
    weights = sum(model.facts.get("checkpoint_bytes", 0) for model in models)
    return _WEIGHT_FACTOR * weights + len(models) * (_BASE_BYTES + kv_cache_bytes) < 0.9 * available


class Fleet:
    """Lends out one contestant's server at a time; the others do not run meanwhile.

    Args:
        models: The contestants.
        flags: Words for every ``vllm serve``.
        env: Settings for every server.
        together: Keep all servers up, paused while another is measured; else start one for every use.
        log_dir: Where the servers' logs go.
        say: Called with what is going on.
    """

    def __init__(
        self,
        models: Sequence[Contestant],
        *,
        flags: Sequence[str],
        env: dict[str, str],
        together: bool,
        log_dir: Path,
        say: Say,
    ) -> None:
        self._models = models
        self._flags, self._env, self._log_dir, self._say = list(flags), dict(env), log_dir, say
        self.together = together or all(model.directory is None for model in models)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Fleet":
        with contextlib.ExitStack() as stack:
            if self.together:
                for model in self._models:
                    if model.directory is not None:
                        self._start(model, stack)
                        if model.server is not None:
                            model.server.pause()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def use(self, model: Contestant) -> Iterator[Contestant]:
        """The contestant with its server running and answering at ``model.url``."""
        if model.directory is None:
            yield model
            return
        if not self.together:
            with contextlib.ExitStack() as stack:
                self._start(model, stack)
                yield model
                self._note_memory(model)
            model.server = None
            return
        if model.server is None:
            raise RuntimeError(f"{model.name} is not up; use the fleet as a context manager")
        model.server.resume()
        try:
            yield model
            model.server.check()
            self._note_memory(model)
        finally:
            model.server.pause()

    def _start(self, model: Contestant, stack: contextlib.ExitStack) -> None:
        if model.directory is None:
            return
        server = Server(
            model.directory,
            name=model.name,
            flags=[*self._flags, *model.flags],
            env=self._env,
            log_path=self._log_dir / f"{model.name}.log",
            on_progress=lambda line: self._say(f"starting {model.name}: {line}"),
        )
        self._say(f"starting {model.name}")
        stack.enter_context(server)
        model.server, model.url = server, server.base_url
        model.facts |= {
            "start_seconds": server.start_seconds,
            "command": environment.masked_words(server.command),
            "env": environment.masked(server.env),
        }

    def _note_memory(self, model: Contestant) -> None:
        if model.server is not None:
            memory = model.server.memory()
            highest = max(memory["pss_bytes"], model.facts.get("memory", {}).get("pss_bytes", 0))
            model.facts["memory"] = {**memory, "pss_bytes": highest}
