"""What a conversion did, for the terminal, for ``--json`` and for the manifest."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from converters.layers import Kind
from converters.writers.base import Decision

SCHEMA = "vllm-sparse/convert/1"


@dataclass(frozen=True)
class Report:
    """Result of one conversion.

    Attributes:
        source: what was read.
        destination: what was written.
        source_format: the reader that read it.
        target: the writer that wrote it.
        weights: what happened to the packed weights' numbers (``keep``, ``int8``, ...).
        dry_run: nothing was written.
        packed: number of linears stored as 2:4.
        dense: ``{module: why}`` of the linears left dense.
        sparsity: share of zeros in all linears.
        source_bytes: bytes of the source's tensors.
        destination_bytes: bytes of the written tensors.
        notes: repairs made on the way.
    """

    source: str
    destination: str
    source_format: str
    target: str
    weights: str
    dry_run: bool
    packed: int
    dense: dict[str, str]
    sparsity: float
    source_bytes: int
    destination_bytes: int
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The machine-readable form."""
        return {"schema": SCHEMA, **asdict(self), "notes": list(self.notes)}

    def dense_reasons(self) -> Counter[str]:
        """How many linears were left dense for each reason."""
        return Counter(self.dense.values())


def dense_linears(decisions: Sequence[Decision]) -> dict[str, str]:
    """Why each linear that stayed dense did."""
    return {
        item.entry.module: item.reason or "kept dense"
        for item in decisions
        if item.entry.kind is Kind.LINEAR and not item.pack
    }


def linear_sparsity(decisions: Sequence[Decision]) -> float:
    """Share of zeros in all linear weights, 0 without linears."""
    linears = [item for item in decisions if item.entry.kind is Kind.LINEAR]
    total = sum(item.entry.numel for item in linears)
    return sum(item.zeros for item in linears) / total if total else 0.0
