"""The operator of the backend ``cuda``: the CUDA C++ kernel for every product that it takes.

Like the Triton backend's operator it waits for nothing and takes its memory from torch's allocator.
"""

import logging
from functools import cache

from torch import Tensor

from vllm_sparse.kernels import operators
from vllm_sparse.kernels.cuda import configs, mma_sp
from vllm_sparse.kernels.triton import ops
from vllm_sparse.kernels.triton.configs import CUDA_ROUTES, Config, Machine, Shape
from vllm_sparse.kernels.triton.layout import Layout
from vllm_sparse.kernels.triton.tables import choose

logger = logging.getLogger(__name__)


def _choose(shape: Shape, m: int, group: int, machine: Machine) -> Config:
    """What a table or the rule says, if this machine runs it; else the rule's configuration.

    A table that was named may be another GPU's. A kernel that this GPU has not would write nothing.
    """
    config = choose(shape, m, machine)
    if config.route in CUDA_ROUTES:
        reason = mma_sp.unsupported_reason(Layout(shape.n, shape.k, shape.weight), group, config, machine)
        if reason is None:
            return config
        _say_once(f"a table's configuration is not used on {machine.name}: {reason}")
    return configs.default_config(shape, m, machine)


@cache
def _say_once(text: str) -> None:
    logger.warning("%s. The rule's serves instead.", text)


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
    m = x.numel() // k
    config = None
    machine = ops.machine_of(x.get_device() if x.is_cuda else -1)
    if configs.takes(m, machine):
        shape = Shape(ops.FORMAT_OF_NUMBER[weight], n, k, quant != ops.NO_QUANT)
        config = _choose(shape, m, group, machine)
    return ops.linear(x, packed, scale, bias, n, k, weight, group, quant, config)


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
    "linear_24_cuda(Tensor x, Tensor packed, Tensor? scale, Tensor? bias, int n, int k, int weight, "
    "int group, int quant) -> Tensor",
    _linear_op,
    _linear_fake,
)
