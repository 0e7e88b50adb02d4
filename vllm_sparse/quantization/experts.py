"""2:4 experts of mixture-of-experts layers: loaded per expert, packed once, multiplied from packed form.

vLLM's own expert loader skips tensors whose names it does not know without a word, so every name is checked
before it gets there, these parameters bring a loader of their own, and a layer that is not filled completely
is an error after loading.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from vllm_sparse import sparse24
from vllm_sparse.errors import FormatError, UnsupportedError
from vllm_sparse.kernels.base import CanonicalWeight, LinearSpec, WeightFormat
from vllm_sparse.kernels.dispatch import Selection, select
from vllm_sparse.quantization import static_activations
from vllm_sparse.quantization.expert_layer import (
    ACTIVATIONS,
    ExpertLayer,
    PackedExperts,
    StaticScale,
    define_operator,
    run,
)
from vllm_sparse.quantization.linear import (
    StoredShapes,
    check_stored_dtype,
    copy_shape,
    unpack_int4,
    values_dtype,
)
from vllm_sparse.quantization.loaders import set_dummy_value
from vllm_sparse.quantization.report import LoadReport
from vllm_sparse.quantization.scheme import INT8_ROWS, SparseScheme

PROJECTIONS = ("w13", "w2")
Weights = Iterable[tuple[str, Tensor]]


def unservable_reason(layer: Any) -> str | None:
    """Why a layer's experts cannot run from packed weights; None if they can."""
    moe = layer.moe_config
    if moe.moe_parallel_config.use_all2all_kernels:
        return "2:4 experts are not exchanged between data-parallel ranks; use tensor or expert parallelism"
    clamped = getattr(layer, "swiglu_limit", None) is not None
    if layer.activation not in ACTIVATIONS or layer.apply_router_weight_on_input or moe.has_bias or clamped:
        return (
            "2:4 experts are served with a gated SiLU or GELU, without biases or clamps and with router "
            f"weights on the output; found activation {layer.activation.value}, bias {moe.has_bias}, "
            f"clamp {clamped}, weights on input {layer.apply_router_weight_on_input}"
        )
    return None


def apply_experts(layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
    """The packed experts' contribution; with expert parallelism that of this rank's experts."""
    experts = layer.expert_map
    ids = topk_ids if experts is None else experts[topk_ids.long()]
    return run(layer.layer_name, x, topk_weights, ids)


def serve_packed(layer: Any, gate_up: PackedExperts, down: PackedExperts, report: LoadReport) -> None:
    """Serve a layer from its packed experts, and say how."""
    layer.sparse_experts = ExpertLayer(gate_up, down, layer.activation)
    report.experts_path(gate_up.spec, gate_up.backend.name, layer.sparse_experts.describe())
    define_operator()


class ExpertStack:
    """Packs experts one after the other into one tensor for all of them."""

    def __init__(self, spec: LinearSpec, device: torch.device, count: int) -> None:
        self.spec = spec
        self.count = count
        self.selection: Selection = select(spec, device)
        self.packed: Tensor | None = None
        self.scales: Tensor | None = None

    def add(self, expert: int, weight: CanonicalWeight) -> None:
        """Pack expert number ``expert``."""
        backend = self.selection.backend
        item = backend.pack(self.spec, weight)
        if self.packed is None:
            self.packed = backend.empty_stack(item.packed, self.count)
            if item.scale is not None:
                self.scales = item.scale.new_empty((self.count, *item.scale.shape))
        self.packed[expert] = item.packed
        if self.scales is not None and item.scale is not None:
            self.scales[expert] = item.scale

    def finish(
        self, layer: Any, name: str, report: LoadReport, static: StaticScale | None = None
    ) -> PackedExperts:
        """The projection, its tensors kept by ``layer``, reported."""
        packed = self.packed if self.packed is not None else torch.empty(0, 0, dtype=torch.uint8)
        resident = packed.nbytes + (0 if self.scales is None else self.scales.nbytes)
        backend = self.selection.backend
        backend.settle_stack(packed)
        last = name == PROJECTIONS[-1]
        report.experts(self.spec, backend.name, self.count, resident, self.selection.rejected, last)
        return PackedExperts(layer, name, self.spec, backend, static).keep(packed, self.scales)


class Sparse24ExpertsMethod(FusedMoEMethodBase):
    """``experts.E.{gate,up,down}_proj.{compressed,bitmask,weight_scale}`` of sparse-24-bitmask.

    Raises:
        UnsupportedError: the layer computes something that packed experts do not.
    """

    def __init__(self, scheme: SparseScheme, layer: Any, prefix: str, report: LoadReport) -> None:
        super().__init__(layer.moe_config)
        self.scheme = scheme
        self.prefix = prefix
        self.report = report
        self._shapes = StoredShapes()
        quant = scheme.weight_quant
        # Dense columns for each stored number; int4 keeps two numbers in a byte.
        self._columns = 4 if quant is not None and quant.format is WeightFormat.INT4 else 2
        reason = unservable_reason(layer)
        if reason is not None:
            raise UnsupportedError(f"{prefix}: {reason}")

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register this rank's share of every expert's on-disk tensors.

        Raises:
            UnsupportedError: an expert's width does not split into whole bitmask bytes.
        """
        width = intermediate_size_per_partition
        self._check_split(layer, width, hidden_size)
        quant = self.scheme.weight_quant
        layer.sparse_shapes = {"w13": (2 * width, hidden_size), "w2": (hidden_size, width)}
        layer.sparse_activation_dtype = params_dtype
        dtype = values_dtype(quant, params_dtype)
        for name, (n, k) in layer.sparse_shapes.items():
            self._register(
                layer, f"{name}_compressed", torch.zeros(num_experts, n, k // self._columns, dtype=dtype)
            )
            self._register(layer, f"{name}_bitmask", torch.zeros(num_experts, n, k // 8, dtype=torch.uint8))
            parts = 2 if name == "w13" else 1
            self._register(layer, f"{name}_shape", torch.zeros(num_experts, parts, 2, dtype=torch.int64))
            if quant is not None:
                groups = 1 if quant.group_size is None else k // quant.group_size
                scale = torch.zeros(num_experts, n, groups, dtype=torch.float32)
                self._register(layer, f"{name}_weight_scale", scale)
            if self.scheme.static_quant is not None:
                scale = torch.zeros(num_experts, parts, dtype=torch.float32)
                self._register(layer, f"{name}_input_scale", scale)
        layer.load_weights = partial(_load_checked, layer, self._suffixes(), layer.load_weights)
        self.report.created()

    def _check_split(self, layer: Any, width: int, hidden: int) -> None:
        whole = layer.moe_config.intermediate_size
        ranks = layer.moe_config.moe_parallel_config.tp_size
        quant = self.scheme.weight_quant
        unit = math.lcm(8, quant.group_size if quant is not None and quant.group_size else 1)
        if width % unit or hidden % unit or width * ranks != whole:
            raise UnsupportedError(
                f"{self.prefix}: 2:4 experts need hidden and per-rank widths that are multiples of {unit} "
                f"(bitmask bytes and scale groups stay whole); the hidden width is {hidden}, the experts' "
                f"width {whole} over {ranks} tensor-parallel rank(s) is {whole / ranks:g} each. Use a "
                f"--tensor-parallel-size that divides {whole // unit}, or --enable-expert-parallel."
            )

    def _suffixes(self) -> frozenset[str]:
        names = {"compressed", "bitmask", "shape"}
        if self.scheme.weight_quant is not None:
            names.add("weight_scale")
        if self.scheme.static_quant is not None:
            names.add(static_activations.TENSOR)
        return frozenset(names)

    def _register(self, layer: Any, name: str, data: Tensor) -> None:
        def load(layer: Any, param: Parameter, *loaded: Any, **named: Any) -> bool | None:
            return self._load_expert(layer, param, *loaded, **named)

        parameter = Parameter(data, requires_grad=False)
        # A method of the layer, as vLLM wants it for reloads: see `loaders`.
        parameter.weight_loader = MethodType(load, layer)  # type: ignore[attr-defined]
        set_dummy_value(parameter, name.partition("_")[2])
        layer.register_parameter(name, parameter)

    def _load_expert(
        self,
        layer: Any,
        param: Parameter,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """Copy this rank's slice of one expert's tensor; gate and up are rows, down is columns."""
        local = layer._map_global_expert_id_to_local_expert_id(expert_id)
        suffix = weight_name.rpartition(".")[2].partition("_")[2]
        where, place = f"{self.prefix}, expert {expert_id}, {shard_id}", (expert_id, shard_id)
        if suffix == "shape":
            self._shapes.declared(where, place, loaded_weight)
            if local >= 0:
                copy_shape(param.data[local, 1 if shard_id == "w3" else 0], loaded_weight)
        elif local >= 0:
            if suffix == "compressed":
                check_stored_dtype(where, loaded_weight.dtype, self.scheme.weight_quant)
                self._shapes.stored(where, place, loaded_weight, self._columns)
            target = _rows_of_part(param.data[local], shard_id)
            part = _rank_share(layer, loaded_weight, suffix, shard_id)
            if part.shape != target.shape and part.numel() != 1:
                raise FormatError(
                    f"{self.prefix}, expert {expert_id}, {weight_name}: this rank's share is "
                    f"{list(part.shape)}, the model expects {list(target.shape)}; checkpoint and config.json "
                    "disagree"
                )
            target.copy_(part.expand_as(target))
        return True if return_success else None

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: vLLM's fused kernels are not used."""
        return

    def process_weights_after_loading(self, layer: Any) -> None:
        """Validate and pack expert by expert; the on-disk form of a projection goes before the next comes.

        Raises:
            FormatError: an expert is missing or not 2:4; names layer and expert.
        """
        gate_up, down = (self._pack(layer, name) for name in PROJECTIONS)
        serve_packed(layer, gate_up, down, self.report)

    def _pack(self, layer: Any, name: str) -> PackedExperts:
        n, k = layer.sparse_shapes[name]
        values, bitmask = getattr(layer, f"{name}_compressed").data, getattr(layer, f"{name}_bitmask").data
        scale, static = self._scales(layer, name)
        quant = self.scheme.weight_quant
        int4 = quant is not None and quant.format is WeightFormat.INT4
        whole_rows = name == PROJECTIONS[0] or layer.moe_config.moe_parallel_config.tp_size == 1
        if whole_rows and quant == INT8_ROWS:
            self.report.int8_values(values.flatten(0, 1))
        spec = LinearSpec(
            n,
            k,
            WeightFormat.from_dtype(values.dtype) if quant is None else quant.format,
            layer.sparse_activation_dtype,
            self.scheme.activation_quant,
            None if quant is None else quant.group_size,
        )
        stack = ExpertStack(spec, values.device, values.shape[0])
        for expert in range(values.shape[0]):
            kept = unpack_int4(values[expert]) if int4 else values[expert].contiguous()
            self._validate(kept, bitmask[expert], name, expert)
            one = None if scale is None else scale[expert]
            stack.add(expert, CanonicalWeight(kept, bitmask[expert].contiguous(), one))
        for suffix in self._suffixes():
            delattr(layer, f"{name}_{suffix}")
        return stack.finish(layer, name, self.report, static)

    def _scales(self, layer: Any, name: str) -> tuple[Tensor | None, StaticScale | None]:
        """Weight scales ``[experts, n, groups]`` and the input's fixed scale, the largest of all experts'."""
        if self.scheme.weight_quant is None:
            return None, None
        scale: Tensor = getattr(layer, f"{name}_weight_scale").data
        good = (torch.isfinite(scale) & (scale > 0)).flatten(1).all(1)
        if not bool(good.all()):
            expert = int((~good).nonzero()[0])
            raise FormatError(
                f"{self.prefix}, expert {expert}, {name}: weight_scale holds values that are not finite and "
                "positive, or was never loaded; the checkpoint is damaged or incomplete"
            )
        quant = self.scheme.static_quant
        if quant is None:
            return scale, None
        where = f"{self.prefix}, {name}: {static_activations.TENSOR}"
        largest, step = static_activations.split_scale(getattr(layer, f"{name}_input_scale").data, where)
        return scale * (largest / step), StaticScale(largest, step, quant)

    def _validate(self, values: Tensor, bitmask: Tensor, name: str, expert: int) -> None:
        try:
            sparse24.validate_bitmask(values, bitmask)
        except FormatError as error:
            missing = "" if bool(bitmask.any()) else " (the checkpoint has no bitmask for it)"
            raise FormatError(f"{self.prefix}, expert {expert}, {name}: {error}{missing}") from error

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """One operator call; shared experts are run by vLLM's runner."""
        return apply_experts(layer, x, topk_weights, topk_ids)


def check_servable_scheme(scheme: SparseScheme, prefix: str) -> None:
    """Refuse what single experts cannot have.

    Raises:
        UnsupportedError: low-rank branches or outliers.
    """
    if scheme.low_rank is not None or scheme.outliers:
        raise UnsupportedError(
            f"{prefix}: 2:4 experts are served without low-rank branches and outliers, which are for other "
            "linears. Put the experts on the ignore list and store them dense, or convert without those."
        )


def _load_checked(
    layer: Any, suffixes: frozenset[str], load: Callable[[Weights], Iterable[str]], weights: Weights
) -> Iterable[str]:
    yield from load(_checked_names(layer, suffixes, weights))


def _checked_names(layer: Any, suffixes: frozenset[str], weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """Pass on what vLLM's loader will take, and refuse what it would drop silently.

    Raises:
        FormatError: names the tensor and what is expected.
    """
    projections = {layer.ckpt_gate_proj_name, layer.ckpt_down_proj_name, layer.ckpt_up_proj_name}
    count = layer.moe_config.num_logical_experts
    for name, weight in weights:
        expert, _, rest = name.partition(".")
        projection, _, suffix = rest.partition(".")
        known = expert.isdecimal() and projection in projections and suffix in suffixes
        if not known or int(expert) >= count:
            raise FormatError(
                f"{layer.layer_name}.{name} is in the checkpoint, but has no place in this model: expected "
                f"<expert>.<projection>.<tensor> with expert below {count}, projection one of "
                f"{', '.join(sorted(projections))}, tensor one of {', '.join(sorted(suffixes))}. Checkpoint "
                "and config.json disagree."
            )
        yield name, weight


def _rows_of_part(target: Tensor, shard_id: str) -> Tensor:
    """The half of gate-and-up that belongs to one of them; all of down."""
    if shard_id == "w2":
        return target
    half = target.shape[0] // 2
    return target[:half] if shard_id == "w1" else target[half:]


def _rank_share(layer: Any, loaded: Tensor, suffix: str, shard_id: str) -> Tensor:
    parallel = layer.moe_config.moe_parallel_config
    if loaded.numel() == 1:
        return loaded.reshape(())
    if shard_id != "w2":
        return loaded.chunk(parallel.tp_size, dim=0)[parallel.tp_rank]
    # Scales per output channel serve every rank; those of groups of columns go where their columns go.
    if suffix == "weight_scale" and loaded.shape[-1] == 1:
        return loaded
    return loaded.chunk(parallel.tp_size, dim=1)[parallel.tp_rank]
