"""Which layers a ``targets`` or ``ignore`` list means, with the cost of its regular expressions bounded.

An entry is a module class name (``Linear``), a module name (``lm_head``, ``model.layers.0.mlp.up_proj``) or
``re:<regex>``, matched from the start of the module name as compressed-tensors matches it.
"""

import time
from collections.abc import Callable, Iterable, Mapping

import regex

from vllm_sparse.errors import FormatError

MAX_PATTERN_LENGTH = 512
MAX_PATTERNS = 4096
MATCH_TIMEOUT_SECONDS = 0.5
# For all matches of one list together; 18,000 expert names against 100 ordinary patterns took 5 s.
MATCH_BUDGET_SECONDS = 30.0
# Compiling unrolls counted repetitions, and cannot be interrupted.
MAX_REPETITIONS = 10_000
_COUNTED = regex.compile(r"\{\s*(\d*)\s*(?:,\s*(\d*)\s*)?\}")
REGEX_PREFIX = "re:"


def _repetitions(pattern: str) -> int:
    """An upper bound of what ``{m,n}`` makes a compiled pattern grow by."""
    product = 1
    for counts in _COUNTED.findall(pattern):
        # Python refuses to read numbers of thousands of digits.
        largest = max((int(text[:12]) for text in counts if text), default=1)
        product *= max(1, largest)
    return product


class LayerPatterns:
    """A compiled ``targets`` or ``ignore`` list.

    Raises:
        FormatError: too many or too long patterns, or one that does not compile.
    """

    def __init__(self, entries: Iterable[str], where: str) -> None:
        self.where = where
        self._spent = 0.0
        self._originals: Callable[[str], list[str]] = _no_originals
        self.names: set[str] = set()
        self.regexes: list[regex.Pattern[str]] = []
        listed = list(entries)
        if len(listed) > MAX_PATTERNS:
            raise FormatError(f"{where} has {len(listed)} entries; at most {MAX_PATTERNS} are accepted")
        for entry in listed:
            if entry.startswith(REGEX_PREFIX):
                self.regexes.append(self._compile(entry.removeprefix(REGEX_PREFIX)))
            else:
                self.names.add(entry)

    def _compile(self, pattern: str) -> regex.Pattern[str]:
        if len(pattern) > MAX_PATTERN_LENGTH:
            raise FormatError(
                f"{self.where} has a regular expression of {len(pattern)} characters; "
                f"at most {MAX_PATTERN_LENGTH} are accepted"
            )
        if _repetitions(pattern) > MAX_REPETITIONS:
            raise FormatError(
                f"{self.where} has the regular expression {pattern!r}, whose counts multiply to more than "
                f"{MAX_REPETITIONS} repetitions; write it without them or list the layer names"
            )
        try:
            return regex.compile(pattern)
        except (regex.error, RecursionError, OverflowError, MemoryError) as error:
            raise FormatError(
                f"{self.where} has an invalid regular expression {pattern!r}: {error}"
            ) from error

    def rename(
        self,
        map_name: Callable[[str], str | None],
        originals: Callable[[str], list[str]] | None = None,
    ) -> None:
        """Translate listed module names; a name mapped to None is dropped. Classes stay.

        Args:
            map_name: from a checkpoint's name to vLLM's.
            originals: from vLLM's name to the checkpoint's, for what cannot be translated: regular
                expressions, and names that map_name leaves alone.
        """
        if originals is not None:
            self._originals = originals
        renamed = ((map_name(name) if "." in name else name) for name in self.names)
        self.names = {name for name in renamed if name is not None}

    def matches_name(self, name: str) -> bool:
        """True if the module name is listed, by itself or through a regex."""
        spellings = [name, *self._originals(name)]
        if not self.names.isdisjoint(spellings):
            return True
        if not self.regexes:
            return False
        started = time.thread_time()
        try:
            return any(
                pattern.match(spelling, timeout=MATCH_TIMEOUT_SECONDS)
                for pattern in self.regexes
                for spelling in spellings
            )
        except TimeoutError as error:
            raise FormatError(
                f"{self.where} has a regular expression that takes over {MATCH_TIMEOUT_SECONDS} s on "
                f"{name!r}; simplify it or list the layer names"
            ) from error
        finally:
            self._spend(time.thread_time() - started)

    def _spend(self, seconds: float) -> None:
        self._spent += seconds
        if self._spent > MATCH_BUDGET_SECONDS:
            raise FormatError(
                f"{self.where} has {len(self.regexes)} regular expressions that took over "
                f"{MATCH_BUDGET_SECONDS} s of computing together; simplify them or list the layer names"
            )

    def matches_class(self, class_name: str) -> bool:
        """True if a listed class name is part of ``class_name`` (``Linear`` means QKVParallelLinear too)."""
        return any("." not in name and name in class_name for name in self.names)


def _no_originals(name: str) -> list[str]:
    return []


def unfused_names(prefix: str, packed_modules: Mapping[str, list[str]]) -> list[str]:
    """Checkpoint names behind a possibly fused module: ``...qkv_proj`` -> q_proj, k_proj, v_proj.

    Some models name the fused one with its parent, ``attn.qkv``; the longest name decides.
    """
    steps = prefix.split(".")
    for start in range(len(steps)):
        parts = packed_modules.get(".".join(steps[start:]))
        if parts:
            return [".".join([*steps[:start], part]) for part in parts]
    return [prefix]


def _some(names: list[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def selects(patterns: LayerPatterns, names: list[str], class_name: str | None = None) -> bool:
    """Whether the list means this layer; all parts of a fused layer have to agree.

    Raises:
        FormatError: only some parts of a fused layer are listed.
    """
    if class_name is not None and patterns.matches_class(class_name):
        return True
    hits = [patterns.matches_name(name) for name in names]
    if any(hits) and not all(hits):
        listed = [name for name, hit in zip(names, hits, strict=True) if hit]
        others = [name for name in names if name not in listed]
        raise FormatError(
            f"{patterns.where} lists {_some(listed)} but not the layers it is fused with ({_some(others)}); "
            "vLLM runs them as one, so list all of them or none"
        )
    return all(hits)
