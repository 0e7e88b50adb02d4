"""Reads the Dockerfiles of deploy/: the instructions these use, as data; anything else is an error."""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

_KNOWN = {
    *("ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM"),
    *("HEALTHCHECK", "LABEL", "RUN", "SHELL", "USER", "WORKDIR"),
}


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction: its keyword and the rest, lines joined, comments dropped."""

    keyword: str
    text: str


@dataclass(slots=True)
class Stage:
    """From one FROM to the next."""

    base: str
    name: str | None
    instructions: list[Instruction] = field(default_factory=list)


def read(path: Path, arguments: Mapping[str, str] | None = None) -> list[Stage]:
    """The stages of a Dockerfile; ``arguments`` are build arguments.

    Raises:
        ValueError: An instruction that is not known here, or one before the first FROM other than ARG.
    """
    known = dict(arguments or {})
    stages: list[Stage] = []
    for instruction in _instructions(path.read_text(encoding="utf-8")):
        if instruction.keyword not in _KNOWN:
            raise ValueError(f"{path}: {instruction.keyword} is not known here")
        if instruction.keyword == "FROM":
            base, _, name = expand(instruction.text, known).partition(" AS ")
            stages.append(Stage(base, name or None))
        elif stages:
            stages[-1].instructions.append(instruction)
        elif instruction.keyword == "ARG":
            name, _, value = instruction.text.partition("=")
            known.setdefault(name, expand(value, known))
        else:
            raise ValueError(f"{path}: {instruction.keyword} before the first FROM")
    return stages


def expand(text: str, values: Mapping[str, str]) -> str:
    """``$NAME`` and ``${NAME}`` replaced; unknown names become empty, as with Docker."""
    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda m: values.get(m[1] or m[2], ""), text)


def pairs(text: str) -> list[tuple[str, str]]:
    """The ``NAME=value`` words of an ENV or LABEL."""
    return [(name, value) for name, _, value in (word.partition("=") for word in shlex.split(text))]


def words(text: str) -> list[str]:
    """The JSON form of CMD and ENTRYPOINT."""
    value = json.loads(text)
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise ValueError(f"expected a JSON list of words, found {text!r}")
    return value


def _instructions(text: str) -> list[Instruction]:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    found = []
    for line in joined.splitlines():
        if line.strip():
            keyword, _, rest = line.strip().partition(" ")
            found.append(Instruction(keyword, rest.strip()))
    return found
