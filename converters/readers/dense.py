"""Reader of ordinary checkpoints: ``M.weight``, with ``M.weight_scale`` when it is quantised to 8 bits.

Zeros are detected from the data, so a pruned model needs no config block, and a left-over
``sparsity_config`` of format ``dense`` does no harm.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from converters.checkpoint import Checkpoint
from converters.config_json import Compression
from converters.layers import Kind, is_conv1d, kind_of, module_of
from converters.readers.base import Entry, Loaded, check_finite
from converters.safetensors_io import TensorSpec
from vllm_sparse.errors import FormatError, NumericsError, UnsupportedError
from vllm_sparse.kernels.base import WeightFormat
from vllm_sparse.quantization.spec import UNQUANTISED, QuantFormat

QUANTIZED = {torch.int8: WeightFormat.INT8, torch.float8_e4m3fn: WeightFormat.FP8_E4M3}
SCALE = "weight_scale"
INPUT_SCALE = "input_scale"
# Tensors of a quantised module that travel with its weight.
COMPANIONS = ("weight_scale", "input_scale", "weight_zero_point", "input_zero_point")


class DenseReader:
    """Canonical tensors of a checkpoint whose weights are stored whole.

    Args:
        checkpoint: the opened checkpoint.
        trust_claims: believe a config that says 2:4, so that a layer which is not is an error.
    """

    format = "dense"
    # What quant_method, and compressed-tensors' format, may be for this reader to understand the tensors.
    methods: frozenset[str] = frozenset({"", "compressed-tensors", "sparse24"})
    readable = frozenset(
        {
            QuantFormat.DENSE,
            QuantFormat.INT_QUANTIZED,
            QuantFormat.FLOAT_QUANTIZED,
            QuantFormat.NAIVE_QUANTIZED,
            QuantFormat.SPARSE_24_BITMASK,
            QuantFormat.SPARSE_BITMASK,
        }
    )

    def __init__(self, checkpoint: Checkpoint, trust_claims: bool = True) -> None:
        self.checkpoint = checkpoint
        self.validated = False
        self.compression = Compression(checkpoint.config)
        self._trust_claims = trust_claims
        if self.compression.method not in self.methods:
            raise UnsupportedError(
                f"quant_method {self.compression.method!r} cannot be converted: its weights are packed in "
                "another scheme. vLLM serves it as it is; for 2:4 start from the unquantised model."
            )
        foreign = self.compression.formats - self.readable
        groups = self.compression.spec.config_groups.values()
        if groups and all(group.format is not None for group in groups):
            foreign -= {QuantFormat.MIXED_PRECISION}  # says no more than that the groups' own formats differ
        if foreign:
            names = ", ".join(sorted(str(item) for item in foreign))
            raise UnsupportedError(f"weights of format {names} are not read as dense weights")
        if self.compression.spec.keeps_unquantised_weights():
            raise UnsupportedError(UNQUANTISED)

    def entries(self) -> Sequence[Entry]:
        """See :class:`~converters.readers.base.Reader`."""
        tensors = self.checkpoint.tensors
        stray = [n for n in tensors if n.endswith((".compressed", ".bitmask"))]
        if stray:
            raise FormatError(
                f"{stray[0]!r} and {len(stray) - 1} more tensors are packed, but config.json has no "
                "sparsity_config for them; restore the block or name the format with --format"
            )
        return self.dense_entries(set())

    def dense_entries(self, taken: set[str]) -> list[Entry]:
        """Entries of every tensor that is not in ``taken`` (those already belong to packed weights)."""
        tensors = self.checkpoint.tensors
        found: list[Entry] = []
        consumed = set(taken)
        for name in tensors:
            if name in consumed or not name.endswith(".weight"):
                continue
            entry = self._weight_entry(name)
            consumed.update(entry.parts)
            found.append(entry)
        rest = [
            Entry(name, info.shape, info.dtype, Kind.OTHER, (name,), info.path.name)
            for name, info in tensors.items()
            if name not in consumed
        ]
        order = {name: position for position, name in enumerate(tensors)}
        return sorted(found + rest, key=lambda entry: order[entry.parts[0]])

    def _weight_entry(self, name: str) -> Entry:
        info = self.checkpoint.tensors[name]
        module = module_of(name)
        kind = kind_of(name, len(info.shape))
        conv1d = kind is Kind.LINEAR and is_conv1d(module, self.checkpoint.config)
        shape = info.shape[::-1] if conv1d else info.shape
        quantized = QUANTIZED.get(info.dtype)
        parts: tuple[str, ...] = (name,)
        if quantized is not None:
            parts += tuple(
                f"{module}.{suffix}"
                for suffix in COMPANIONS
                if f"{module}.{suffix}" in self.checkpoint.tensors
            )
            if f"{module}.{SCALE}" not in parts:
                raise FormatError(f"{name!r} is {info.dtype} but has no {module}.{SCALE}")
        return Entry(
            name=name,
            shape=shape,
            dtype=info.dtype,
            kind=kind,
            parts=parts,
            shard=info.path.name,
            claims_24=self._trust_claims and kind is Kind.LINEAR and self.compression.claims_24(module),
            conv1d=conv1d,
            quantized=quantized,
            group_size=self.compression.group_size(module) if quantized else None,
            companions=self.companions(parts[1:]),
        )

    def companions(self, parts: tuple[str, ...]) -> tuple[TensorSpec, ...]:
        """Specs of the scales among ``parts``; zero points are checked at load and dropped."""
        infos = (self.checkpoint.tensors[part] for part in parts if not part.endswith("_zero_point"))
        return tuple(TensorSpec(info.name, info.dtype, info.shape) for info in infos)

    def load(self, entry: Entry) -> Loaded:
        """See :class:`~converters.readers.base.Reader`."""
        weight = self.checkpoint.read(entry.parts[0])
        if not self.validated:
            check_finite(weight, entry.name)
        if entry.conv1d:
            weight = weight.t().contiguous()
        loaded = Loaded(weight)
        if entry.quantized is not None:
            self.attach_scales(entry, loaded)
        return loaded

    def attach_scales(self, entry: Entry, loaded: Loaded) -> None:
        """Read and check the scales of a quantised entry.

        Raises:
            NumericsError: a scale is NaN, Inf, negative or zero.
            FormatError: its shape does not fit the weight.
            UnsupportedError: the weight is asymmetric.
        """
        for part in entry.parts:
            suffix = part.rpartition(".")[2]
            if suffix not in COMPANIONS:
                continue
            value = self.checkpoint.read(part)
            if suffix == "weight_zero_point":
                if bool(value.to(torch.float32).any()):
                    raise UnsupportedError(
                        f"{part!r}: asymmetric weights turn zeros into non-zeros; not read"
                    )
                continue
            if suffix == SCALE:
                check_scale(value, part, entry)
            check_finite(value, part)
            if not suffix.endswith("_zero_point"):
                loaded.companions[part] = value


def check_scale(scale: Tensor, name: str, entry: Entry) -> None:
    """Check a weight scale against the weight it belongs to.

    Raises:
        NumericsError: NaN, Inf or a value that is not positive.
        FormatError: the shape fits neither per-tensor, per-channel nor per-group scales.
    """
    if not scale.is_floating_point():
        raise FormatError(f"{name!r} must be a float tensor; found {scale.dtype}")
    check_finite(scale, name)
    if scale.numel() and float(scale.to(torch.float32).min()) <= 0:
        raise NumericsError(f"{name!r} holds scales that are zero or negative; the checkpoint is broken")
    rows, cols = entry.shape
    groups = cols // entry.group_size if entry.group_size else 1
    if scale.numel() not in (1, rows, rows * groups):
        raise FormatError(
            f"{name!r} has shape {list(scale.shape)}; a weight {list(entry.shape)} needs 1, {rows} or "
            f"{rows}x{groups} scales"
        )
