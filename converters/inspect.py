"""``vllm-sparse inspect``: what a checkpoint is and what vLLM with this plugin will do with each layer.

Headers are read whole; of the weights only a few rows each.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from converters.checkpoint import Checkpoint, open_checkpoint
from converters.layers import Kind
from converters.readers import Entry, Reader, detect_format, make_reader
from converters.readers.bitmask24 import has_row_scales
from converters.serving import CONVERT, Serving, serving_of
from vllm_sparse.errors import FormatError, UnsupportedError
from vllm_sparse.sparse24 import lost_minimum
from vllm_sparse.sparse24.scan import count_24

SCHEMA = "vllm-sparse/inspect/1"
# Rows sampled from each matrix, in three runs: start, middle, end.
SAMPLE_ROWS = 96
_RUNS = 3


@dataclass(frozen=True)
class LayerReport:
    """One matrix.

    Attributes:
        name: the weight's canonical name.
        kind: its role.
        shape: dense shape.
        dtype: of the stored values.
        stored: storage format.
        bytes: on disk, scales and masks included.
        sparsity: share of zeros in the sampled rows; None when they could not be read.
        is_24: whether the sampled rows are 2:4; None when unknown or meaningless.
        action: what the plugin does: ``sparse``, ``dense``, ``fallback`` or ``refused``.
        backend: the kernel backend that would run it here.
        reason: why the action is what it is.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    stored: str
    bytes: int
    sparsity: float | None
    is_24: bool | None
    action: str
    backend: str | None
    reason: str


@dataclass(frozen=True)
class Inspection:
    """A whole checkpoint.

    Attributes:
        path: its folder.
        format: detected storage format.
        quant_method: as config.json has it, empty without one.
        architecture: first of ``architectures``.
        model_type: as config.json has it.
        structured: whether its layers have shapes of their own.
        layers: every linear, head and embedding.
        sparsity: share of zeros in linear weights, estimated from the samples.
        bytes: of all tensors.
        dense_bytes: of the same tensors stored dense in the model's dtype.
        parameters: dense elements.
        verdict: what serving this folder does, in a sentence.
        warnings: what should be mended.
    """

    path: str
    format: str
    quant_method: str
    architecture: str
    model_type: str
    structured: bool
    layers: tuple[LayerReport, ...]
    sparsity: float
    bytes: int
    dense_bytes: int
    parameters: int
    verdict: str
    warnings: tuple[str, ...] = field(default=())

    def as_json(self) -> dict[str, Any]:
        """The ``vllm-sparse/inspect/1`` object."""
        return {"schema": SCHEMA, **asdict(self)}


def sample_rows(weight: Tensor) -> Tensor:
    """Up to :data:`SAMPLE_ROWS` rows from start, middle and end of a matrix."""
    rows = weight.shape[0]
    if rows <= SAMPLE_ROWS:
        return weight
    run = SAMPLE_ROWS // _RUNS
    starts = [position * (rows - run) // (_RUNS - 1) for position in range(_RUNS)]
    return torch.cat([weight[start : start + run] for start in starts])


def _sample(checkpoint: Checkpoint, entry: Entry) -> tuple[float, bool | None]:
    """Zeros and 2:4-ness of the sampled rows of a stored weight."""
    if entry.stored == "dense":
        weight = checkpoint.read(entry.parts[0])
        if entry.conv1d:
            weight = weight.t()
        rows = sample_rows(weight)
        if rows.shape[-1] % 4:
            return float((rows == 0).sum()) / max(1, rows.numel()), None
        zeros, crowded = count_24(rows)
        return zeros / max(1, rows.numel()), crowded == 0
    parts = {part.rpartition(".")[2]: part for part in entry.parts}
    bitmask = sample_rows(checkpoint.read(parts["bitmask"])).numpy()
    import numpy as np

    kept = int(np.bitwise_count(bitmask).sum(dtype=np.int64))
    per_group = np.bitwise_count(np.stack([bitmask & 15, bitmask >> 4]))
    whole = bool((per_group == 2).all()) if entry.shape[1] % 8 == 0 else None
    return 1 - kept / (bitmask.shape[0] * entry.shape[1]), whole


def _layer(checkpoint: Checkpoint, entry: Entry, serving: Serving) -> LayerReport:
    try:
        sparsity, is_24 = _sample(checkpoint, entry)
    except (KeyError, FormatError):
        sparsity, is_24 = None, None
    plan = serving.plan(entry, is_24)
    return LayerReport(
        name=entry.name,
        kind=entry.kind.value,
        shape=entry.shape,
        dtype=entry.quantized.value if entry.quantized else str(entry.dtype).removeprefix("torch."),
        stored=entry.stored,
        bytes=sum(checkpoint.tensors[part].nbytes for part in entry.parts),
        sparsity=None if sparsity is None else round(sparsity, 6),
        is_24=is_24,
        action=plan.action,
        backend=plan.backend,
        reason=plan.reason,
    )


def _lost_minimum(checkpoint: Checkpoint, entries: Sequence[Entry]) -> str | None:
    """A warning if the packed int8 weights, of which some rows are sampled, seem to have lost values."""
    short = rows = 0
    for entry in filter(has_row_scales, entries):
        values = sample_rows(checkpoint.read(entry.parts[0]))
        rows += values.shape[0]
        short += lost_minimum.count_short_rows(values)
    if not lost_minimum.is_suspicious(short, rows):
        return None
    return f"{lost_minimum.message(short, rows)}. {lost_minimum.ADVICE}"


def _packed_routers(entries: Sequence[Entry]) -> str | None:
    """A warning if routers are packed: some of vLLM's classes, Mixtral's for one, have plain ones only."""
    packed = [entry.module for entry in entries if entry.kind is Kind.ROUTER and entry.stored != "dense"]
    if not packed:
        return None
    return (
        f"{len(packed)} routers are stored packed ({packed[0]}, ...), which not every model class of vLLM "
        f"can load; {CONVERT} stores them dense"
    )


def inspect(path: str | Path) -> Inspection:
    """Look at a checkpoint without loading it.

    Args:
        path: folder or hub id.

    Raises:
        FormatError: broken config, index, headers, or parts that do not fit together.
    """
    checkpoint = open_checkpoint(path)
    serving = serving_of(checkpoint)
    chosen = detect_format(checkpoint)
    try:
        reader: Reader | None = make_reader(checkpoint)
        entries: Sequence[Entry] = reader.entries() if reader else ()
    except UnsupportedError as error:
        reader, entries = None, ()
        serving.warnings.append(str(error))
    found = (_lost_minimum(checkpoint, entries), _packed_routers(entries))
    serving.warnings.extend(warning for warning in found if warning is not None)
    shown = (Kind.LINEAR, Kind.HEAD, Kind.EMBEDDING, Kind.ROUTER)
    layers = tuple(_layer(checkpoint, entry, serving) for entry in entries if entry.kind in shown)
    linears = [layer for layer in layers if layer.kind == Kind.LINEAR and layer.sparsity is not None]
    weights = [layer.shape[0] * layer.shape[1] for layer in linears]
    zeros = sum((layer.sparsity or 0.0) * count for layer, count in zip(linears, weights, strict=True))
    config: Mapping[str, Any] = checkpoint.config
    return Inspection(
        # A name that is no Unicode can be opened, but not printed.
        path=os.fsencode(checkpoint.path).decode("utf-8", "replace"),
        format=chosen,
        quant_method=serving.method,
        architecture=_first_architecture(config),
        model_type=str(config.get("model_type", "")),
        structured=bool(config.get("per_layer_config")),
        layers=layers,
        sparsity=round(zeros / sum(weights), 6) if sum(weights) else 0.0,
        bytes=checkpoint.total_bytes,
        dense_bytes=_dense_bytes(checkpoint, entries),
        parameters=sum(entry.numel for entry in entries),
        verdict=serving.verdict(layers),
        warnings=tuple(serving.warnings),
    )


def _first_architecture(config: Mapping[str, Any]) -> str:
    found = config.get("architectures")
    return str(found[0]) if isinstance(found, list) and found else ""


def _dense_bytes(checkpoint: Checkpoint, entries: Sequence[Entry]) -> int:
    from converters.writers.dense import model_dtype

    if not entries:
        return checkpoint.total_bytes
    width = model_dtype(checkpoint.config).itemsize
    return sum(entry.numel * (width if entry.quantized else entry.dtype.itemsize) for entry in entries)
