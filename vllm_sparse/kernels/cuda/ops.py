"""The operator of the backend ``cuda``: the CUDA C++ kernel for every product that it takes.

Like the Triton backend's operator it waits for nothing and takes its memory from torch's allocator.
"""

from torch import Tensor

from vllm_sparse.kernels import operators
from vllm_sparse.kernels.cuda import configs
from vllm_sparse.kernels.triton import ops
from vllm_sparse.kernels.triton.configs import CUDA_ROUTES, Shape
from vllm_sparse.kernels.triton.tables import choose


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
        config = choose(shape, m, machine)
        if config.route not in CUDA_ROUTES:
            config = configs.default_config(shape, m, machine)
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
