"""Reader of the GPTQ-style predecessor of ``marlin-24``: ``M.B_24``, ``M.B_meta``, ``M.s``.

Values and positions lie as in :mod:`converters.readers.marlin24`. What differs: ``quantization_config`` is
GPTQ's (``bits``, ``group_size``, ``checkpoint_format: "marlin_24"``), the scales are shuffled whenever a row
has more than one, and a scratch buffer of the kernel (``M.workspace``) can lie beside them.

Sources: vLLM's former ``gptq_marlin_24`` linear method (names, shapes, config keys); the packing code of
torchao up to 0.14, which the tests run against.
"""

from collections.abc import Mapping
from typing import Any

from converters.readers.base import Entry
from converters.readers.dense import DenseReader
from converters.readers.marlin24 import Marlin24Reader
from vllm_sparse.errors import FormatError, UnsupportedError

# Spellings of quant_method; "gptq" counts only with its checkpoint_format.
_METHODS = frozenset({"gptq_marlin_24", "marlin_24"})
_CHECKPOINT_FORMAT = "marlin_24"
_SCRATCH = "workspace"


def is_gptq_marlin24(block: Mapping[str, Any]) -> bool:
    """Whether a ``quantization_config`` describes this format."""
    method = str(block.get("quant_method", "")).lower()
    return method in _METHODS or (method == "gptq" and block.get("checkpoint_format") == _CHECKPOINT_FORMAT)


class GptqMarlin24Reader(Marlin24Reader):
    """Canonical tensors of a checkpoint with ``B_24`` tensors: int4 or int8 values with their scales."""

    format = "gptq-marlin-24"
    methods = DenseReader.methods | _METHODS | {"gptq"}
    part_names = ("B_24", "s", "B_meta")

    def _bits_and_group(self, module: str) -> tuple[int, int | None]:
        block = self.compression.raw
        bits, group = block.get("bits"), block.get("group_size", -1)
        if bits not in (4, 8) or type(bits) is not int:
            raise UnsupportedError(f"quantization_config.bits is {bits!r}; {self.format} holds 4 or 8 bits")
        if type(group) is not int or (group != -1 and group <= 0):
            raise FormatError(
                f"quantization_config.group_size is {group!r}; allowed: a positive integer, or -1 for one "
                "scale per output"
            )
        if block.get("desc_act") or block.get("sym") is False:
            raise UnsupportedError(
                f"{module}: {self.format} holds symmetric weights in their own order; the config says "
                f"desc_act={block.get('desc_act')}, sym={block.get('sym')}"
            )
        return bits, None if group == -1 else group

    def _scales_shuffled(self, entry: Entry) -> bool:
        return entry.group_size is not None and entry.group_size < entry.shape[1]

    def _scratch(self, modules: set[str]) -> set[str]:
        names = {f"{module}.{_SCRATCH}" for module in modules}
        return names & set(self.checkpoint.tensors)
