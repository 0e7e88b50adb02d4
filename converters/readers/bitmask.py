"""Reader of compressed-tensors' unstructured ``sparse-bitmask``, in both of its public spellings.

``M.weight.compressed`` ``[nnz]``, ``.bitmask`` ``[rows, ceil(cols/8)]`` (little-endian bits), ``.shape``
``[2]`` and ``.row_offsets`` ``[rows]``; other revisions leave ``.weight`` out of the names. The mask may
name explicit zeros. llm-compressor up to 0.3 packs every parameter, norms and biases too: a vector has the
shape ``[1]``, a bitmask ``[ceil(n/8)]`` and one offset, and names other than ``.weight``'s are kept whole.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from converters.checkpoint import Checkpoint
from converters.layers import WEIGHT, Kind, kind_of, module_of
from converters.readers.base import Entry, Loaded, check_finite
from converters.readers.dense import COMPANIONS, QUANTIZED, SCALE, DenseReader
from vllm_sparse.errors import FormatError
from vllm_sparse.sparse24 import unpack_mask

PARTS = ("compressed", "bitmask", "shape", "row_offsets")
VALUES = (torch.bfloat16, torch.float16, torch.float32, *QUANTIZED)


def unpack(values: Tensor, bitmask: Tensor, offsets: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The dense tensor of ``shape``, a matrix ``[rows, cols]`` as a rule.

    Raises:
        FormatError: counts, offsets or pad bits disagree.
    """
    cols = shape[-1]
    counts = torch.as_tensor(np.bitwise_count(bitmask.numpy()).sum(axis=-1, dtype=np.int64))
    if cols % 8 and bool((bitmask[..., -1] >> (cols % 8)).any()):
        raise FormatError("bitmask has pad bits set after the last column; they must be 0")
    if int(counts.sum()) != values.numel():
        raise FormatError(f"bitmask has {int(counts.sum())} bits set, but there are {values.numel()} values")
    if not torch.equal(offsets.reshape(-1).to(torch.int64), (counts.cumsum(0) - counts).reshape(-1)):
        raise FormatError("row_offsets disagree with the bitmask")
    storage = values.view(torch.uint8) if values.element_size() == 1 else values
    dense = torch.zeros(shape, dtype=storage.dtype)
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
        prefixes = [name[: -len(suffix)] for name in tensors if name.endswith(suffix)]
        if not prefixes:
            raise FormatError("config.json says sparse-bitmask, but no tensor is called *.compressed")
        # A file that spells .weight out spells out all names: a packed bias is called so.
        whole = any(prefix.endswith(WEIGHT) for prefix in prefixes)
        packed = [self._packed_entry(prefix, prefix if whole else prefix + WEIGHT) for prefix in prefixes]
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

    def _packed_entry(self, prefix: str, name: str) -> Entry:
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
        rank = len(bitmask.shape)
        if shape.dtype != torch.int64 or bitmask.dtype != torch.uint8 or not 0 < rank == shape.numel:
            raise FormatError(
                f"{prefix}: shape must be int64 and bitmask uint8, with a number in shape for each dimension "
                f"of bitmask; found {shape.dtype} {list(shape.shape)}, {bitmask.dtype} {list(bitmask.shape)}"
            )
        # As many numbers as the bitmask has dimensions; its header bounds them.
        dense = tuple(self.checkpoint.read(names[2]).reshape(-1).tolist())
        if min(dense) <= 0 or (*dense[:-1], -(-dense[-1] // 8)) != bitmask.shape:
            raise FormatError(f"{names[2]!r} says {list(dense)}, the bitmask is {list(bitmask.shape)}")
        module = module_of(name)
        quantized = QUANTIZED.get(info.dtype)
        companions = [f"{module}.{part}" for part in COMPANIONS if f"{module}.{part}" in tensors]
        if quantized is not None and f"{module}.{SCALE}" not in companions:
            raise FormatError(f"{names[0]!r} is {info.dtype} but {module}.{SCALE} is missing")
        kind = kind_of(name, rank)
        return Entry(
            name=name,
            shape=dense,
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
            loaded = Loaded(unpack(values, bitmask, offsets, entry.shape))
        except FormatError as error:
            raise FormatError(f"{entry.module}: {error}") from error
        if entry.quantized is not None:
            self.attach_scales(entry, loaded)
        return loaded
