"""Typed descriptions of a compressed model, parsed from config.json without vLLM.

Sources: compressed-tensors' ``quantization_config`` (also under its older key ``compression_config``) as
written up to release 0.13, and our own ``sparse24`` (docs/format.md, section 2). Enums are closed: a value
that is not listed is an error that names the allowed ones, and nothing in a config is ever imported or
executed.
"""

from enum import StrEnum
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vllm_sparse.errors import FormatError
from vllm_sparse.kernels.base import ActivationQuant, WeightFormat

EIGHT_BIT = (WeightFormat.INT8, WeightFormat.FP8_E4M3)
# vLLM adds these to the dict it hands over; they are not on disk.
ADDED_BY_VLLM = frozenset({"total_num_heads", "total_num_kv_heads"})


class SparsityFormat(StrEnum):
    """How sparse weights are stored."""

    DENSE = "dense"
    SPARSE_BITMASK = "sparse-bitmask"
    SPARSE_24_BITMASK = "sparse-24-bitmask"


class SparsityStructure(StrEnum):
    """The pattern the weights follow."""

    TWO_FOUR = "2:4"
    UNSTRUCTURED = "unstructured"
    NONE = "0:0"


class QuantFormat(StrEnum):
    """How quantised weights are stored (the complete list of compressed-tensors 0.13)."""

    DENSE = "dense"
    SPARSE_BITMASK = "sparse-bitmask"
    SPARSE_24_BITMASK = "sparse-24-bitmask"
    INT_QUANTIZED = "int-quantized"
    FLOAT_QUANTIZED = "float-quantized"
    NAIVE_QUANTIZED = "naive-quantized"
    PACK_QUANTIZED = "pack-quantized"
    MARLIN_24 = "marlin-24"
    MIXED_PRECISION = "mixed-precision"
    NVFP4_PACK_QUANTIZED = "nvfp4-pack-quantized"
    MXFP4_PACK_QUANTIZED = "mxfp4-pack-quantized"


class NumberType(StrEnum):
    """Integers or floats."""

    INT = "int"
    FLOAT = "float"


class Strategy(StrEnum):
    """What shares one scale."""

    TENSOR = "tensor"
    CHANNEL = "channel"
    GROUP = "group"
    BLOCK = "block"
    TOKEN = "token"  # noqa: S105 - a granularity
    TENSOR_GROUP = "tensor_group"
    ATTN_HEAD = "attn_head"


class _Block(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    def unknown_fields(self) -> list[str]:
        """Fields this parser has no meaning for; reported, never acted on."""
        return sorted(self.model_extra or {})


class QuantArgs(_Block):
    """One ``weights`` or ``input_activations`` entry of a config group."""

    num_bits: int = Field(ge=1, le=16)
    type: NumberType = NumberType.INT
    strategy: Strategy | None = None
    group_size: int | None = None
    symmetric: bool = True
    dynamic: bool | str = False


class ConfigGroup(_Block):
    """A quantisation scheme and the layers it is for."""

    targets: list[str]
    weights: QuantArgs | None = None
    input_activations: QuantArgs | None = None
    output_activations: QuantArgs | None = None
    format: QuantFormat | None = None


class SparsityConfig(_Block):
    """The ``sparsity_config`` block."""

    format: SparsityFormat
    targets: list[str] = []
    ignore: list[str] = []
    global_sparsity: float | None = None
    sparsity_structure: SparsityStructure = SparsityStructure.UNSTRUCTURED

    @field_validator("targets", "ignore", mode="before")
    @classmethod
    def _null_is_empty(cls, value: Any) -> Any:
        return [] if value is None else value

    @field_validator("sparsity_structure", mode="before")
    @classmethod
    def _case_insensitive(cls, value: Any) -> Any:
        if value is None:
            return SparsityStructure.UNSTRUCTURED
        return value.lower() if isinstance(value, str) else value


class CompressedTensorsSpec(_Block):
    """The whole ``quantization_config`` of a compressed-tensors checkpoint."""

    quant_method: str = "compressed-tensors"
    format: QuantFormat | None = None
    config_groups: dict[str, ConfigGroup] = {}
    ignore: list[str] = []
    sparsity_config: SparsityConfig | None = None

    @field_validator("ignore", "config_groups", mode="before")
    @classmethod
    def _null_is_empty(cls, value: Any, info: Any) -> Any:
        if value is None:
            return {} if info.field_name == "config_groups" else []
        return value

    @field_validator("sparsity_config", mode="before")
    @classmethod
    def _empty_is_none(cls, value: Any) -> Any:
        """The library writes ``{}`` for a model that is quantised alone, and for every marlin-24 one."""
        return None if value == {} else value

    @model_validator(mode="after")
    def _format_and_structure_agree(self) -> Self:
        sparsity = self.sparsity_config
        if (
            sparsity is not None
            and sparsity.format is SparsityFormat.SPARSE_24_BITMASK
            and sparsity.sparsity_structure is not SparsityStructure.TWO_FOUR
        ):
            raise ValueError(
                f"sparsity_config.format is sparse-24-bitmask but its sparsity_structure is "
                f"{sparsity.sparsity_structure.value!r}; it must be '2:4'"
            )
        return self

    def formats(self) -> set[QuantFormat]:
        """Every storage format named, model-wide or by a config group."""
        named = {group.format for group in self.config_groups.values()} | {self.format}
        return {fmt for fmt in named if fmt is not None}

    def keeps_unquantised_weights(self) -> bool:
        """Whether weights lie beside the scales meant for them, as ``save_compressed=False`` leaves them."""
        return any(
            group.weights is not None and (group.format or self.format) is QuantFormat.DENSE
            for group in self.config_groups.values()
        )


class Projection(StrEnum):
    """How a low-rank branch projects its input."""

    DENSE = "dense"
    POOLED = "pooled"


class _ClosedBlock(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LowRankSpec(_ClosedBlock):
    """``linear.low_rank`` of sparse24."""

    projection: Projection
    columns_per_rank: int = Field(ge=1)


class StaticQuant(StrEnum):
    """Activations quantised with one scale per tensor that the checkpoint brings; symmetric."""

    INT8 = "int8_static"
    FP8 = "fp8_static"


class OutlierSpec(_ClosedBlock):
    """``linear.outliers`` of sparse24: a sparse matrix beside every 2:4 weight."""

    layout: Literal["csr"]


class LinearBlock(_ClosedBlock):
    """``linear`` of sparse24: what every 2:4 linear is."""

    pattern: Literal["2:4"]
    weights: WeightFormat
    group_size: int | None = Field(default=None, ge=4)
    activations: ActivationQuant | StaticQuant = ActivationQuant.NONE
    low_rank: LowRankSpec | None = None
    outliers: OutlierSpec | None = None

    @model_validator(mode="after")
    def _static_scales_need_8_bit_weights(self) -> Self:
        if isinstance(self.activations, StaticQuant) and self.weights not in EIGHT_BIT:
            raise ValueError(
                f"activations is {self.activations.value!r} but weights is {self.weights.value!r}; "
                f"activation scales go with {' or '.join(repr(item.value) for item in EIGHT_BIT)} weights"
            )
        return self


class Sparse24Spec(_ClosedBlock):
    """``quantization_config`` of our own format, versions 1 and 2."""

    quant_method: Literal["sparse24"]
    format_version: Literal[1, 2]
    linear: LinearBlock
    ignore: list[str] = []

    @model_validator(mode="after")
    def _fields_are_of_the_version(self) -> Self:
        newer = self.linear.outliers is not None or isinstance(self.linear.activations, StaticQuant)
        if newer and self.format_version == 1:
            raise ValueError("linear.outliers and static activations need format_version 2; found 1")
        return self


UNQUANTISED = (
    "config.json describes quantised weights, but of format 'dense': they lie unquantised beside their "
    "scales, as llm-compressor saves them with save_compressed=False. Save the model with "
    "save_compressed=True"
)


def parse_sparse24(block: dict[str, Any]) -> Sparse24Spec:
    """Parse a ``sparse24`` block.

    Raises:
        FormatError: an unknown version, field or value, with what is allowed.
    """
    known = {key: value for key, value in block.items() if key not in ADDED_BY_VLLM}
    try:
        return Sparse24Spec.model_validate(known)
    except ValidationError as error:
        raise FormatError(describe_validation_error("quantization_config", error)) from error


def quantization_block(config: dict[str, Any]) -> dict[str, Any] | None:
    """The quantisation block of a config.json, looked for where vLLM looks for it.

    Order: ``quantization_config``, ``compression_config``, then both inside ``text_config``.
    """
    for holder in (config, config.get("text_config")):
        if not isinstance(holder, dict):
            continue
        for key in ("quantization_config", "compression_config"):
            block = holder.get(key)
            if isinstance(block, dict) and block:
                return block
    return None


def normalised_method(block: dict[str, Any]) -> str:
    """``quant_method`` in lower case, with compressed-tensors' underscore spelling folded."""
    method = str(block.get("quant_method", "")).lower()
    return "compressed-tensors" if method in ("compressed_tensors", "compressed-tensors") else method


def parse_compressed_tensors(block: dict[str, Any]) -> CompressedTensorsSpec:
    """Parse a compressed-tensors block.

    Raises:
        FormatError: a value outside the closed vocabulary, with what is allowed.
    """
    known = {key: value for key, value in block.items() if key not in ADDED_BY_VLLM}
    try:
        return CompressedTensorsSpec.model_validate(known)
    except ValidationError as error:
        raise FormatError(describe_validation_error("quantization_config", error)) from error


def describe_validation_error(where: str, error: ValidationError) -> str:
    """Pydantic's findings as one paragraph: field, what was found, what is allowed."""
    parts = []
    for item in error.errors():
        field = ".".join(str(step) for step in item["loc"])
        found = repr(item["input"])
        found = found if len(found) <= 80 else found[:77] + "..."
        parts.append(f"{where}{'.' + field if field else ''}: {item['msg']} (found {found})")
    return "; ".join(parts)
