"""2:4 experts of mixture-of-experts layers: loaded per expert, packed once, multiplied from packed form.

vLLM's own expert loader skips tensors whose names it does not know without a word, so these parameters bring
a loader of their own, and a layer that is not filled completely is an error after loading.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from vllm_sparse import sparse24
from vllm_sparse.errors import FormatError, UnsupportedError
from vllm_sparse.kernels.base import Backend, CanonicalWeight, LinearSpec, WeightFormat
from vllm_sparse.kernels.dispatch import select
from vllm_sparse.quantization.linear import values_dtype
from vllm_sparse.quantization.report import LoadReport
from vllm_sparse.quantization.scheme import SparseScheme

_ACTIVATIONS: dict[MoEActivation, Callable[[Tensor], Tensor]] = {
    MoEActivation.SILU: F.silu,
    MoEActivation.GELU: F.gelu,
    MoEActivation.GELU_TANH: partial(F.gelu, approximate="tanh"),
}


@dataclass(frozen=True)
class PackedExperts:
    """One projection of all experts of a layer: the same shape, packed by the same backend."""

    spec: LinearSpec
    backend: Backend
    packed: tuple[Tensor, ...]
    scales: tuple[Tensor | None, ...]

    def linear(self, expert: int, x: Tensor) -> Tensor:
        """``x [tokens, k]`` through one expert."""
        return self.backend.linear(self.spec, x, self.packed[expert], self.scales[expert], None)


@dataclass(frozen=True)
class ExpertLayer:
    """Both projections of a layer, and what stands between them."""

    gate_up: PackedExperts
    down: PackedExperts
    activation: MoEActivation

    def forward(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """Sum of the chosen experts' outputs, weighted, accumulated in float32.

        Args:
            x: ``[tokens, hidden]``.
            topk_weights: ``[tokens, top_k]``.
            topk_ids: ``[tokens, top_k]``, expert numbers.
        """
        act = _ACTIVATIONS[self.activation]
        top_k = topk_ids.shape[1]
        flat = topk_ids.flatten().long()
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=len(self.gate_up.packed)).tolist()
        weights = topk_weights.flatten().float()
        out = torch.zeros(x.shape[0], self.down.spec.n, dtype=torch.float32, device=x.device)
        start = 0
        for expert, count in enumerate(counts):
            if count == 0:
                continue
            chosen = order[start : start + count]
            start += count
            rows = chosen // top_k
            gate, up = self.gate_up.linear(expert, x[rows]).chunk(2, dim=-1)
            result = self.down.linear(expert, act(gate) * up)
            out.index_add_(0, rows, result.float() * weights[chosen].unsqueeze(1))
        return out.to(x.dtype)


# The operator finds a layer's weights by the layer's name, as vLLM's own MoE operator does.
_layers: dict[str, ExpertLayer] = {}


@cache
def _operator() -> Any:
    """The opaque operator that torch.compile sees; its body chooses experts by data."""

    @torch.library.custom_op("vllm_sparse::experts_24", mutates_args=())
    def experts_24(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, layer: str) -> Tensor:
        return _layers[layer].forward(x, topk_weights, topk_ids)

    @experts_24.register_fake
    def _(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, layer: str) -> Tensor:
        return torch.empty_like(x)

    return torch.ops.vllm_sparse.experts_24


class Sparse24ExpertsMethod(FusedMoEMethodBase):
    """``experts.E.{gate,up,down}_proj.{compressed,bitmask,weight_scale}`` of sparse-24-bitmask."""

    PROJECTIONS: ClassVar[tuple[str, ...]] = ("w13", "w2")

    def __init__(self, scheme: SparseScheme, layer: Any, prefix: str, report: LoadReport) -> None:
        super().__init__(layer.moe_config)
        self.scheme = scheme
        self.prefix = prefix
        self.report = report
        self._check(layer)

    def _check(self, layer: Any) -> None:
        if self.moe.moe_parallel_config.use_ep:
            raise UnsupportedError(
                f"{self.prefix}: 2:4 experts are split by tensor parallelism only; leave out "
                "--enable-expert-parallel"
            )
        if layer.activation not in _ACTIVATIONS or layer.apply_router_weight_on_input or self.moe.has_bias:
            raise UnsupportedError(
                f"{self.prefix}: 2:4 experts are served with a gated SiLU or GELU, without biases and with "
                f"router weights on the output; found activation {layer.activation.value}, bias "
                f"{self.moe.has_bias}, weights on input {layer.apply_router_weight_on_input}"
            )

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
        if width % 8 or hidden_size % 8:
            raise UnsupportedError(
                f"{self.prefix}: 2:4 experts need hidden and per-rank widths that are multiples of 8; "
                f"found {hidden_size} and {width}. Use a smaller --tensor-parallel-size."
            )
        layer.sparse_shapes = {"w13": (2 * width, hidden_size), "w2": (hidden_size, width)}
        layer.sparse_activation_dtype = params_dtype
        dtype = values_dtype(self.scheme.weight_quant, params_dtype)
        for name, (n, k) in layer.sparse_shapes.items():
            self._register(layer, f"{name}_compressed", torch.zeros(num_experts, n, k // 2, dtype=dtype))
            self._register(layer, f"{name}_bitmask", torch.zeros(num_experts, n, k // 8, dtype=torch.uint8))
            self._register(layer, f"{name}_shape", torch.zeros(num_experts, 2, 1, dtype=torch.int64))
            if self.scheme.weight_quant is not None:
                self._register(layer, f"{name}_weight_scale", torch.zeros(num_experts, n, 1))
        self.report.created()

    def _register(self, layer: Any, name: str, data: Tensor) -> None:
        parameter = Parameter(data, requires_grad=False)
        parameter.weight_loader = partial(_load_expert, layer)  # type: ignore[attr-defined]
        layer.register_parameter(name, parameter)

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: vLLM's fused kernels are not used."""
        return

    def process_weights_after_loading(self, layer: Any) -> None:
        """Validate and pack expert by expert; the on-disk form of a projection goes before the next comes.

        Raises:
            FormatError: an expert is missing or not 2:4; names layer and expert.
        """
        gate_up, down = (self._pack(layer, name) for name in self.PROJECTIONS)
        _layers[self.prefix] = ExpertLayer(gate_up, down, layer.activation)
        _operator()

    def _pack(self, layer: Any, name: str) -> PackedExperts:
        n, k = layer.sparse_shapes[name]
        values, bitmask = getattr(layer, f"{name}_compressed").data, getattr(layer, f"{name}_bitmask").data
        scale = getattr(layer, f"{name}_weight_scale", None)
        spec = LinearSpec(
            n,
            k,
            WeightFormat.from_dtype(values.dtype),
            layer.sparse_activation_dtype,
            self.scheme.activation_quant,
        )
        selection = select(spec, values.device)
        packed = []
        for expert in range(values.shape[0]):
            self._validate(values[expert], bitmask[expert], name, expert)
            channel = None if scale is None else scale.data[expert]
            weight = CanonicalWeight(values[expert].contiguous(), bitmask[expert].contiguous(), channel)
            packed.append(selection.backend.pack(spec, weight))
        for suffix in ("compressed", "bitmask", "shape", "weight_scale"):
            if hasattr(layer, f"{name}_{suffix}"):
                delattr(layer, f"{name}_{suffix}")
        resident = sum(p.packed.nbytes + (0 if p.scale is None else p.scale.nbytes) for p in packed)
        self.report.experts(
            spec, selection.backend.name, len(packed), resident, last=name == self.PROJECTIONS[-1]
        )
        return PackedExperts(
            spec, selection.backend, tuple(p.packed for p in packed), tuple(p.scale for p in packed)
        )

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
        return torch.ops.vllm_sparse.experts_24(x, topk_weights, topk_ids, self.prefix)


def _load_expert(
    layer: Any,
    param: Parameter,
    loaded_weight: Tensor,
    weight_name: str,
    shard_id: str,
    expert_id: int,
    return_success: bool = False,
) -> bool | None:
    """Copy this rank's slice of one expert's tensor; gate and up are rows, down is columns."""
    if "shape" not in weight_name:
        rank, size = (
            layer.moe_config.moe_parallel_config.tp_rank,
            layer.moe_config.moe_parallel_config.tp_size,
        )
        target = param.data[expert_id]
        if shard_id == "w2":
            is_scale = "weight_scale" in weight_name
            part = loaded_weight if is_scale else loaded_weight.chunk(size, dim=1)[rank]
        else:
            half = target.shape[0] // 2
            target = target[:half] if shard_id == "w1" else target[half:]
            part = loaded_weight.chunk(size, dim=0)[rank]
        if part.shape != target.shape:
            raise FormatError(
                f"{weight_name}, expert {expert_id}: this rank's share is {list(part.shape)}, the model "
                f"expects {list(target.shape)}; checkpoint and config.json disagree"
            )
        target.copy_(part)
    return True if return_success else None
