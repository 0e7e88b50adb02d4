"""Reader of our own ``quant_method: sparse24`` (docs/format.md), versions 1 and 2.

The tensors are those of ``sparse-24-bitmask``, with int4 values packed two to a byte, scales per group of
input columns, low-rank branches, outliers and fixed activation scales.
"""

from dataclasses import replace

import torch

from converters.checkpoint import Checkpoint
from converters.layers import is_conv1d
from converters.quantize import unpack_int4
from converters.readers.base import LOW_RANK_A, LOW_RANK_B, OUTLIERS, Entry, Loaded, check_finite
from converters.readers.bitmask24 import Bitmask24Reader, check_not_empty, packed_kind
from converters.readers.dense import INPUT_SCALE
from converters.readers.outliers import check_outlier_specs, check_outliers
from vllm_sparse.errors import FormatError, UnsupportedError
from vllm_sparse.kernels.base import WeightFormat
from vllm_sparse.quantization.spec import Projection, StaticQuant, parse_sparse24
from vllm_sparse.sparse24 import decompress, validate_bitmask

FORMAT_VERSIONS = (1, 2)


class Sparse24Reader(Bitmask24Reader):
    """Canonical tensors of a ``sparse24`` checkpoint."""

    format = "sparse24"

    def __init__(self, checkpoint: Checkpoint, trust_claims: bool = True) -> None:
        super().__init__(checkpoint, trust_claims)
        version = self.compression.raw.get("format_version")
        if type(version) is not int or version not in FORMAT_VERSIONS:
            raise UnsupportedError(
                f"sparse24 format_version is {version!r}; this release reads "
                f"{' and '.join(map(str, FORMAT_VERSIONS))}. "
                "Update vllm-sparse, or convert with the release that wrote the checkpoint."
            )
        linear = parse_sparse24(dict(self.compression.raw)).linear
        self._weights, self._group, self._low_rank = linear.weights, linear.group_size, linear.low_rank
        self._outliers, self._static = linear.outliers, isinstance(linear.activations, StaticQuant)

    def _packed_entry(self, module: str) -> Entry:
        entry = self._base_entry(module)
        if self._static and f"{module}.{INPUT_SCALE}" not in entry.parts:
            raise FormatError(f"{module} has static activations but {module}.{INPUT_SCALE} is missing")
        names = [*self._branch_names(entry), *self._outlier_names(entry)]
        return replace(
            entry,
            parts=(*entry.parts, *names),
            companions=(*entry.companions, *self.companions(tuple(names))),
        )

    def _outlier_names(self, entry: Entry) -> list[str]:
        """The three tensors of the outliers, checked as far as headers go."""
        names = [f"{entry.module}.{part}" for part in OUTLIERS]
        found = [self.checkpoint.tensors.get(name) for name in names]
        if self._outliers is None:
            stray = [name for name, info in zip(names, found, strict=True) if info is not None]
            if stray:
                raise FormatError(f"{stray[0]!r} is there, but config.json names no linear.outliers")
            return []
        for name, info in zip(names, found, strict=True):
            if info is None:
                raise FormatError(f"{name!r} is missing; linear.outliers asks for it in every packed linear")
        check_outlier_specs(entry, *(info for info in found if info is not None))
        return names

    def _branch_names(self, entry: Entry) -> list[str]:
        """The tensors of the low-rank branch, shapes checked."""
        if self._low_rank is None:
            return []
        module, columns = entry.module, self._low_rank.columns_per_rank
        wanted = {LOW_RANK_B: (entry.shape[0], entry.shape[1] // columns)}
        if self._low_rank.projection is Projection.DENSE:
            wanted[LOW_RANK_A] = (entry.shape[1] // columns, entry.shape[1])
        names = []
        for suffix, shape in wanted.items():
            name = f"{module}.{suffix}"
            info = self.checkpoint.tensors.get(name)
            if info is None or info.shape != shape or entry.shape[1] % columns:
                found = "is missing" if info is None else f"has shape {list(info.shape)}"
                raise FormatError(f"{name!r} {found}; config.json asks for {list(shape)}")
            names.append(name)
        return names

    def _base_entry(self, module: str) -> Entry:
        if self._weights is not WeightFormat.INT4:
            entry = super()._packed_entry(module)
            return replace(entry, group_size=self._group if entry.quantized else None)
        tensors = self.checkpoint.tensors
        names = [f"{module}.{part}" for part in ("compressed", "bitmask", "shape", "weight_scale")]
        missing = [name for name in names if name not in tensors]
        if missing:
            raise FormatError(f"{names[0]!r} needs {missing[0]!r}, which is missing")
        info, bitmask, _, scale = (tensors[name] for name in names)
        if info.dtype != torch.uint8 or len(info.shape) != 2:
            raise FormatError(
                f"{names[0]!r} must be a uint8 matrix for int4; found {info.dtype} {list(info.shape)}"
            )
        rows, cols = info.shape[0], 4 * info.shape[1]
        check_not_empty(names[0], rows, cols)
        if bitmask.shape != (rows, -(-cols // 8)) or bitmask.dtype != torch.uint8:
            raise FormatError(f"{names[1]!r} does not fit a [{rows}, {cols}] weight: {list(bitmask.shape)}")
        group = self._group or cols
        if cols % group or scale.shape != (rows, cols // group):
            raise FormatError(
                f"{names[3]!r} has shape {list(scale.shape)}; a [{rows}, {cols}] weight in groups of "
                f"{group} columns needs one scale per row and group"
            )
        return Entry(
            name=f"{module}.weight",
            shape=(rows, cols),
            dtype=torch.int8,
            kind=packed_kind(module),
            parts=tuple(names),
            shard=info.path.name,
            stored=self.format,
            claims_24=True,
            conv1d=is_conv1d(module, self.checkpoint.config),
            quantized=WeightFormat.INT4,
            group_size=self._group,
            companions=self.companions((names[3],)),
        )

    def load(self, entry: Entry) -> Loaded:
        """See :class:`~converters.readers.base.Reader`."""
        loaded = self._load_base(entry)
        for part in entry.parts:
            if part.endswith((LOW_RANK_A, LOW_RANK_B, *OUTLIERS)):
                loaded.companions[part] = self.checkpoint.read(part)
                check_finite(loaded.companions[part], part)
        if self._outliers is not None and entry.stored != "dense":
            check_outliers(entry, *(loaded.companions[f"{entry.module}.{part}"] for part in OUTLIERS))
        return loaded

    def _load_base(self, entry: Entry) -> Loaded:
        if entry.quantized is not WeightFormat.INT4 or entry.stored != self.format:
            return super().load(entry)
        packed, bitmask, shape = (self.checkpoint.read(part) for part in entry.parts[:3])
        values = unpack_int4(packed)
        try:
            rows, cols = shape.reshape(-1).tolist()
            validate_bitmask(values, bitmask, (rows, cols))
        except (FormatError, ValueError) as error:
            raise FormatError(f"{entry.module}: {error}") from error
        loaded = Loaded(decompress(values, bitmask))
        self.attach_scales(entry, loaded)
        return loaded
