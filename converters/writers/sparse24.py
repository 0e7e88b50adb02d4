"""Writer of 2:4 checkpoints.

Canonical compressed-tensors ``sparse-24-bitmask`` whenever that format can say it (float weights, int8 and
fp8 with 8-bit activations), so that older compressed-tensors and vLLM read the result; our own
``quant_method: sparse24`` (docs/format.md) for the rest.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from converters.config_json import Compression, without_compression
from converters.layers import Kind, fusion_group
from converters.quantize import (
    clear_negative_zeros,
    count_negative_zeros,
    pack_int4,
    quantize_fp8,
    quantize_int4,
    quantize_int8,
)
from converters.readers.base import LOW_RANK_A, LOW_RANK_B, OUTLIERS, Entry, Loaded
from converters.readers.dense import INPUT_SCALE
from converters.safetensors_io import ShardWriter, TensorSpec
from converters.writers.base import Decision
from converters.writers.dense import disk_layout, disk_shape
from vllm_sparse.errors import UnsupportedError
from vllm_sparse.kernels.base import ActivationQuant, WeightFormat
from vllm_sparse.quantization.spec import QuantFormat, Strategy
from vllm_sparse.sparse24 import compress
from vllm_sparse.sparse24.fastpack import can_pack, pack_chunks

# The library version whose file layout is written.
COMPRESSED_TENSORS_VERSION = "0.13.0"
# The oldest version that can say what is written: 2 has outliers and fixed activation scales.
FORMAT_VERSION, NEWER_VERSION = 1, 2
# Above this, a list of names slows down every loader; the experts of a layer then share a pattern.
MAX_IGNORED = 1000
# Granite's names of tensors that hold all experts of a layer; other families keep theirs in `experts`.
STACKED_EXPERTS = ("input_linear", "output_linear")
WEIGHTS = {
    "keep": None,
    "int8": WeightFormat.INT8,
    "fp8": WeightFormat.FP8_E4M3,
    "int4": WeightFormat.INT4,
    "w4a8": WeightFormat.INT4,
}
_STORAGE = {
    WeightFormat.INT8: torch.int8,
    WeightFormat.FP8_E4M3: torch.float8_e4m3fn,
    WeightFormat.INT4: torch.uint8,
}
_STATIC = {WeightFormat.INT8: "int8_static", WeightFormat.FP8_E4M3: "fp8_static"}


class Sparse24Writer:
    """Packed 2:4 linears, everything else dense.

    Args:
        compression: the source's compression block; its quantisation is kept.
        weights: ``keep``, ``int8``, ``fp8``, ``int4`` or ``w4a8`` (int4 whose activations are rounded to int8
            per token at run time) for the packed linears.
        int4_group: input columns per int4 scale.
    """

    format = "sparse24"
    notes: tuple[str, ...] = ()

    def __init__(self, compression: Compression, weights: str = "keep", int4_group: int = 128) -> None:
        if weights not in WEIGHTS:
            raise UnsupportedError(f"weights {weights!r}; allowed: {', '.join(WEIGHTS)}")
        self._compression = compression
        self._target = WEIGHTS[weights]
        self._int8_activations = weights == "w4a8"
        self._group = int4_group

    def stored_format(self, entry: Entry) -> WeightFormat:
        """What a packed linear's kept values are written as.

        Raises:
            UnsupportedError: the source is quantised already and another format was asked for.
        """
        own = entry.quantized
        if self._target is None or own is self._target:
            return own or WeightFormat.from_dtype(entry.dtype)
        if own is not None:
            raise UnsupportedError(
                f"{entry.name} is {own.value} already; requantising it to {self._target.value} would round "
                "twice. Use --weights keep, or start from the unquantised model."
            )
        if self._compression.quantized:
            raise UnsupportedError(
                f"{entry.name} is not quantised while other layers of this checkpoint are; mixing in "
                f"{self._target.value} is not supported. Use --weights keep."
            )
        return self._target

    def _group_size(self, entry: Entry) -> int | None:
        if self.stored_format(entry) is WeightFormat.INT4 and entry.quantized is None:
            return self._group
        return entry.group_size

    def specs(self, decision: Decision) -> list[TensorSpec]:
        """See :class:`~converters.writers.base.Writer`."""
        entry = decision.entry
        if not decision.pack:
            return [TensorSpec(entry.name, entry.dtype, disk_shape(entry)), *entry.companions]
        rows, cols = entry.shape
        kind = self.stored_format(entry)
        width = cols // 4 if kind is WeightFormat.INT4 else cols // 2
        specs = [
            TensorSpec(f"{entry.module}.shape", torch.int64, (2, 1)),
            TensorSpec(f"{entry.module}.compressed", _STORAGE.get(kind, entry.dtype), (rows, width)),
            TensorSpec(f"{entry.module}.bitmask", torch.uint8, (rows, -(-cols // 8))),
        ]
        if kind in _STORAGE and entry.quantized is None:
            groups = cols // self._group if kind is WeightFormat.INT4 else 1
            specs.append(TensorSpec(f"{entry.module}.weight_scale", torch.float32, (rows, groups)))
        return [*specs, *entry.companions]

    def encode(self, decision: Decision, loaded: Loaded) -> dict[str, Tensor]:
        """See :class:`~converters.writers.base.Writer`."""
        entry = decision.entry
        if not decision.pack:
            return {entry.name: disk_layout(entry, loaded.weight), **loaded.companions}
        weight, tensors = self._prepare(entry, loaded)
        values, bitmask = compress(weight)
        if self.stored_format(entry) is WeightFormat.INT4:
            values = pack_int4(values)
        return tensors | {f"{entry.module}.compressed": values, f"{entry.module}.bitmask": bitmask}

    def write(self, decision: Decision, loaded: Loaded, out: ShardWriter) -> None:
        """See :class:`~converters.writers.base.Writer`; 2:4 values go to the file as they are packed."""
        entry = decision.entry
        streams = decision.pack and self.stored_format(entry) is not WeightFormat.INT4
        if not streams or not can_pack(loaded.weight):
            for name, tensor in self.encode(decision, loaded).items():
                out.put(name, tensor)
            return
        weight, tensors = self._prepare(entry, loaded)
        for name, tensor in tensors.items():
            out.put(name, tensor)
        rows, cols = entry.shape
        put_values = out.put_rows(f"{entry.module}.compressed", weight.dtype, (rows, cols // 2))
        put_bits = out.put_rows(f"{entry.module}.bitmask", torch.uint8, (rows, cols // 8))

        def sink(row: int, values: np.ndarray, bits: np.ndarray) -> None:
            put_values(row, values.view(np.uint8).data.cast("B"))
            put_bits(row, bits.data.cast("B"))

        pack_chunks(weight, sink)

    def _prepare(self, entry: Entry, loaded: Loaded) -> tuple[Tensor, dict[str, Tensor]]:
        """A linear's 2:4 weight as it will be stored, and the tensors beside it."""
        weight, tensors = loaded.weight, dict(loaded.companions)
        kind = self.stored_format(entry)
        if kind in _STORAGE and entry.quantized is None:
            weight, scale = self._quantize(weight, kind)
            tensors[f"{entry.module}.weight_scale"] = scale
        if kind is WeightFormat.FP8_E4M3:
            cleared = count_negative_zeros(weight)
            if cleared:
                weight = clear_negative_zeros(weight)
                loaded.notes.append(f"{entry.module}: {cleared} fp8 values of -0.0 written as 0.0")
        shape = torch.tensor(entry.shape, dtype=torch.int64).reshape(2, 1)
        return weight, tensors | {f"{entry.module}.shape": shape}

    def _quantize(self, weight: Tensor, kind: WeightFormat) -> tuple[Tensor, Tensor]:
        if kind is WeightFormat.INT8:
            return quantize_int8(weight)
        if kind is WeightFormat.FP8_E4M3:
            return quantize_fp8(weight)
        return quantize_int4(weight, self._group)

    def config(self, source: Mapping[str, Any], decisions: Sequence[Decision]) -> dict[str, Any]:
        """The source's config with the compression block of what was written."""
        packed = [item.entry for item in decisions if item.pack]
        ignore = ignored_modules(decisions)
        # Stays next to the tensors that have it, so that the block can name every dense linear.
        config = without_compression(source)
        stored = {(self.stored_format(entry), self._group_size(entry)) for entry in packed}
        if not self._compression_can_say(packed):
            config["quantization_config"] = self._own_block(stored, ignore, packed)
            return config
        sparsity = self._sparsity_block(decisions, ignore)
        block: dict[str, Any] = {"quant_method": "compressed-tensors"}
        formats = {kind for kind, _ in stored if kind in _STORAGE}
        if self._target is not None and formats and not self._compression.quantized:
            block |= _quant_block(self._target, ignore)
        elif self._compression.quantized:
            block |= _kept_block(self._compression.raw)
        config["quantization_config"] = block | {
            "sparsity_config": sparsity,
            "version": COMPRESSED_TENSORS_VERSION,
        }
        return config

    def _compression_can_say(self, packed: Sequence[Entry]) -> bool:
        """Whether compressed-tensors' format covers every packed linear."""
        for entry in packed:
            if any(spec.name.endswith((LOW_RANK_B, *OUTLIERS)) for spec in entry.companions):
                return False
            kind = self.stored_format(entry)
            if kind is WeightFormat.INT4 or self._group_size(entry) is not None:
                return False
            group = self._compression.group_of(entry.module) if entry.quantized else None
            if entry.quantized and (group is None or group.weights is None):
                return False
            if group and group.weights and group.weights.strategy not in (Strategy.CHANNEL, Strategy.TENSOR):
                return False
        return True

    @staticmethod
    def _sparsity_block(decisions: Sequence[Decision], ignore: list[str]) -> dict[str, Any]:
        packed = [item for item in decisions if item.pack]
        total = sum(item.entry.numel for item in packed)
        zeros = sum(item.zeros for item in packed)
        return {
            "format": "sparse-24-bitmask",
            "global_sparsity": round(zeros / total, 6) if total else 0.0,
            "ignore": ignore,
            "registry_requires_subclass": False,
            "sparsity_structure": "2:4",
            "targets": ["Linear"],
        }

    def _activations(self, packed: Sequence[Entry]) -> str:
        """The ``activations`` field: as asked for, else as in the source, fixed scales if it brings them."""
        if self._int8_activations:
            return ActivationQuant.INT8_PER_TOKEN.value
        static = _having(packed, INPUT_SCALE, "activation scale")
        if self._compression.method == "sparse24":
            return str(self._compression.raw["linear"].get("activations", "none"))
        return _STATIC[packed[0].quantized or WeightFormat.INT8] if static else "none"

    def _own_block(
        self, stored: set[tuple[WeightFormat, int | None]], ignore: list[str], packed: Sequence[Entry]
    ) -> dict[str, Any]:
        if len(stored) != 1:
            found = ", ".join(sorted(f"{kind.value}/{group}" for kind, group in stored))
            raise UnsupportedError(f"one checkpoint can hold one packed weight format; found {found}")
        ((kind, group),) = stored
        low_rank, outliers = low_rank_block(packed), outlier_block(packed)
        activations = self._activations(packed)
        newer = outliers is not None or activations in _STATIC.values()
        return {
            "quant_method": "sparse24",
            "format_version": NEWER_VERSION if newer else FORMAT_VERSION,
            "linear": {
                "pattern": "2:4",
                "weights": kind.value,
                "group_size": group,
                "activations": activations,
                **({"low_rank": low_rank} if low_rank else {}),
                **({"outliers": outliers} if outliers else {}),
            },
            "ignore": ignore,
        }


def _having(packed: Sequence[Entry], suffix: str, what: str) -> bool:
    """Whether all packed linears have a tensor, rather than none.

    Raises:
        UnsupportedError: only some have it.
    """
    having = [any(spec.name.endswith(f".{suffix}") for spec in entry.companions) for entry in packed]
    if any(having) and not all(having):
        without = packed[having.index(False)].module
        raise UnsupportedError(f"{without} has no {what} while other packed linears have; all or none must")
    return any(having)


def outlier_block(packed: Sequence[Entry]) -> dict[str, Any] | None:
    """The ``outliers`` field, None without any."""
    return {"layout": "csr"} if _having(packed, OUTLIERS[0], "outliers") else None


def low_rank_block(packed: Sequence[Entry]) -> dict[str, Any] | None:
    """The ``low_rank`` field for the branches of the packed linears, None without any.

    Raises:
        UnsupportedError: branches that the field cannot describe, because they differ in kind.
    """
    found: set[tuple[str, int] | None] = set()
    for entry in packed:
        shapes = {spec.name.rpartition(".")[2]: spec.shape for spec in entry.companions}
        if LOW_RANK_B in shapes:
            projection = "dense" if LOW_RANK_A in shapes else "pooled"
            found.add((projection, entry.shape[1] // shapes[LOW_RANK_B][1]))
        else:
            found.add(None)
    if found <= {None}:
        return None
    if len(found) > 1:
        raise UnsupportedError(
            f"low-rank branches differ between layers ({found}); one kind for all is supported"
        )
    ((projection, columns),) = (item for item in found if item is not None)
    return {"projection": projection, "columns_per_rank": columns}


def ignored_modules(decisions: Sequence[Decision]) -> list[str]:
    """The linears left dense, by name, ``lm_head`` always among them."""
    linear_like = (Kind.LINEAR, Kind.HEAD, Kind.ROUTER)
    names = [item.entry.module for item in decisions if item.entry.kind in linear_like and not item.pack]
    if len(names) > MAX_IGNORED:
        names = list(dict.fromkeys(map(_experts_pattern, names)))
    names += dict.fromkeys(filter(None, (_stack_pattern(item.entry) for item in decisions)))
    return names if "lm_head" in names else [*names, "lm_head"]


def _stack_pattern(entry: Entry) -> str | None:
    """For a tensor that holds all experts of a layer, which is never packed: what vLLM calls its experts."""
    owner, _, last = entry.module.rpartition(".")
    if len(entry.shape) != 3 or not (owner.endswith(".experts") or last in STACKED_EXPERTS):
        return None
    return f"re:{re.escape(owner.removesuffix('.experts'))}[.]experts[.].*"


def _experts_pattern(module: str) -> str:
    """One pattern for all experts of a layer, which are dense or packed together."""
    key = fusion_group(module)
    return f"re:{re.escape(key)}[.].*" if key.endswith(".experts") else module


def _kept_block(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The source's own quantisation block; marlin-24's becomes that of plain integers."""
    kept = {key: value for key, value in raw.items() if key not in ("sparsity_config", "version")}
    marlin = QuantFormat.MARLIN_24.value
    if kept.get("format") == marlin:
        kept["format"] = QuantFormat.INT_QUANTIZED.value
    groups = dict(kept.get("config_groups") or {})
    for name, group in groups.items():
        if group.get("format") == marlin:
            groups[name] = {**group, "format": QuantFormat.INT_QUANTIZED.value}
    return kept | {"quant_method": "compressed-tensors", "config_groups": groups}


def _quant_block(kind: WeightFormat, ignore: list[str]) -> dict[str, Any]:
    """compressed-tensors' W8A8 block: weights per row, activations per token at run time."""
    number = "int" if kind is WeightFormat.INT8 else "float"
    common = {"num_bits": 8, "type": number, "symmetric": True}
    return {
        "format": f"{number}-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**common, "strategy": "channel", "dynamic": False},
                "input_activations": {**common, "strategy": "token", "dynamic": True},
                "output_activations": None,
            }
        },
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
