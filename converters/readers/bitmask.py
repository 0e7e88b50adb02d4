"""Reader of compressed-tensors' unstructured ``sparse-bitmask``, in both of its public spellings.

``M.weight.compressed`` ``[nnz]``, ``.bitmask`` ``[rows, ceil(cols/8)]`` (little-endian bits), ``.shape``
``[2]`` and ``.row_offsets`` ``[rows]``; other revisions leave ``.weight`` out of the names. The mask may
name explicit zeros. Embeddings can be packed too.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from converters.checkpoint import Checkpoint
from converters.layers import Kind, kind_of
from converters.readers.base import Entry, Loaded, check_finite
from converters.readers.dense import COMPANIONS, QUANTIZED, SCALE, DenseReader
from vllm_sparse.errors import FormatError
from vllm_sparse.sparse24 import unpack_mask

PARTS = ("compressed", "bitmask", "shape", "row_offsets")
VALUES = (torch.bfloat16, torch.float16, torch.float32, *QUANTIZED)


def unpack(values: Tensor, bitmask: Tensor, offsets: Tensor, shape: tuple[int, int]) -> Tensor:
    """The dense ``[rows, cols]`` matrix.

    Raises:
        FormatError: counts, offsets or pad bits disagree.
    """
    rows, cols = shape
    counts = torch.from_numpy(np.bitwise_count(bitmask.numpy()).sum(axis=-1, dtype=np.int64))
    if cols % 8 and bool((bitmask[:, -1] >> (cols % 8)).any()):
        raise FormatError("bitmask has pad bits set after the last column; they must be 0")
    if int(counts.sum()) != values.numel():
        raise FormatError(f"bitmask has {int(counts.sum())} bits set, but there are {values.numel()} values")
    if not torch.equal(offsets.reshape(-1).to(torch.int64), counts.cumsum(0) - counts):
        raise FormatError("row_offsets disagree with the bitmask")
    storage = values.view(torch.uint8) if values.element_size() == 1 else values
    dense = torch.zeros(rows, cols, dtype=storage.dtype)
    dense.masked_scatter_(unpack_mask(bitmask, cols), storage)
    return dense.view(values.dtype)


class BitmaskReader(DenseReader):
    """Canonical tensors of a ``sparse-bitmask`` checkpoint."""

    format = "sparse-bitmask"

    def __init__(self, checkpoint: Checkpoint, trust_claims: bool = True) -> None:
        super().__init__(checkpoint, trust_claims)

    def entries(self) -> Sequence[Entry]:
        """See :class:`~converters.readers.base.Reader`."""
        tensors = self.checkpoint.tensors
        suffix = f".{PARTS[0]}"
        packed = [self._packed_entry(name[: -len(suffix)]) for name in tensors if name.endswith(suffix)]
        if not packed:
            raise FormatError("config.json says sparse-bitmask, but no tensor is called *.compressed")
        taken = {part for entry in packed for part in entry.parts}
        stray = [name for name in tensors if name.endswith(".bitmask") and name not in taken]
        twice = [entry.name for entry in packed if entry.name in tensors]
        if stray or twice:
            raise FormatError(
                f"{stray[0]!r} has no matching .compressed tensor"
                if stray
                else f"{twice[0]!r} is stored twice"
            )
        order = {name: position for position, name in enumerate(tensors)}
        return sorted(packed + self.dense_entries(taken), key=lambda entry: order[entry.parts[0]])

    def _packed_entry(self, prefix: str) -> Entry:
        tensors = self.checkpoint.tensors
        names = [f"{prefix}.{part}" for part in PARTS]
        missing = [name for name in names if name not in tensors]
        if missing:
            raise FormatError(f"{names[0]!r} needs {missing[0]!r}, which is missing")
        info, bitmask, shape, _ = (tensors[name] for name in names)
        if info.dtype not in VALUES or len(info.shape) != 1:
            raise FormatError(
                f"{names[0]!r} must be a vector of values; found {info.dtype} {list(info.shape)}"
            )
        if (
            shape.dtype != torch.int64
            or shape.numel != 2
            or bitmask.dtype != torch.uint8
            or len(bitmask.shape) != 2
        ):
            raise FormatError(f"{prefix}: shape must be two int64 and bitmask a uint8 matrix")
        # Two numbers; the bitmask's header bounds them.
        rows, cols = self.checkpoint.read(names[2]).reshape(-1).tolist()
        if rows != bitmask.shape[0] or rows <= 0 or cols <= 0 or -(-cols // 8) != bitmask.shape[1]:
            raise FormatError(f"{names[2]!r} says [{rows}, {cols}], the bitmask is {list(bitmask.shape)}")
        name = prefix if prefix.endswith(".weight") else f"{prefix}.weight"
        module = name.removesuffix(".weight")
        quantized = QUANTIZED.get(info.dtype)
        companions = [f"{module}.{part}" for part in COMPANIONS if f"{module}.{part}" in tensors]
        if quantized is not None and f"{module}.{SCALE}" not in companions:
            raise FormatError(f"{names[0]!r} is {info.dtype} but {module}.{SCALE} is missing")
        kind = kind_of(name, 2)
        return Entry(
            name=name,
            shape=(rows, cols),
            dtype=info.dtype,
            kind=kind,
            parts=(*names, *(companions if quantized else ())),
            shard=info.path.name,
            stored=self.format,
            claims_24=kind is Kind.LINEAR and self.compression.claims_24(module),
            quantized=quantized,
            group_size=self.compression.group_size(module) if quantized else None,
            companions=self.companions(tuple(companions)) if quantized else (),
        )

    def load(self, entry: Entry) -> Loaded:
        """See :class:`~converters.readers.base.Reader`."""
        if entry.stored != self.format:
            return super().load(entry)
        values, bitmask, _, offsets = (self.checkpoint.read(part) for part in entry.parts[:4])
        if not self.validated:
            check_finite(values, entry.parts[0])
        try:
            loaded = Loaded(unpack(values, bitmask, offsets, (entry.shape[0], entry.shape[1])))
        except FormatError as error:
            raise FormatError(f"{entry.module}: {error}") from error
        if entry.quantized is not None:
            self.attach_scales(entry, loaded)
        return loaded
