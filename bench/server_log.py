"""What a server's log says about why it did not start."""

import re
from collections.abc import Sequence

_EXCEPTION = re.compile(r"(?:\w+\.)*\w*(?:Error|Exception)(?:: |$)")
_OURS = "vllm_sparse.errors."
# What follows from the cause in the processes that waited for it.
_CONSEQUENCES = ("initialization failed", "Engine core proc")
_MOST = 400


def message(line: str) -> str:
    """A line without process, date and place: ``(EngineCore pid=7) INFO 01-01 10:00:00 [x.py:3] text``."""
    _, bracket, rest = line.partition("] ")
    return rest if bracket and line.startswith(("(", "INFO", "ERROR", "WARNING")) else line


def last_message(lines: Sequence[str]) -> str:
    """The newest line that says something."""
    said = [line for line in lines if line.strip()]
    return message(said[-1]).strip()[:200] if said else "starting"


def cause(lines: Sequence[str]) -> str | None:
    """The exception at the root of a failed start, as one line; None if the log names none.

    This project's own errors explain themselves and come first; otherwise the first exception that is not
    the consequence of another. Pydantic puts its finding on the line after the exception.
    """
    texts = [message(line) for line in lines if " WARNING " not in line]
    own = [text.partition(": ")[2] for text in texts if text.startswith(_OURS)]
    if own:
        return own[-1].strip()
    for index, text in enumerate(texts):
        if _EXCEPTION.match(text) and not any(word in text for word in _CONSEQUENCES):
            following = texts[index + 1].strip() if index + 1 < len(texts) else ""
            found = following.partition(" [type=")[0] if "validation error" in text and following else text
            return found.removeprefix("Value error, ").strip()[:_MOST]
    return None
