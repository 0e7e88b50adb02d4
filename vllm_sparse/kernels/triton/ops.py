"""Launching the kernels, and the operator that torch.compile and CUDA graphs see.

Nothing here waits for the device: sizes, strides and configurations are host facts, scratch memory comes from
torch's caching allocator (which captures into a graph's pool), and a kernel is compiled at its first launch,
that is in the warm-up that precedes every capture.
"""

import logging
from functools import cache

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from vllm_sparse.errors import UnsupportedError
from vllm_sparse.kernels import operators
from vllm_sparse.kernels.cuda import mma_sp
from vllm_sparse.kernels.triton import decode
from vllm_sparse.kernels.triton.configs import CUDA_ROUTES, Config, Machine, Route, Shape, default_config
from vllm_sparse.kernels.triton.dot_kernel import dot_24
from vllm_sparse.kernels.triton.layout import FORMAT_NUMBER, VALUE_DTYPE, Layout
from vllm_sparse.kernels.triton.select_kernel import select_24
from vllm_sparse.kernels.triton.side_kernels import expand_24, quantize_tokens, sum_splits_24
from vllm_sparse.kernels.triton.tables import choose

logger = logging.getLogger(__name__)

FORMAT_OF_NUMBER = {number: weight for weight, number in FORMAT_NUMBER.items()}
_ACTIVATIONS = (torch.bfloat16, torch.float16)
# Activation quantisation as the operator takes it.
NO_QUANT, INT8_TOKENS, FP8_TOKENS = 0, 1, 2
# Dense scratch of the expand route: the matrix is expanded and multiplied in strips of rows of this size.
_SCRATCH_BYTES = 64 << 20
_ALIGNED_BYTES = 16
# Fused multiply-adds are what the kernels are written for; Triton asks for the choice to be stated.
_FUSION = {"enable_fp_fusion": True}


@cache
def machine_of(index: int) -> Machine:
    """Facts about CUDA device ``index``; -1 is the interpreter."""
    if index < 0:
        return Machine("interpreter", (0, 0), 1, 1 << 30)
    facts = torch.cuda.get_device_properties(index)
    return Machine(
        facts.name,
        (facts.major, facts.minor),
        facts.multi_processor_count,
        facts.shared_memory_per_block_optin,  # type: ignore[attr-defined]
    )


def _device_index(tensor: Tensor) -> int:
    return tensor.get_device() if tensor.is_cuda else -1


class Call:
    """One product ``x @ W.T``: operands, and what the kernels want to know about them.

    Raises:
        UnsupportedError: ``x`` is of a dtype that the kernels would read as another.
    """

    def __init__(
        self, x: Tensor, packed: Tensor, scale: Tensor | None, bias: Tensor | None, layout: Layout, group: int
    ) -> None:
        stored = VALUE_DTYPE[layout.weight]
        taken = (stored,) if stored in _ACTIVATIONS else _ACTIVATIONS
        if x.dtype not in taken:
            raise UnsupportedError(
                f"a 2:4 layer with {layout.weight.value} weights was given {x.dtype} activations; it takes "
                f"{' or '.join(map(str, taken))}"
            )
        self.layout = layout
        self.packed = packed
        self.scale = scale
        self.bias = bias
        self.group = group
        self.x = x
        self.dtype = x.dtype
        self.token_scale: Tensor | None = None
        if scale is None:
            self.scales = decode.NO_SCALE.value
        else:
            self.scales = decode.PER_GROUP.value if group else decode.PER_CHANNEL.value

    @property
    def m(self) -> int:
        """Tokens."""
        return self.x.shape[0]

    def quantize(self, fp8: bool, eight_bits: bool = False) -> None:
        """Replace ``x`` by quantised numbers, in 8 bits or in its dtype, and one scale per token."""
        m, k = self.x.shape
        stored = self.dtype if not eight_bits else torch.float8_e4m3fn if fp8 else torch.int8
        quantized = torch.empty(m, _round_up(k, _ALIGNED_BYTES), dtype=stored, device=self.x.device)[:, :k]
        self.token_scale = torch.empty(m, dtype=torch.float32, device=self.x.device)
        quantize_tokens[(m,)](
            self.x,
            quantized,
            self.token_scale,
            k,
            self.x.stride(0),
            quantized.stride(0),
            FP8=fp8,
            BLOCK=1024,
            **_FUSION,
        )
        self.x = quantized

    def align(self) -> None:
        """Have the rows of ``x`` start 16-byte aligned, as the copies of ``wgmma_sp_tma`` want them."""
        m, k = self.x.shape
        if self.x.stride(0) * self.x.element_size() % _ALIGNED_BYTES or self.x.data_ptr() % _ALIGNED_BYTES:
            wide = torch.empty(m, _round_up(k, _ALIGNED_BYTES), dtype=self.x.dtype, device=self.x.device)
            self.x = wide[:, :k].copy_(self.x)

    def run(self, config: Config) -> Tensor:
        """The product ``[m, n]`` in the dtype of ``x``."""
        if config.route is Route.EXPAND and self.token_scale is None:
            return self._expand_and_multiply()
        y = torch.empty(self.m, self.layout.n, dtype=self.dtype, device=self.x.device)
        if config.route is Route.EXPAND:
            # Quantised activations need float32 sums before their scale; the dot kernel keeps them.
            config = Config(Route.DOT, 64, 64, 1, 4, 2)
        if config.split_k == 1 or config.cluster:
            self._launch(config, y)
            return y
        partial = torch.empty(
            config.split_k, self.m, self.layout.n, dtype=torch.float32, device=self.x.device
        )
        self._launch(config, partial)
        block = 256
        sum_splits_24[(triton.cdiv(self.layout.n, block), self.m)](
            partial,
            self.scale,
            self.token_scale,
            self.bias,
            y,
            self.m,
            self.layout.n,
            FORMAT=FORMAT_NUMBER[self.layout.weight],
            SCALES=self.scales,
            TOKEN_SCALES=self.token_scale is not None,
            BIAS=self.bias is not None,
            SPLIT_K=config.split_k,
            BLOCK_N=block,
            **_FUSION,
        )
        return y

    def _launch(self, config: Config, y: Tensor) -> None:
        if config.route in CUDA_ROUTES:
            if config.route is Route.WGMMA_SP_TMA:
                self.align()
            mma_sp.launch(self, config, y)
            return
        strips = triton.cdiv(self.layout.n, config.block_n)
        arguments = (
            self.x,
            self.packed,
            self.scale,
            self.token_scale,
            self.bias,
            y,
            self.m,
            self.layout.n,
            self.layout.k,
            self.x.stride(0),
            self.layout.k_blocks,
            self.layout.value_bytes,
            triton.cdiv(self.layout.k_blocks, config.split_k),
        )
        constants = {
            "FORMAT": FORMAT_NUMBER[self.layout.weight],
            "SCALES": self.scales,
            "GROUP": self.group,
            "TOKEN_SCALES": self.token_scale is not None,
            "BIAS": self.bias is not None,
            "TOKENS": config.tokens,
            "BLOCK_N": config.block_n,
            "PARTIAL": config.split_k > 1,
            "STAGES": config.stages,
            "num_warps": config.warps,
            **_FUSION,
        }
        if config.route is Route.SELECT:
            constants |= {"HALF": self.x.dtype == torch.float16, "EXPERTS": False}
            select_24[(strips, config.split_k)](*arguments, None, 1, 0, 0, **constants)
        else:
            tokens = triton.cdiv(self.m, config.tokens)
            dot_24[(strips, tokens, config.split_k)](*arguments, **constants)

    def _expand_and_multiply(self) -> Tensor:
        n, k = self.layout.n, self.layout.k
        strip = min(n, max(_SCRATCH_BYTES // (2 * k) // 128 * 128, 128))
        scratch = torch.empty(strip, k, dtype=self.x.dtype, device=self.x.device)
        if strip == n:
            expand_into(scratch, self.layout, self.packed, self.scale, self.group, 0)
            return F.linear(self.x, scratch, self.bias)
        y = torch.empty(self.m, n, dtype=self.x.dtype, device=self.x.device)
        for start in range(0, n, strip):
            stop = min(start + strip, n)
            dense = scratch[: stop - start]
            expand_into(dense, self.layout, self.packed, self.scale, self.group, start)
            if self.bias is None:
                torch.mm(self.x, dense.t(), out=y[:, start:stop])
            else:
                # Only into a contiguous result does torch pass the bias to cuBLASLt, as for a dense layer.
                y[:, start:stop] = F.linear(self.x, dense, self.bias[start:stop])
        return y


def expand_into(
    dense: Tensor, layout: Layout, packed: Tensor, scale: Tensor | None, group: int, first_row: int
) -> None:
    """Fill ``dense [rows, k]`` with the (dequantised) weight from row ``first_row`` on."""
    block_n = 16
    scales = decode.NO_SCALE if scale is None else decode.PER_GROUP if group else decode.PER_CHANNEL
    expand_24[(triton.cdiv(dense.shape[0], block_n), layout.k_blocks)](
        packed,
        scale,
        dense,
        first_row,
        min(layout.n, first_row + dense.shape[0]),
        layout.k,
        layout.k_blocks,
        layout.value_bytes,
        FORMAT=FORMAT_NUMBER[layout.weight],
        SCALES=scales.value,
        GROUP=group,
        BLOCK_N=block_n,
        **_FUSION,
    )


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def rows_for_kernels(x: Tensor, k: int) -> Tensor:
    """``x`` as a matrix whose rows are contiguous and start 8-byte aligned; a view wherever possible."""
    rows = x.reshape(-1, k)
    if rows.stride(1) != 1 or rows.stride(0) % 4 or rows.data_ptr() % 8:
        return rows.clone(memory_format=torch.contiguous_format)
    return rows


def _choose(call: Call, quantized: bool, machine: Machine) -> Config:
    """What a table or the rule says; Triton's rule where their CUDA C++ kernel is not to be had."""
    shape = Shape(call.layout.weight, call.layout.n, call.layout.k, quantized)
    config = choose(shape, call.m, machine)
    if config.route in CUDA_ROUTES:
        reason = mma_sp.unsupported_reason(call.layout, call.group, config, machine)
        if reason is not None:
            _say_once(f"the CUDA C++ kernels are not used on {machine.name}: {reason}")
            return default_config(shape, call.m, machine)
    return config


@cache
def _say_once(text: str) -> None:
    logger.warning("%s. Triton's kernels serve instead.", text)


def linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    n: int,
    k: int,
    weight: int,
    group: int,
    quant: int,
    config: Config | None = None,
) -> Tensor:
    """The operator's body; ``config`` overrides the choice (tuning and tests)."""
    layout = Layout(n, k, FORMAT_OF_NUMBER[weight])
    rows = rows_for_kernels(x, k)
    if rows.shape[0] == 0:
        return x.new_empty([*x.shape[:-1], n])
    call = Call(rows, packed, scale, None if bias is None else bias.contiguous(), layout, group)
    if config is None:
        config = _choose(call, quant != NO_QUANT, machine_of(_device_index(x)))
    if quant != NO_QUANT:
        fp8 = quant == FP8_TOKENS
        call.quantize(fp8, eight_bits=mma_sp.takes_eight_bits(config, layout.weight, fp8))
    return call.run(config).view(*x.shape[:-1], n)


def _linear_op(
    x: Tensor,
    packed: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    n: int,
    k: int,
    weight: int,
    group: int,
    quant: int,
) -> Tensor:
    return linear(x, packed, scale, bias, n, k, weight, group, quant)


def _linear_fake(
    x: Tensor,
    packed: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    n: int,
    k: int,
    weight: int,
    group: int,
    quant: int,
) -> Tensor:
    return x.new_empty([*x.shape[:-1], n])


operators.define(
    "linear_24_triton(Tensor x, Tensor packed, Tensor? scale, Tensor? bias, int n, int k, int weight, "
    "int group, int quant) -> Tensor",
    _linear_op,
    _linear_fake,
)
