"""Linear methods: 2:4 weights loaded as they lie on disk, packed once, multiplied from packed form.

Layers are typed ``Any`` here: they are vLLM modules, and methods keep their state on them as attributes.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
)

from vllm_sparse import sparse24
from vllm_sparse.errors import FormatError, UnsupportedError
from vllm_sparse.kernels.base import CanonicalWeight, LinearSpec, WeightFormat
from vllm_sparse.kernels.dispatch import select
from vllm_sparse.quantization import dense_parts, low_rank, outliers, static_activations
from vllm_sparse.quantization.dense_head import head_method
from vllm_sparse.quantization.loaders import (
    LEGAL_BYTE,
    Order,
    by_rows,
    checked_loader,
    row_loader,
    set_dummy_value,
)
from vllm_sparse.quantization.part_scales import PartScalesParameter
from vllm_sparse.quantization.prepared import zero_bias
from vllm_sparse.quantization.report import LoadReport
from vllm_sparse.quantization.scheme import INT8_ROWS, ScaleLayout, SparseScheme, WeightQuant
from vllm_sparse.sparse24.csr import VALUE_DTYPES

_STORED = {
    WeightFormat.INT8: torch.int8,
    WeightFormat.FP8_E4M3: torch.float8_e4m3fn,
    WeightFormat.INT4: torch.uint8,
}


_BESIDE_THE_WEIGHT = (*outliers.TENSORS, static_activations.TENSOR, "low_rank_a", "low_rank_b")


def values_dtype(quant: WeightQuant | None, params_dtype: torch.dtype) -> torch.dtype:
    """Dtype of the kept values on disk: the model's for plain weights, one byte for quantised ones."""
    return params_dtype if quant is None else _STORED[quant.format]


def check_stored_dtype(where: str, found: torch.dtype, quant: WeightQuant | None) -> None:
    """Refuse kept values of another kind than config.json announces, which a copy would convert silently.

    Raises:
        FormatError: names the layer and both dtypes.
    """
    allowed = VALUE_DTYPES if quant is None else (_STORED[quant.format],)
    if found not in allowed:
        wanted = " or ".join(str(dtype) for dtype in allowed)
        raise FormatError(
            f"{where}: the checkpoint stores {found}, its config.json announces {wanted} weights; one of "
            "them is wrong"
        )


class StoredShapes:
    """The dense sizes that each part of a layer brings twice: in ``shape``, and by what it stores."""

    def __init__(self) -> None:
        self._seen: dict[tuple[Any, ...], dict[str, tuple[int, ...]]] = {}

    def declared(self, where: str, part: tuple[Any, ...], shape: Tensor) -> None:
        """Note a loaded ``shape`` tensor; see :meth:`stored`."""
        self._note(where, part, "shape", tuple(shape.reshape(-1).tolist()))

    def stored(self, where: str, part: tuple[Any, ...], values: Tensor, columns: int) -> None:
        """Note loaded values, each byte or number of which stands for ``columns`` dense ones.

        Raises:
            FormatError: they are no matrix, or not of the declared shape; names the layer.
        """
        if values.ndim != 2:
            raise FormatError(f"{where}.compressed must be a matrix; the checkpoint has {list(values.shape)}")
        self._note(where, part, "compressed", (values.shape[0], columns * values.shape[1]))

    def _note(self, where: str, part: tuple[Any, ...], kind: str, shape: tuple[int, ...]) -> None:
        seen = self._seen.setdefault(part, {})
        seen[kind] = shape
        if len(set(seen.values())) > 1:
            raise FormatError(
                f"{where}: the checkpoint's shape tensor says {list(seen['shape'])}, its compressed values "
                f"are a {list(seen['compressed'])} matrix; one of them is damaged. Fetch the file again, or "
                "convert the model again."
            )


def copy_shape(param: Tensor, loaded_weight: Tensor, *shard: Any, **named: Any) -> None:
    """Take in a ``shape``, which is checked and not looked at again.

    It is copied because a reload of weights takes a layer for complete when all its numbers have been.
    """
    del shard, named
    sizes = loaded_weight.reshape(-1)[:2]
    param.data.view(-1)[: sizes.numel()].copy_(sizes)


def unpack_int4(stored: Tensor) -> Tensor:
    """Two's complement nibbles ``[n, k/4]`` uint8, low nibble first -> int8 ``[n, k/2]`` in [-8, 7]."""
    nibbles = torch.stack((stored & 0x0F, stored >> 4), dim=-1).flatten(-2).to(torch.int8)
    return torch.where(nibbles > 7, nibbles - 16, nibbles)


def pack_into(layer: Any, spec: LinearSpec, weight: CanonicalWeight, report: LoadReport) -> None:
    """Choose a backend, pack, and leave only the packed tensors on ``layer``."""
    head = isinstance(layer, VocabParallelEmbedding)
    selection = select(spec, weight.values.device, prompts=not head)
    packed = selection.backend.pack(spec, weight)
    layer.sparse_spec = spec
    layer.sparse_backend = selection.backend
    # LoRA looks for this very name on layers that have no `weight`.
    layer.weight_packed = Parameter(selection.backend.settle(packed.packed), requires_grad=False)
    layer.weight_packed_scale = None if packed.scale is None else Parameter(packed.scale, requires_grad=False)
    resident = packed.packed.nbytes + (0 if packed.scale is None else packed.scale.nbytes)
    if hasattr(layer, "low_rank"):
        resident += low_rank.resident_bytes(layer)
    if hasattr(layer, "outliers"):
        resident += outliers.resident_bytes(layer)
    report.sparse(spec, selection.backend.name, resident, selection.rejected)


def apply_packed(layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    """``x [..., k]`` times the packed weight."""
    backend, spec = layer.sparse_backend, layer.sparse_spec
    return backend.linear(spec, x, layer.weight_packed, layer.weight_packed_scale, bias)


@register_weight_loader_v2_supported_method
class Sparse24BitmaskLinearMethod(LinearMethodBase):
    """``compressed`` + ``bitmask`` (+ ``weight_scale``) tensors of compressed-tensors' sparse-24-bitmask.

    Args:
        scheme: what the layer is.
        prefix: its name in vLLM.
        report: counts what loading does.
        names: checkpoint names of the parts that vLLM fuses here.
        ignored: those of them that the config leaves dense.
        order: puts the rows of values and bitmask in the order that the model wants, if it is another one.
    """

    def __init__(
        self,
        scheme: SparseScheme,
        prefix: str,
        report: LoadReport,
        names: Sequence[str] = (),
        ignored: Collection[str] = (),
        order: Order | None = None,
    ) -> None:
        self.scheme = scheme
        self.prefix = prefix
        self.report = report
        self.names = names or (prefix,)
        self.ignored = frozenset(ignored)
        self._order = order
        self._shapes = StoredShapes()
        self._loaded = self._has_dense = False

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register this rank's share of the on-disk tensors.

        Raises:
            UnsupportedError: K cannot be 2:4, or a tensor-parallel split would cut a bitmask byte.
        """
        k = input_size_per_partition
        self._check_split(k, input_size)
        loader = extra_weight_attrs["weight_loader"]
        n = sum(output_partition_sizes)
        quant = self.scheme.weight_quant
        layer.logical_widths = output_partition_sizes
        layer.sparse_k = k
        layer.sparse_input_size = input_size
        layer.sparse_activation_dtype = params_dtype
        is_int4 = quant is not None and quant.format is WeightFormat.INT4
        values = torch.zeros(n, k // 4 if is_int4 else k // 2, dtype=values_dtype(quant, params_dtype))
        # Zero bits are not 2:4, so a layer the checkpoint never filled is found after loading.
        bitmask = torch.zeros(n, -(-k // 8), dtype=torch.uint8)
        rows = by_rows(layer, loader, self._order)
        checked = checked_loader(layer, rows, self._check_values)
        for name, data, load in (("compressed", values, checked), ("bitmask", bitmask, rows)):
            layer.register_parameter(
                name, ModelWeightParameter(data=data, input_dim=1, output_dim=0, weight_loader=load)
            )
        shape = torch.zeros(len(output_partition_sizes), 2, dtype=torch.int64)
        declared = checked_loader(layer, copy_shape, self._check_shape)
        layer.register_parameter("shape", BasevLLMParameter(data=shape, weight_loader=declared))
        if quant is not None:
            layer.register_parameter(
                "weight_scale", _scale_parameter(quant, output_partition_sizes, k, loader)
            )
        if self.scheme.low_rank is not None:
            low_rank.create_weights(
                layer, self.scheme.low_rank, k, input_size, output_partition_sizes, params_dtype, loader
            )
        if self.scheme.static_quant is not None:
            static_activations.create_weights(layer, len(output_partition_sizes), loader)
        if self.scheme.outliers:
            outliers.create_weights(layer)
        for name, parameter in layer.named_parameters(recurse=False):
            set_dummy_value(parameter, name)
        if not isinstance(layer, VocabParallelEmbedding):
            dense_parts.create_weights(
                layer, self.prefix, k, output_partition_sizes, params_dtype, loader, self._check_dense
            )
        if len(output_partition_sizes) > 1:
            zero_bias(layer)
        self.report.created()

    def _check_values(self, loaded: Tensor, part: tuple[Any, ...]) -> None:
        self._check_reload(refused=self._has_dense)
        quant = self.scheme.weight_quant
        check_stored_dtype(f"{self.prefix}.compressed", loaded.dtype, quant)
        columns = 4 if quant is not None and quant.format is WeightFormat.INT4 else 2
        self._shapes.stored(self.prefix, part, loaded, columns)

    def _check_shape(self, loaded: Tensor, part: tuple[Any, ...]) -> None:
        self._shapes.declared(self.prefix, part, loaded)

    def _check_dense(self, loaded: Tensor, part: tuple[Any, ...]) -> None:
        del loaded, part
        self._check_reload(refused=self._loaded)

    def _check_reload(self, refused: bool) -> None:
        """A reload makes tensors without zeroing them, so rows that are not in the file could not be told."""
        if refused:
            raise UnsupportedError(
                f"{self.prefix} was or is stored dense, as a whole or in part, among 2:4 layers. Such "
                "weights cannot be reloaded into a running engine; start it again."
            )

    def _check_split(self, k: int, input_size: int) -> None:
        if input_size % 4:
            raise UnsupportedError(
                f"{self.prefix}: in_features {input_size} is not a multiple of 4, so it cannot be 2:4. "
                "Add the layer to sparsity_config.ignore and store it dense."
            )
        unit = self._split_unit()
        if k != input_size and k % unit:
            ranks = input_size // k
            raise UnsupportedError(
                f"{self.prefix}: in_features {input_size} over {ranks} tensor-parallel ranks is {k} each, "
                f"which is not a multiple of {unit} (bitmask bytes, scale groups and low-rank blocks stay "
                f"whole). Use a --tensor-parallel-size that divides {input_size // unit}."
            )
        if input_size % unit and unit > 8:
            raise UnsupportedError(
                f"{self.prefix}: in_features {input_size} is not a multiple of {unit} (scale groups, "
                "low-rank blocks). Convert the checkpoint again with this layer left dense."
            )

    def _split_unit(self) -> int:
        quant, branch = self.scheme.weight_quant, self.scheme.low_rank
        group = quant.group_size if quant is not None and quant.group_size else 1
        return math.lcm(8, group, branch.columns_per_rank if branch is not None else 1)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Validate, pack, and free the on-disk form.

        Raises:
            FormatError: the tensors are missing or do not describe a 2:4 matrix; names the layer.
        """
        beside = self.scheme.low_rank is not None or self.scheme.outliers
        if beside and row_loader(layer) is not None:
            raise UnsupportedError(
                f"{self.prefix}: the model itself splits this layer's rows over the ranks, which low-rank "
                "branches and outliers beside it do not follow. Use --tensor-parallel-size 1, or convert the "
                "model again with this layer left dense."
            )
        parts = dense_parts.take(layer, layer.bitmask.data)
        self._loaded, self._has_dense = True, not parts.all_packed
        if not parts.all_packed:
            self._check_plain(layer, parts)
        if parts.all_dense:
            self._serve_dense(layer, parts)
            return
        values, bitmask = parts.rows(layer.compressed.data), parts.rows(layer.bitmask.data)
        quant = self.scheme.weight_quant
        if quant is not None and quant.format is WeightFormat.INT4:
            values = unpack_int4(values)
        _fill_vocabulary_padding(layer, bitmask)
        try:
            sparse24.validate_bitmask(values, bitmask)
        except FormatError as error:
            missing = "" if bool(bitmask.any()) else " (the checkpoint has no bitmask for it)"
            raise FormatError(f"{self.prefix}: {error}{missing}") from error
        scale = self._scale(layer, parts)
        # A rank that has some of a row's columns need not have the largest.
        whole_rows = layer.sparse_k == layer.sparse_input_size
        if whole_rows and quant == INT8_ROWS:
            self.report.int8_values(values)
        if self.scheme.outliers:
            outliers.pack(layer, self.prefix, layer.sparse_k, layer.sparse_input_size)
        spec = LinearSpec(
            n=values.shape[0],
            k=layer.sparse_k,
            weight=WeightFormat.from_dtype(values.dtype) if quant is None else quant.format,
            activation_dtype=layer.sparse_activation_dtype,
            activation_quant=self.scheme.activation_quant,
            group_size=None if quant is None else quant.group_size,
        )
        _drop_tensors(layer)
        self._report_dense(parts)
        pack_into(layer, spec, CanonicalWeight(values, bitmask, scale), self.report)
        if not parts.all_packed:
            layer.dense_rows = dense_parts.DenseRows(parts)

    def _check_plain(self, layer: Any, parts: dense_parts.Parts) -> None:
        """Refuse dense weights that are not all there is to their parts.

        Raises:
            FormatError: they have scales, or the whole layer is dense and has a branch or outliers beside it.
        """
        quant = self.scheme.weight_quant
        beside = parts.all_dense and (self.scheme.low_rank is not None or self.scheme.outliers)
        if quant is not None:
            by_part = quant.scale is ScaleLayout.TENSOR
            beside |= bool(parts.scales(layer.weight_scale.data, by_part, dense=True).any())
        if beside:
            raise FormatError(
                f"{self.prefix}: the checkpoint stores a dense weight with scales, a low-rank branch or "
                "outliers beside it; a layer with those has to be 2:4. Convert the model again: "
                "vllm-sparse convert SRC DST"
            )

    def _serve_dense(self, layer: Any, parts: dense_parts.Parts) -> None:
        """Hand a layer that is stored dense as a whole to vLLM, and say so."""
        weight = parts.weight()
        self.report.fallback(self.prefix, "the checkpoint stores it dense", weight.nbytes)
        _drop_tensors(layer, *_BESIDE_THE_WEIGHT)
        layer.weight = Parameter(weight, requires_grad=False)
        layer.quant_method = UnquantizedLinearMethod()
        layer.quant_method.process_weights_after_loading(layer)

    def _report_dense(self, parts: dense_parts.Parts) -> None:
        for number, weight in enumerate(parts.dense):
            if weight is not None:
                name = self.names[number] if len(self.names) == len(parts.dense) else self.prefix
                self.report.dense_part(name, self.prefix, name in self.ignored, weight.nbytes)

    def _scale(self, layer: Any, parts: dense_parts.Parts) -> Tensor | None:
        quant = self.scheme.weight_quant
        if quant is None:
            return None
        scale = self._weight_scale(layer, quant, parts)
        if self.scheme.static_quant is not None:
            layer.input_scale.data = parts.scales(layer.input_scale.data, by_part=True)
            scale = scale * static_activations.finish(layer, self.prefix)
        return scale

    def _weight_scale(self, layer: Any, quant: WeightQuant, parts: dense_parts.Parts) -> Tensor:
        by_part = quant.scale is ScaleLayout.TENSOR
        scale = parts.scales(layer.weight_scale.data, by_part)
        if not bool(torch.isfinite(scale).all()) or not bool((scale > 0).all()):
            raise FormatError(
                f"{self.prefix}.weight_scale holds values that are not finite and positive, or was never "
                "loaded; the checkpoint is damaged or incomplete"
            )
        if not by_part:
            return scale
        widths = torch.tensor([parts.widths[i] for i in parts.numbers(dense=False)], device=scale.device)
        return scale.repeat_interleave(widths).unsqueeze(1)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """One op call, plus the dense parts, the low-rank branch and the outliers if the layer has them."""
        seen, static = x, self.scheme.static_quant
        if static is not None:
            seen = static_activations.quantize(x, layer.activation_scale, layer.activation_step, static)
        if hasattr(layer, "dense_rows"):
            out = layer.dense_rows(apply_packed(layer, seen, None), x)
            out = out if bias is None else out + bias
        else:
            out = apply_packed(layer, seen, bias)
        if self.scheme.low_rank is not None:
            out = low_rank.add(layer, out, x)
        if self.scheme.outliers and layer.outliers:
            out = (out.to(torch.float32) + outliers.apply(layer, x)).to(out.dtype)
        return out

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """A tied head shares the embedding's dense weight, whatever the config's targets say."""
        _drop_tensors(layer, *_BESIDE_THE_WEIGHT)
        self.report.pending -= 1
        layer.quant_method = head_method()
        return layer.quant_method.tie_weights(layer, embed_tokens)


@register_weight_loader_v2_supported_method
class DenseStored24LinearMethod(UnquantizedLinearMethod):
    """A dense ``weight`` tensor that is 2:4 in its values: packed after loading, else served dense."""

    supports_pre_processed_weights = False

    def __init__(self, prefix: str, report: LoadReport) -> None:
        super().__init__()
        self.prefix = prefix
        self.report = report

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        """As for an ordinary dense layer."""
        super().create_weights(layer, *args, **kwargs)
        self.report.created()

    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack if the data is 2:4, otherwise keep vLLM's dense path and report the fallback."""
        weight: Tensor = layer.weight.data
        if not sparse24.is_24(weight):
            reason = "its weights are not 2:4" if weight.shape[1] % 4 == 0 else "K is not a multiple of 4"
            self.report.fallback(self.prefix, reason, weight.nbytes)
            super().process_weights_after_loading(layer)
            return
        spec = LinearSpec(
            n=weight.shape[0],
            k=weight.shape[1],
            weight=WeightFormat.from_dtype(weight.dtype),
            activation_dtype=weight.dtype,
        )
        values, bitmask = sparse24.compress(weight)
        layer.weight = Parameter(torch.empty(0, dtype=weight.dtype), requires_grad=False)
        if hasattr(layer, "_use_min_latency_gemm"):
            layer._use_min_latency_gemm = False  # DeepSeek-V3's kernel for Hopper reads the dense weight
        del weight
        pack_into(layer, spec, CanonicalWeight(values, bitmask), self.report)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """One op call, or vLLM's dense GEMM for a layer that fell back."""
        if hasattr(layer, "weight_packed"):
            return apply_packed(layer, x, bias)
        return super().apply(layer, x, bias)


def _drop_tensors(layer: Any, *further: str) -> None:
    for name in ("compressed", "bitmask", "shape", "weight_scale", *further):
        if hasattr(layer, name):
            delattr(layer, name)


def _fill_vocabulary_padding(layer: Any, bitmask: Tensor) -> None:
    """VLLM pads a head's vocabulary with zero rows; give those a legal mask over their zero values."""
    indices = getattr(layer, "shard_indices", None)
    if indices is not None:
        bitmask[indices.num_org_elements :] = LEGAL_BYTE


def _scale_parameter(quant: WeightQuant, parts: list[int], k: int, loader: Any) -> BasevLLMParameter:
    if quant.scale is ScaleLayout.TENSOR:
        return PartScalesParameter(data=torch.zeros(len(parts), dtype=torch.float32), weight_loader=loader)
    if quant.group_size is not None:
        data = torch.zeros(sum(parts), k // quant.group_size, dtype=torch.float32)
        return GroupQuantScaleParameter(data=data, input_dim=1, output_dim=0, weight_loader=loader)
    data = torch.zeros(sum(parts), 1, dtype=torch.float32)
    return ChannelQuantScaleParameter(data=data, output_dim=0, weight_loader=loader)
