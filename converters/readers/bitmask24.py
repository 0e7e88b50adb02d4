"""Reader of compressed-tensors' ``sparse-24-bitmask``: ``M.compressed``, ``M.bitmask``, ``M.shape``.

bf16, fp16 and fp32 values, and int8 or fp8 values with ``M.weight_scale``. Everything else in the
checkpoint is dense.
"""

import math
from collections.abc import Sequence

import torch

from converters.checkpoint import Checkpoint
from converters.layers import Kind, is_conv1d, kind_of
from converters.readers.base import Entry, Loaded, check_finite
from converters.readers.dense import COMPANIONS, QUANTIZED, SCALE, DenseReader
from vllm_sparse.errors import FormatError
from vllm_sparse.kernels.base import WeightFormat
from vllm_sparse.sparse24 import decompress, lost_minimum, validate_bitmask

VALUES = (torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.float8_e4m3fn)


def packed_kind(module: str) -> Kind:
    """The role of a packed module: whatever its name says, it is at least a linear."""
    kind = kind_of(f"{module}.weight", 2)
    return Kind.LINEAR if kind is Kind.OTHER else kind


def check_not_empty(name: str, rows: int, cols: int) -> None:
    """Refuse a packed weight that holds nothing.

    Raises:
        FormatError: naming the tensor.
    """
    if not rows or not cols:
        raise FormatError(f"{name!r} is a packed weight of shape [{rows}, {cols}], which holds nothing")


def has_row_scales(entry: Entry) -> bool:
    """Whether a packed weight is int8 with a scale for each row."""
    scale = next((spec for spec in entry.companions if spec.name.endswith(f".{SCALE}")), None)
    return (
        entry.stored == Bitmask24Reader.format
        and entry.quantized is WeightFormat.INT8
        and scale is not None
        and math.prod(scale.shape) == entry.shape[0] > 1
    )


class Bitmask24Reader(DenseReader):
    """Canonical tensors of a ``sparse-24-bitmask`` checkpoint."""

    format = "sparse-24-bitmask"

    def __init__(self, checkpoint: Checkpoint, trust_claims: bool = True) -> None:
        super().__init__(checkpoint, trust_claims)

    def entries(self) -> Sequence[Entry]:
        """See :class:`~converters.readers.base.Reader`."""
        tensors = self.checkpoint.tensors
        packed = [self._packed_entry(n[: -len(".compressed")]) for n in tensors if n.endswith(".compressed")]
        if not packed:
            raise FormatError("config.json says sparse-24-bitmask, but no tensor is called *.compressed")
        taken = {part for entry in packed for part in entry.parts}
        stray = [n for n in tensors if n.endswith(".bitmask") and n not in taken]
        if stray:
            raise FormatError(f"{stray[0]!r} has no matching .compressed tensor")
        twice = [entry.name for entry in packed if entry.name in tensors]
        if twice:
            raise FormatError(f"{twice[0]!r} is stored both dense and packed")
        order = {name: position for position, name in enumerate(tensors)}
        return sorted(packed + self.dense_entries(taken), key=lambda entry: order[entry.parts[0]])

    def _packed_entry(self, module: str) -> Entry:
        tensors = self.checkpoint.tensors
        names = [f"{module}.{suffix}" for suffix in ("compressed", "bitmask", "shape")]
        missing = [name for name in names if name not in tensors]
        if missing:
            raise FormatError(f"{names[0]!r} needs {missing[0]!r}, which is missing")
        info, bitmask, shape = (tensors[name] for name in names)
        if info.dtype not in VALUES:
            raise FormatError(f"{names[0]!r} is {info.dtype}; allowed: {', '.join(map(str, VALUES))}")
        if len(info.shape) != 2 or info.shape[1] % 2:
            raise FormatError(
                f"{names[0]!r} has shape {list(info.shape)}; expected [rows, cols / 2], cols % 4 = 0"
            )
        rows, cols = info.shape[0], 2 * info.shape[1]
        check_not_empty(names[0], rows, cols)
        if bitmask.dtype != torch.uint8 or bitmask.shape != (rows, -(-cols // 8)):
            raise FormatError(
                f"{names[1]!r} is {bitmask.dtype} {list(bitmask.shape)}; a [{rows}, {cols}] weight needs "
                f"uint8 [{rows}, {-(-cols // 8)}]"
            )
        if shape.dtype != torch.int64 or shape.numel != 2:
            raise FormatError(f"{names[2]!r} must be two int64; found {shape.dtype} {list(shape.shape)}")
        quantized = QUANTIZED.get(info.dtype)
        companions = [f"{module}.{suffix}" for suffix in COMPANIONS if f"{module}.{suffix}" in tensors]
        if quantized is not None and f"{module}.{SCALE}" not in companions:
            raise FormatError(f"{names[0]!r} is {info.dtype} but {module}.{SCALE} is missing")
        name = f"{module}.weight"
        return Entry(
            name=name,
            shape=(rows, cols),
            dtype=info.dtype,
            kind=packed_kind(module),
            parts=(*names, *(companions if quantized else ())),
            shard=info.path.name,
            stored=Bitmask24Reader.format,
            claims_24=True,
            conv1d=is_conv1d(module, self.checkpoint.config),
            quantized=quantized,
            group_size=self.compression.group_size(module) if quantized else None,
            companions=self.companions(tuple(companions)) if quantized else (),
        )

    def load(self, entry: Entry) -> Loaded:
        """See :class:`~converters.readers.base.Reader`."""
        if entry.stored == "dense":
            return super().load(entry)
        compressed, bitmask, shape = (self.checkpoint.read(part) for part in entry.parts[:3])
        try:
            declared = shape.reshape(-1).tolist()
            validate_bitmask(compressed, bitmask, (declared[0], declared[1]))
        except FormatError as error:
            raise FormatError(f"{entry.module}: {error}") from error
        if not self.validated:
            check_finite(compressed, entry.parts[0])
        loaded = Loaded(decompress(compressed, bitmask))
        if has_row_scales(entry):
            short = lost_minimum.count_short_rows(compressed)
            if lost_minimum.is_suspicious(short, compressed.shape[0]):
                loaded.notes.append(f"{entry.module}: {lost_minimum.message(short, compressed.shape[0])}")
        if entry.quantized is not None:
            self.attach_scales(entry, loaded)
        return loaded
