"""Writer of ordinary dense checkpoints: packed weights unpacked, quantised ones dequantised."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from converters.config_json import without_compression
from converters.layers import Kind
from converters.readers.base import Entry, Loaded, dense_numbers
from converters.safetensors_io import ShardWriter, TensorSpec
from converters.writers.base import Decision

_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
# Scales of a quantised KV cache mean nothing in a dense checkpoint.
_DROPPED = (".k_scale", ".v_scale", ".q_scale", ".prob_scale")


def model_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype a config computes in; bfloat16 when it does not say."""
    text = config.get("text_config")
    for holder in (config, text if isinstance(text, Mapping) else {}):
        for key in ("dtype", "torch_dtype"):
            named = holder.get(key)
            if isinstance(named, str) and named in _DTYPES:
                return _DTYPES[named]
    return torch.bfloat16


class DenseWriter:
    """Plain ``M.weight`` tensors without any compression block.

    Args:
        config: the source's config.json; its dtype is what quantised weights become.
    """

    format = "dense"
    notes: tuple[str, ...] = ()

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._dtype = model_dtype(config)

    def specs(self, decision: Decision) -> list[TensorSpec]:
        """See :class:`~converters.writers.base.Writer`."""
        entry = decision.entry
        if entry.kind is Kind.OTHER and entry.name.endswith(_DROPPED):
            return []
        return [TensorSpec(entry.name, self._dtype_of(entry), disk_shape(entry))]

    def _dtype_of(self, entry: Entry) -> torch.dtype:
        return self._dtype if entry.quantized else entry.dtype

    def encode(self, decision: Decision, loaded: Loaded) -> dict[str, Tensor]:
        """See :class:`~converters.writers.base.Writer`."""
        entry = decision.entry
        if not self.specs(decision):
            return {}
        weight = dense_numbers(entry, loaded).to(self._dtype_of(entry))
        return {entry.name: disk_layout(entry, weight)}

    def write(self, decision: Decision, loaded: Loaded, out: ShardWriter) -> None:
        """See :class:`~converters.writers.base.Writer`."""
        for name, tensor in self.encode(decision, loaded).items():
            out.put(name, tensor)

    def config(self, source: Mapping[str, Any], decisions: Sequence[Decision]) -> dict[str, Any]:
        """The source's config without its compression block."""
        del decisions
        return without_compression(source)


def disk_shape(entry: Entry) -> tuple[int, ...]:
    """The shape of the dense tensor on disk: Conv1D weights are stored (in, out)."""
    return entry.shape[::-1] if entry.conv1d else entry.shape


def disk_layout(entry: Entry, weight: Tensor) -> Tensor:
    """A canonical (out, in) weight as it is stored dense."""
    return weight.t().contiguous() if entry.conv1d else weight
