"""Reader of compressed-tensors' ``marlin-24``: quantised 2:4 weights in the layout of a GPU kernel.

For a weight of N outputs and K inputs, b bits: ``weight_packed`` int32 ``[K/32, N*16*b/32]``,
``scale_packed`` fp16 ``[groups, N]``, ``meta`` int16 ``[K/32, 2N]``. The writer (compressed-tensors up to
0.14) keeps 2 of 4 values along K, transposes to ``[K/2, N]``, shuffles 16x16 tiles for the tensor cores,
packs ``32/b`` values to a word and scatters the positions of the kept values as CUTLASS wants them. Every
step is a permutation, so every step is undone here; no arithmetic touches the numbers.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from converters.checkpoint import Checkpoint
from converters.readers.base import Entry, Loaded, check_finite
from converters.readers.bitmask24 import packed_kind
from converters.readers.dense import DenseReader, check_scale
from converters.safetensors_io import TensorSpec
from vllm_sparse.errors import FormatError, UnsupportedError
from vllm_sparse.kernels.base import WeightFormat
from vllm_sparse.quantization.spec import QuantFormat, Strategy

TILE = 16
# Values shuffled together: four 16x16 tiles.
BLOCK = 1024
# Order of the nibbles or bytes inside a word, as the kernel unpacks them.
_INTERLEAVE = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}
_SCALE_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
_META_ROWS = 64


@cache
def value_order(bits: int) -> Tensor:
    """Which of 1,024 shuffled values comes first, second, ...: ``packed = tiled[order]``.

    Lane ``i`` of a warp holds 4 rows x 2 halves of columns of the operand of ``mma.m16n8k16``, for each of
    4 neighbouring tiles.
    """
    lane = torch.arange(32)
    rows = torch.stack([2 * (lane % 4), 2 * (lane % 4) + 1, 2 * (lane % 4) + 8, 2 * (lane % 4) + 9], dim=-1)
    column = lane // 4
    start = (256 * (column // 2) + 8 * (column % 2)).view(32, 1, 1, 1)
    order = (
        start
        + torch.arange(4).view(1, 4, 1, 1)
        + 4 * torch.arange(2).view(1, 1, 2, 1)
        + TILE * rows.view(32, 1, 1, 4)
    ).reshape(-1)
    interleave = torch.tensor(_INTERLEAVE[bits])
    return order.reshape(-1, len(interleave))[:, interleave].reshape(-1)


@cache
def scale_order() -> Tensor:
    """The shuffle of group scales, within every 64 outputs."""
    return (8 * torch.arange(8).unsqueeze(1) + torch.tensor(_SCALE_ORDER)).reshape(-1)


def _inverse(order: Tensor) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel())
    return inverse


def unpack_values(packed: Tensor, bits: int) -> Tensor:
    """``weight_packed`` -> kept values ``[N, K/2]`` int8, signed.

    Args:
        packed: int32 ``[K/32, N*16*bits/32]``.
        bits: 4 or 8.
    """
    per_word = 32 // bits
    shifts = bits * torch.arange(per_word, dtype=torch.int32)
    words = packed.unsqueeze(-1) >> shifts
    values = (words & ((1 << bits) - 1)).to(torch.int16) - (1 << (bits - 1))
    tiles = packed.shape[0]
    flat = values.to(torch.int8).reshape(-1, BLOCK)[:, _inverse(value_order(bits))]
    outputs = flat.numel() // (tiles * TILE)
    tiled = flat.reshape(tiles, outputs // TILE, TILE, TILE)
    return tiled.permute(0, 2, 1, 3).reshape(tiles * TILE, outputs).t().contiguous()


def unpack_meta(meta: Tensor, outputs: int) -> Tensor:
    """``meta`` -> positions of the kept values in their group of 4, ``[N, K/2]`` uint8.

    CUTLASS interleaves the metadata of 64 rows and swaps the off-diagonal of each 2x2 block; the two
    columns of a pair lie side by side.
    """
    columns = meta.numel() // outputs
    row = torch.arange(outputs).unsqueeze(1).expand(outputs, columns)
    column = torch.arange(columns).expand(outputs, columns)
    inside = row % _META_ROWS
    target = (
        row - inside
        + 2 * (inside % 2)
        + (inside % 8) // 4
        + 32 * ((inside % 4) // 2)
        + 4 * (inside // 8)
    )  # fmt: skip
    # Swap top right with bottom left; the parity is the target row's.
    up = ((target % 2 == 0) & (column % 2 == 1)).to(torch.int64)
    down = ((target % 2 == 1) & (column % 2 == 0)).to(torch.int64)
    place_row, place_column = target + up - down, column - up + down
    offsets = (place_column // 2) * (2 * outputs) + 2 * place_row + place_column % 2
    words = meta.reshape(-1)[offsets.reshape(-1)].reshape(outputs, columns, 1)
    return ((words >> (2 * torch.arange(8, dtype=torch.int16))) & 3).to(torch.uint8).reshape(outputs, -1)


def unpack_scales(packed: Tensor, shuffled: bool) -> Tensor:
    """``scale_packed`` -> ``[N, groups]``."""
    if not shuffled:
        return packed.t().contiguous()
    plain = packed.reshape(-1, scale_order().numel())[:, _inverse(scale_order())]
    return plain.reshape(packed.shape).t().contiguous()


def scatter_dense(values: Tensor, positions: Tensor) -> Tensor:
    """Kept values ``[N, K/2]`` at their positions -> dense ``[N, K]``.

    Raises:
        FormatError: both values of a group claim the same position.
    """
    outputs, half = values.shape
    pairs = positions.reshape(outputs, half // 2, 2)
    if bool((pairs[..., 0] == pairs[..., 1]).any()):
        raise FormatError("meta names one position twice in a group of 4; the checkpoint is broken")
    dense = torch.zeros(outputs, half // 2, 4, dtype=values.dtype)
    dense.scatter_(2, pairs.to(torch.int64), values.reshape(outputs, half // 2, 2))
    return dense.reshape(outputs, 2 * half)


class Marlin24Reader(DenseReader):
    """Canonical tensors of a ``marlin-24`` checkpoint: int4 or int8 values with their scales."""

    format = "marlin-24"
    readable = DenseReader.readable | {QuantFormat.MARLIN_24}
    # The tensors of values, scales and positions.
    part_names: tuple[str, str, str] = ("weight_packed", "scale_packed", "meta")

    def __init__(self, checkpoint: Checkpoint, trust_claims: bool = True) -> None:
        super().__init__(checkpoint, trust_claims)

    def entries(self) -> Sequence[Entry]:
        """See :class:`~converters.readers.base.Reader`."""
        tensors = self.checkpoint.tensors
        suffix = f".{self.part_names[0]}"
        packed = [self._packed_entry(n[: -len(suffix)]) for n in tensors if n.endswith(suffix)]
        if not packed:
            raise FormatError(f"config.json says {self.format}, but no tensor is called *{suffix}")
        modules = {entry.module for entry in packed}
        for name in tensors:
            module, _, part = name.rpartition(".")
            if part in self.part_names[1:] and module not in modules:
                raise FormatError(f"{name!r} has no matching {suffix} tensor")
        twice = [entry.name for entry in packed if entry.name in tensors]
        if twice:
            raise FormatError(f"{twice[0]!r} is stored both dense and packed")
        taken = {part for entry in packed for part in entry.parts} | self._scratch(modules)
        order = {name: position for position, name in enumerate(tensors)}
        return sorted(packed + self.dense_entries(taken), key=lambda entry: order[entry.parts[0]])

    def _scratch(self, modules: set[str]) -> set[str]:
        """Tensors beside the packed ones that hold nothing of the model."""
        del modules
        return set()

    def _scales_shuffled(self, entry: Entry) -> bool:
        """Whether the writer shuffled the scales: when the group is smaller than the *compressed* width."""
        return entry.group_size is not None and entry.group_size < entry.shape[1] // 2

    def _bits_and_group(self, module: str) -> tuple[int, int | None]:
        group = self.compression.group_of(module)
        weights = group.weights if group else None
        if weights is None:
            raise FormatError(f"{module} is packed as marlin-24, but no config group covers it")
        if not weights.symmetric or weights.num_bits not in (4, 8):
            raise UnsupportedError(
                f"{module}: marlin-24 holds symmetric 4- or 8-bit weights; the config says "
                f"{weights.num_bits} bits, "
                f"symmetric={weights.symmetric}"
            )
        if weights.strategy not in (None, Strategy.GROUP, Strategy.CHANNEL):
            raise UnsupportedError(
                f"{module}: marlin-24 has group or channel scales, not {weights.strategy.value}"
            )
        return weights.num_bits, self.compression.group_size(module)

    def _packed_entry(self, module: str) -> Entry:
        tensors = self.checkpoint.tensors
        names = [f"{module}.{part}" for part in self.part_names]
        missing = [name for name in names if name not in tensors]
        if missing:
            raise FormatError(f"{names[0]!r} needs {missing[0]!r}, which is missing")
        bits, group = self._bits_and_group(module)
        words, scale, meta = (tensors[name] for name in names)
        if (
            words.dtype != torch.int32
            or meta.dtype != torch.int16
            or len(words.shape) != 2
            or len(meta.shape) != 2
        ):
            raise FormatError(f"{names[0]!r} must be an int32 and {names[2]!r} an int16 matrix")
        cols, rows = 32 * words.shape[0], words.shape[1] * (32 // bits) // TILE
        groups = cols // group if group else 1
        if rows == 0 or rows % 64 or cols == 0 or (group and cols % group):
            raise FormatError(
                f"{names[0]!r} {list(words.shape)} stands for a [{rows}, {cols}] weight; {self.format} needs "
                f"outputs in multiples of 64 and inputs in multiples of {group or 32}"
            )
        if meta.shape != (cols // 32, 2 * rows) or scale.shape != (groups, rows):
            raise FormatError(
                f"{module}: a [{rows}, {cols}] weight needs meta [{cols // 32}, {2 * rows}] and scales "
                f"[{groups}, {rows}]; found {list(meta.shape)} and {list(scale.shape)}"
            )
        declared = f"{module}.weight_shape"
        return Entry(
            name=f"{module}.weight",
            shape=(rows, cols),
            dtype=torch.int8,
            kind=packed_kind(module),
            parts=(*names, *([declared] if declared in tensors else [])),
            shard=words.path.name,
            stored=self.format,
            claims_24=True,
            quantized=WeightFormat.INT4 if bits == 4 else WeightFormat.INT8,
            group_size=group,
            companions=(TensorSpec(f"{module}.weight_scale", scale.dtype, (rows, groups)),),
        )

    def load(self, entry: Entry) -> Loaded:
        """See :class:`~converters.readers.base.Reader`."""
        if entry.stored != self.format:
            return super().load(entry)
        words, scale, meta = (self.checkpoint.read(part) for part in entry.parts[:3])
        if len(entry.parts) > 3:
            declared = self.checkpoint.read(entry.parts[3]).reshape(-1).tolist()
            if tuple(declared) != entry.shape:
                raise FormatError(
                    f"{entry.parts[3]!r} says {declared}, the packed weight is {list(entry.shape)}"
                )
        bits = 4 if entry.quantized is WeightFormat.INT4 else 8
        try:
            weight = scatter_dense(unpack_values(words, bits), unpack_meta(meta, entry.shape[0]))
        except FormatError as error:
            raise FormatError(f"{entry.module}: {error}") from error
        scales = unpack_scales(scale, self._scales_shuffled(entry))
        check_scale(scales, entry.parts[1], entry)
        check_finite(scales, entry.parts[1])
        return Loaded(weight, {f"{entry.module}.weight_scale": scales})
