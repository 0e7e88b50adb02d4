"""Per-request observations inside a report: columns of numbers, milliseconds after the start."""

import csv
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.engine import EngineResult
from bench.files import write_text
from bench.records import RequestRecord

_MOMENTS = ("scheduled", "dispatched", "first_byte", "first_token", "last_token", "finished")
_DECIMALS = 3


def raw_block(result: EngineResult, keep: str) -> dict[str, Any] | None:
    """Columns of all requests in order of their index.

    Args:
        result: What the engines recorded.
        keep: ``none`` (returns None), ``requests``, or ``chunks`` to add the time of every chunk.
    """
    if keep == "none":
        return None
    records = sorted(result.records, key=lambda record: record.index)

    def since(value: int | None) -> float | None:
        return None if value is None else round((value - result.start_ns) / 1e6, _DECIMALS)

    block: dict[str, Any] = {"index": [record.index for record in records]}
    for moment in _MOMENTS:
        block[f"{moment}_ms"] = [since(getattr(record, f"{moment}_ns")) for record in records]
    others: dict[str, Callable[[RequestRecord], Any]] = {
        "turn": lambda record: record.turn,
        "prompt_tokens": lambda record: record.prompt_tokens,
        "output_tokens": lambda record: record.output_tokens,
        "outcome": lambda record: record.outcome.value,
        "failure": lambda record: None if record.failure is None else record.failure.value,
        "http_status": lambda record: record.http_status,
        "finish_reason": lambda record: record.finish_reason,
    }
    for name, get in others.items():
        block[name] = [get(record) for record in records]
    if keep == "chunks":
        block["chunks_ms"] = [[since(moment) for moment in record.chunk_ns] for record in records]
        block["chunk_tokens"] = [list(record.chunk_tokens) for record in records]
    return block


def write_csv(raw: Mapping[str, Any], path: Path) -> None:
    """One row per request; lists of chunks are left out."""
    columns = {name: values for name, values in raw.items() if not name.startswith("chunk")}
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    write_text(text.getvalue(), path)
