"""Why a library could not write: the operating system's number behind what it raises.

Torch's archives raise RuntimeErrors of their own ("inline_container", "iostream error") whatever went wrong;
where they write to a Python file, that file's OSError is in the chain. safetensors names the number in its
text. Checkpoints of several processes hold each process's exception.
"""

import errno
import re
from collections.abc import Iterator

_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_WORDS = {"No space left": errno.ENOSPC, "Disk quota exceeded": errno.EDQUOT}


def errno_of(error: BaseException) -> int | None:
    """The number of the system call that failed behind ``error``; None where nothing tells of one."""
    for part in _chain(error, set()):
        if isinstance(part, OSError) and part.errno is not None:
            return part.errno
        found = _OS_ERROR.search(str(part))
        if found:
            return int(found[1])
        for words, number in _WORDS.items():
            if words in str(part):
                return number
    return None


def _chain(error: BaseException, seen: set[int]) -> Iterator[BaseException]:
    """An exception, what it came from, and those of other processes that it gathers."""
    if id(error) in seen:
        return
    seen.add(id(error))
    yield error
    # torch.distributed.checkpoint.CheckpointException: {rank: (exception, stack)}.
    gathered = getattr(error, "failures", None)
    failures = [pair[0] for pair in gathered.values()] if isinstance(gathered, dict) else []
    for part in (*failures, error.__cause__, error.__context__):
        if isinstance(part, BaseException):
            yield from _chain(part, seen)
