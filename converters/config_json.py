"""What a checkpoint's ``config.json`` says about compression, on top of the plugin's own parser.

Nothing named by a config is ever imported, formatted or executed.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_sparse.errors import FormatError
from vllm_sparse.quantization.matching import LayerPatterns
from vllm_sparse.quantization.spec import (
    CompressedTensorsSpec,
    ConfigGroup,
    QuantFormat,
    SparsityFormat,
    SparsityStructure,
    normalised_method,
    parse_compressed_tensors,
    quantization_block,
)

MAX_CONFIG_BYTES = 64 << 20
_BLOCKS = ("quantization_config", "compression_config")


class Compression:
    """The compression block of a config, parsed, with its name patterns compiled.

    Args:
        config: config.json.

    Attributes:
        method: normalised ``quant_method``, empty when there is no block.
        raw: the block as it stands in the file.
        spec: its typed form, for compressed-tensors.

    Raises:
        FormatError: a value outside the closed vocabulary, or an invalid pattern.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.raw: Mapping[str, Any] = quantization_block(dict(config)) or {}
        self.method = (normalised_method(dict(self.raw)) or "compressed-tensors") if self.raw else ""
        self.spec = CompressedTensorsSpec()
        if self.method == "compressed-tensors":
            self.spec = parse_compressed_tensors(dict(self.raw))
        self._ignore = LayerPatterns(self.spec.ignore, "ignore")
        self._groups = [
            (LayerPatterns(group.targets, f"config_groups.{name}.targets"), group)
            for name, group in self.spec.config_groups.items()
        ]
        sparsity = self.spec.sparsity_config
        self._targets = LayerPatterns(sparsity.targets if sparsity else [], "sparsity_config.targets")
        self._dense = LayerPatterns(sparsity.ignore if sparsity else [], "sparsity_config.ignore")

    @property
    def formats(self) -> set[QuantFormat]:
        """Every quantisation format named, model-wide or by a group."""
        return self.spec.formats()

    @property
    def sparsity_format(self) -> SparsityFormat | None:
        """``sparsity_config.format``, None without the block."""
        return self.spec.sparsity_config.format if self.spec.sparsity_config else None

    @property
    def quantized(self) -> bool:
        """Whether there are config groups."""
        return bool(self._groups)

    def group_of(self, module: str) -> ConfigGroup | None:
        """The config group of a linear module, None when it is left alone."""
        if self._ignore.matches_name(module):
            return None
        for targets, group in self._groups:
            if targets.matches_name(module) or targets.matches_class("Linear"):
                return group
        return None

    def group_size(self, module: str) -> int | None:
        """Input columns per weight scale of a module; None for per-row or per-tensor scales."""
        group = self.group_of(module)
        size = group.weights.group_size if group and group.weights else None
        if size is None or size == -1:
            return None
        if size <= 0:
            raise FormatError(
                f"config.json: group_size of {module} is {size}; allowed: a positive integer, or -1"
            )
        return size

    def claims_24(self, module: str) -> bool:
        """Whether the config says that this linear's weight is 2:4."""
        sparsity = self.spec.sparsity_config
        if sparsity is None or sparsity.sparsity_structure is not SparsityStructure.TWO_FOUR:
            return False
        targeted = self._targets.matches_name(module) or self._targets.matches_class("Linear")
        return targeted and not self._dense.matches_name(module)


def is_unicode(text: str) -> bool:
    r"""Whether a text can be written as UTF-8; JSON's escapes can spell half a character (``\ud800``)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def load_json(path: Path, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """A JSON object from a file of bounded size.

    Raises:
        FormatError: too large, not JSON, or not an object.
    """
    size = path.stat().st_size
    if size > limit:
        raise FormatError(f"{path.name} has {size} bytes; more than {limit} is refused")
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        # ValueError: not UTF-8, not JSON, or a number of thousands of digits.
        raise FormatError(f"{path} is not valid JSON: {error}") from error
    if "\\ud" in text.lower() and not is_unicode(json.dumps(value, ensure_ascii=False)):
        raise FormatError(f"{path} holds half of a Unicode character (an escape such as \\ud800 alone)")
    if not isinstance(value, dict):
        raise FormatError(f"{path} must hold a JSON object; found {type(value).__name__}")
    return value


def without_compression(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of ``config`` with every compression block removed, also the one inside ``text_config``."""
    clean = {key: value for key, value in config.items() if key not in _BLOCKS}
    text = clean.get("text_config")
    if isinstance(text, Mapping):
        clean["text_config"] = {key: value for key, value in text.items() if key not in _BLOCKS}
    return clean
