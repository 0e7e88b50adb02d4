"""What every writer does with canonical tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from converters.readers.base import Entry, Loaded
from converters.safetensors_io import ShardWriter, TensorSpec


@dataclass(frozen=True)
class Decision:
    """What happens to one entry.

    Attributes:
        entry: the entry.
        pack: written as 2:4.
        reason: why it is not, when it could have been; empty otherwise.
        zeros: zeros found in a linear's weight.
    """

    entry: Entry
    pack: bool
    reason: str = ""
    zeros: int = 0


class Writer(Protocol):
    """A target format.

    Attributes:
        format: its name.
        notes: what it adds or changes beyond the format, for the report.
    """

    format: str
    notes: tuple[str, ...]

    def specs(self, decision: Decision) -> list[TensorSpec]:
        """The tensors that one entry becomes, from headers alone."""

    def encode(self, decision: Decision, loaded: Loaded) -> dict[str, Tensor]:
        """The data of :meth:`specs`."""

    def write(self, decision: Decision, loaded: Loaded, out: ShardWriter) -> None:
        """Put the data of :meth:`specs` into a shard."""

    def config(self, source: Mapping[str, Any], decisions: Sequence[Decision]) -> dict[str, Any]:
        """The new config.json."""
