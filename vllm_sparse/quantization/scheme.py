"""From the parsed config to what one linear layer is: its storage, its numbers, its activations."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from vllm_sparse.errors import UnsupportedError
from vllm_sparse.kernels.base import ActivationQuant, WeightFormat
from vllm_sparse.quantization.matching import LayerPatterns, selects
from vllm_sparse.quantization.spec import (
    UNQUANTISED,
    CompressedTensorsSpec,
    ConfigGroup,
    NumberType,
    Projection,
    QuantArgs,
    QuantFormat,
    Sparse24Spec,
    SparsityFormat,
    SparsityStructure,
    StaticQuant,
    Strategy,
)


class Storage(StrEnum):
    """How a 2:4 layer lies in the checkpoint."""

    BITMASK = "bitmask"
    DENSE_WITH_ZEROS = "dense-with-zeros"


class ScaleLayout(StrEnum):
    """What shares one scale."""

    TENSOR = "tensor"
    CHANNEL = "channel"
    GROUP = "group"


@dataclass(frozen=True)
class WeightQuant:
    """Quantised storage of the kept weights, symmetric; ``group_size`` in dense columns."""

    format: WeightFormat
    scale: ScaleLayout
    group_size: int | None = None


# int8 with a scale for each row.
INT8_ROWS = WeightQuant(WeightFormat.INT8, ScaleLayout.CHANNEL)


@dataclass(frozen=True)
class LowRank:
    """A static branch ``B (A x)`` beside the weight; its rank is K / ``columns_per_rank``."""

    projection: Projection
    columns_per_rank: int


@dataclass(frozen=True)
class SparseScheme:
    """What one 2:4 linear layer is.

    Attributes:
        storage: how it lies in the checkpoint.
        weight_quant: quantisation of the kept values, if any.
        activation_quant: quantisation of the activations at run time, done by the kernels.
        static_quant: quantisation of the activations with a scale from the checkpoint, if any.
        low_rank: a branch beside the weight, if any.
        outliers: whether a sparse matrix stands beside the weight.
    """

    storage: Storage
    weight_quant: WeightQuant | None
    activation_quant: ActivationQuant
    static_quant: StaticQuant | None = None
    low_rank: LowRank | None = None
    outliers: bool = False


class Schemes(Protocol):
    """Answers, for a layer, whether it is 2:4 here and how; ``storage`` is the same for all that are."""

    storage: Storage

    def sparse_scheme(self, names: list[str], class_name: str) -> SparseScheme | None:
        """The scheme of a layer, or None when the config leaves it dense.

        Args:
            names: checkpoint names of the module, several when vLLM fuses them.
            class_name: the module's class, for targets such as ``Linear``.
        """

    def quantisation(self, names: list[str], class_name: str) -> tuple[str, ConfigGroup] | None:
        """Name and content of the config group that quantises a layer, 2:4 or not."""

    def rename(
        self, map_name: Callable[[str], str | None], originals: Callable[[str], list[str]] | None = None
    ) -> None:
        """Translate the config's layer names, for models whose names in vLLM differ from the checkpoint's."""


class Sparse24Table:
    """Schemes of our own ``quant_method: sparse24``: one for every linear that is not ignored."""

    def __init__(self, spec: Sparse24Spec) -> None:
        self.storage = Storage.BITMASK
        self.ignore = LayerPatterns(spec.ignore, "quantization_config.ignore")
        linear = spec.linear
        quant = None
        if linear.weights in (WeightFormat.INT8, WeightFormat.FP8_E4M3, WeightFormat.INT4):
            layout = ScaleLayout.CHANNEL if linear.group_size is None else ScaleLayout.GROUP
            quant = WeightQuant(linear.weights, layout, linear.group_size)
        branch = linear.low_rank
        low_rank = None if branch is None else LowRank(branch.projection, branch.columns_per_rank)
        asked = linear.activations
        dynamic = asked if isinstance(asked, ActivationQuant) else ActivationQuant.NONE
        static = asked if isinstance(asked, StaticQuant) else None
        self.scheme = SparseScheme(
            self.storage, quant, dynamic, static, low_rank, outliers=linear.outliers is not None
        )

    def sparse_scheme(self, names: list[str], class_name: str) -> SparseScheme | None:
        """The one scheme, unless the layer is ignored."""
        return None if selects(self.ignore, names) else self.scheme

    def quantisation(self, names: list[str], class_name: str) -> tuple[str, ConfigGroup] | None:
        """None: what is ignored is dense and not quantised."""
        return None

    def rename(
        self, map_name: Callable[[str], str | None], originals: Callable[[str], list[str]] | None = None
    ) -> None:
        """Translate the names to ignore."""
        self.ignore.rename(map_name, originals)


class SchemeTable:
    """Schemes of a compressed-tensors checkpoint; built once from its config.

    Raises:
        FormatError: invalid patterns.
        UnsupportedError: a storage format that has to be converted first.
    """

    def __init__(self, spec: CompressedTensorsSpec) -> None:
        _refuse_unservable(spec)
        sparsity = spec.sparsity_config
        if sparsity is None:
            raise UnsupportedError("the checkpoint has no sparsity_config; there is nothing 2:4 to serve")
        self.storage = (
            Storage.BITMASK
            if sparsity.format is SparsityFormat.SPARSE_24_BITMASK
            else Storage.DENSE_WITH_ZEROS
        )
        self.targets = LayerPatterns(sparsity.targets, "sparsity_config.targets")
        self.ignore = LayerPatterns(sparsity.ignore, "sparsity_config.ignore")
        self.quant_ignore = LayerPatterns(spec.ignore, "quantization_config.ignore")
        self.groups = [
            (name, LayerPatterns(group.targets, f"config_groups.{name}.targets"), group)
            for name, group in spec.config_groups.items()
        ]

    def sparse_scheme(self, names: list[str], class_name: str) -> SparseScheme | None:
        """The scheme of a layer, or None when the config leaves it dense.

        Args:
            names: checkpoint names of the module, several when vLLM fuses them.
            class_name: the module's class, for targets such as ``Linear``.
        """
        if selects(self.ignore, names) or not selects(self.targets, names, class_name):
            return None
        group = self.quantisation(names, class_name)
        if group is None or group[1].weights is None:
            return SparseScheme(self.storage, None, ActivationQuant.NONE)
        name, found = group
        where = f"config_groups.{name}"
        dynamic, static = _activation_quant(where, found.input_activations)
        return SparseScheme(self.storage, _weight_quant(where, found), dynamic, static)

    def rename(
        self, map_name: Callable[[str], str | None], originals: Callable[[str], list[str]] | None = None
    ) -> None:
        """Translate the config's layer names, for models whose names in vLLM differ from the checkpoint's."""
        for patterns in (self.targets, self.ignore, self.quant_ignore, *(group[1] for group in self.groups)):
            patterns.rename(map_name, originals)

    def quantisation(self, names: list[str], class_name: str) -> tuple[str, ConfigGroup] | None:
        """Name and content of the config group that quantises a layer, 2:4 or not."""
        if selects(self.quant_ignore, names):
            return None
        for name, patterns, group in self.groups:
            if selects(patterns, names):
                return name, group
        # A group that means the layer by name goes before one that means its class, as in vLLM.
        for name, patterns, group in self.groups:
            if patterns.matches_class(class_name):
                return name, group
        return None


def is_vestigial(spec: CompressedTensorsSpec) -> bool:
    """True for a ``sparsity_config`` that stock vLLM refuses although the weights are stored densely.

    Quantised weights stored densely stay with vLLM's own quantised kernels; so does everything whose
    structure is not 2:4. Marlin's packing is no dense storage, although llm-compressor calls it so, and
    weights that were never quantised are for nobody's kernels.
    """
    sparsity = spec.sparsity_config
    if sparsity is None or sparsity.format is not SparsityFormat.DENSE:
        return False
    if QuantFormat.MARLIN_24 in spec.formats() or spec.keeps_unquantised_weights():
        return False
    return bool(spec.config_groups) or sparsity.sparsity_structure is not SparsityStructure.TWO_FOUR


def _refuse_unservable(spec: CompressedTensorsSpec) -> None:
    if spec.keeps_unquantised_weights():
        raise UnsupportedError(UNQUANTISED)
    found = None
    if QuantFormat.MARLIN_24 in spec.formats():
        found = "marlin-24"
    elif spec.sparsity_config and spec.sparsity_config.format is SparsityFormat.SPARSE_BITMASK:
        found = "sparse-bitmask"
    if found:
        raise UnsupportedError(
            f"this checkpoint is stored as {found}; sparse-24-bitmask and dense weights are served. "
            "Convert it once: vllm-sparse convert SRC DST"
        )


def _weight_quant(where: str, group: ConfigGroup) -> WeightQuant:
    weights = group.weights
    if weights is None or weights.num_bits != 8 or not weights.symmetric:
        raise UnsupportedError(
            f"{where}.weights: found {weights}; with sparse-24-bitmask, symmetric 8-bit int or float "
            "weights are served. Convert the checkpoint: vllm-sparse convert SRC DST"
        )
    if weights.strategy not in (Strategy.TENSOR, Strategy.CHANNEL):
        raise UnsupportedError(
            f"{where}.weights.strategy is {weights.strategy}; 'tensor' and 'channel' are served"
        )
    number = WeightFormat.INT8 if weights.type is NumberType.INT else WeightFormat.FP8_E4M3
    return WeightQuant(number, ScaleLayout(weights.strategy.value))


def _activation_quant(where: str, args: QuantArgs | None) -> tuple[ActivationQuant, StaticQuant | None]:
    """What the kernels do at run time, and what a fixed scale does; at most one of them."""
    if args is None:
        return ActivationQuant.NONE, None
    is_int = args.type is NumberType.INT
    if args.num_bits == 8 and args.symmetric and args.dynamic is True:
        return (ActivationQuant.INT8_PER_TOKEN if is_int else ActivationQuant.FP8_PER_TOKEN), None
    static = args.dynamic is False and args.strategy in (None, Strategy.TENSOR)
    if args.num_bits == 8 and args.symmetric and static:
        return ActivationQuant.NONE, StaticQuant.INT8 if is_int else StaticQuant.FP8
    raise UnsupportedError(
        f"{where}.input_activations: found num_bits={args.num_bits}, symmetric={args.symmetric}, "
        f"dynamic={args.dynamic}, strategy={args.strategy.value if args.strategy else None}; 8-bit symmetric "
        "activations are served, dynamic (a scale per token) or static (strategy 'tensor'), or none"
    )
