"""What vLLM with this plugin will do with a checkpoint's layers, told without starting vLLM."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch

from converters.checkpoint import Checkpoint
from converters.config_json import Compression
from converters.layers import Kind, fusion_group, module_of
from converters.readers.base import Entry
from converters.writers.dense import model_dtype
from vllm_sparse.errors import FormatError, UnsupportedError
from vllm_sparse.kernels.base import ActivationQuant, LinearSpec, WeightFormat
from vllm_sparse.kernels.dispatch import select
from vllm_sparse.quantization.scheme import Schemes, SchemeTable, Sparse24Table, Storage, is_vestigial
from vllm_sparse.quantization.spec import parse_sparse24

if TYPE_CHECKING:
    from converters.inspect import LayerReport

CONVERT = "vllm-sparse convert SRC DST"


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one layer: ``sparse``, ``dense``, ``fallback`` or ``refused``, and why."""

    action: str
    backend: str | None
    reason: str


class Serving(Protocol):
    """How one checkpoint will be served."""

    warnings: list[str]

    @property
    def method(self) -> str:
        """``quant_method`` of config.json, empty without one."""

    def plan(self, entry: Entry, is_24: bool | None) -> LayerPlan:
        """What happens to one layer."""

    def verdict(self, layers: Sequence["LayerReport"]) -> str:
        """What happens to the whole, in a sentence."""


def this_device() -> torch.device:
    """Where vLLM would run here."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def kernel_plan(spec: LinearSpec, device: torch.device, why: str) -> LayerPlan:
    """The backend that would run a 2:4 layer on ``device``."""
    try:
        selection = select(spec, device)
    except UnsupportedError as error:
        return LayerPlan("refused", None, str(error))
    passed = "; ".join(f"{name}: {reason}" for name, reason in selection.rejected)
    return LayerPlan("sparse", selection.backend.name, why + (f" (passed over: {passed})" if passed else ""))


def format_of(entry: Entry) -> WeightFormat | None:
    """The kernel's name for an entry's values, None when it has none."""
    try:
        return entry.quantized or WeightFormat.from_dtype(entry.dtype)
    except KeyError:
        return None


@dataclass
class StockServing:
    """A checkpoint without 2:4 claims: vLLM's own linear layers take it."""

    checkpoint: Checkpoint
    compression: Compression
    why: str
    warnings: list[str] = field(default_factory=list)
    served_by: str = "served by vLLM itself"

    @property
    def method(self) -> str:
        """``quant_method`` of config.json."""
        return self.compression.method

    def plan(self, entry: Entry, is_24: bool | None) -> LayerPlan:
        """Dense; says so when the data would allow more."""
        if entry.kind is Kind.LINEAR and is_24:
            return LayerPlan("dense", None, f"2:4 in the data but stored dense; {CONVERT} makes it fast")
        return LayerPlan("dense", None, self.why)

    def verdict(self, layers: Sequence["LayerReport"]) -> str:
        """Untouched, with a hint when the data are 2:4."""
        ready = sum(layer.kind == Kind.LINEAR and bool(layer.is_24) for layer in layers)
        if ready:
            # The plugin packs plain weights by itself; quantised ones go to vLLM whatever the flag says.
            at_once = "" if self.method else " (or at once with --quantization sparse24)"
            return (
                f"{self.served_by}, dense; {ready} linears look 2:4 and run sparse after: {CONVERT}{at_once}"
            )
        return f"{self.served_by}: {self.why}"


@dataclass
class SparseServing:
    """A checkpoint that the plugin claims."""

    checkpoint: Checkpoint
    compression: Compression
    table: Schemes | None
    refusal: str = ""
    warnings: list[str] = field(default_factory=list)

    @property
    def method(self) -> str:
        """``quant_method`` of config.json."""
        return self.compression.method

    def plan(self, entry: Entry, is_24: bool | None) -> LayerPlan:
        """What the linear method will do with this layer."""
        if self.refusal:
            return LayerPlan("refused", None, self.refusal)
        if entry.kind is not Kind.LINEAR:
            return LayerPlan("dense", None, f"{entry.kind.value} stays dense")
        activations = self._activations(entry)
        packed = entry.stored != "dense"
        if activations is None and packed:
            return LayerPlan(
                "refused", None, f"{entry.module} is stored 2:4, but config.json leaves it dense"
            )
        if activations is None:
            return LayerPlan("dense", None, "not among the sparse targets of config.json")
        if not packed and not is_24:
            return LayerPlan("fallback", None, "the config says 2:4, the data are not")
        if not packed and self.table is not None and self.table.storage is Storage.BITMASK:
            return LayerPlan("fallback", None, "the config says 2:4 and packed, the file stores it dense")
        stored = format_of(entry)
        if stored is None:
            return LayerPlan("refused", None, f"no kernel for {entry.dtype}")
        spec = LinearSpec(
            n=entry.shape[0],
            k=entry.shape[1],
            weight=stored,
            activation_dtype=model_dtype(self.checkpoint.config),
            activation_quant=activations,
            group_size=entry.group_size,
        )
        return kernel_plan(spec, this_device(), f"2:4 {stored.value}")

    def _activations(self, entry: Entry) -> ActivationQuant | None:
        """The activation scheme of a sparse layer, None for a layer left dense."""
        if self.table is None:
            return None
        scheme = self.table.sparse_scheme([entry.module], "Linear")
        return None if scheme is None else scheme.activation_quant

    def verdict(self, layers: Sequence["LayerReport"]) -> str:
        """How many layers run sparse, or why none does."""
        if self.refusal:
            return f"refused: {self.refusal}"
        counts = dict.fromkeys(("sparse", "dense", "fallback", "refused"), 0)
        for layer in layers:
            if layer.kind == Kind.LINEAR:
                counts[layer.action] += 1
        if counts["refused"]:
            reason = next(layer.reason for layer in layers if layer.action == "refused")
            return f"refused for {counts['refused']} linears: {reason}"
        kernels = sorted({layer.backend for layer in layers if layer.backend})
        return (
            f"served by vllm-sparse: {counts['sparse']} linears sparse ({', '.join(kernels) or 'none'}), "
            f"{counts['dense']} dense by config, {counts['fallback']} falling back to dense"
            f"{_once_fused(layers)}"
        )


def _once_fused(layers: Sequence["LayerReport"]) -> str:
    """How many layers the sparse linears are to vLLM, whose log counts those; empty where as many."""
    sparse = [module_of(layer.name) for layer in layers if layer.action == "sparse"]
    fused = len({fusion_group(module) for module in sparse})
    if fused == len(sparse):
        return ""
    return f"; vLLM fuses the sparse ones into {fused} layer{'' if fused == 1 else 's'}, which its log counts"


def serving_of(checkpoint: Checkpoint) -> Serving:
    """How a checkpoint will be served.

    Raises:
        FormatError: its compression block is malformed.
    """
    compression = Compression(checkpoint.config)
    structured = checkpoint.config.get("per_layer_config")
    if compression.method == "sparse24":
        return SparseServing(checkpoint, compression, Sparse24Table(parse_sparse24(dict(compression.raw))))
    sparsity = compression.spec.sparsity_config
    claimed = sparsity is not None and bool(sparsity.targets)
    if compression.method == "compressed-tensors" and (claimed or "marlin-24" in compression.formats):
        if is_vestigial(compression.spec):
            serving = StockServing(checkpoint, compression, "its sparsity_config is a left-over")
            serving.warnings.append(
                "config.json keeps a sparsity_config for weights that are not stored sparse; vLLM without "
                "this plugin refuses it"
            )
            return serving
        return _claimed(checkpoint, compression)
    if structured:
        return _structured(checkpoint, compression)
    why = f"{compression.method} is vLLM's own" if compression.method else "an ordinary dense checkpoint"
    return StockServing(checkpoint, compression, why)


def _claimed(checkpoint: Checkpoint, compression: Compression) -> Serving:
    try:
        return SparseServing(checkpoint, compression, SchemeTable(compression.spec))
    except (UnsupportedError, FormatError) as error:
        return SparseServing(checkpoint, compression, None, refusal=str(error))


def _structured(checkpoint: Checkpoint, compression: Compression) -> Serving:
    """Layers of their own shapes, which a class of this plugin builds."""
    from vllm_sparse.models.families import FAMILIES

    names = {family.architecture for family in FAMILIES.values()}
    own = (checkpoint.config.get("architectures") or [""])[0]
    if own in names:
        why = f"layers of their own shapes, built by {own}"
        return StockServing(checkpoint, compression, why, served_by="served by vllm-sparse")
    why = f"per_layer_config under the architecture {own!r}, which is not one of {', '.join(sorted(names))}"
    return StockServing(checkpoint, compression, why)
