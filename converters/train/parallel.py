"""Several processes of one ``torchrun``: parameters, gradients and optimiser states sharded by FSDP2.

Every parameter is cut along its rows, so each process holds whole rows: groups of 4 along the input, and with
them 2:4 masks, are never split, and a mask computed from a shard is the shard of the mask. Masks live
beside their weights as DTensors of the same placement. Batches are cut along sequences.

Without ``torchrun`` every function here is the identity of one process.
"""

import os
from collections.abc import Iterable
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from converters.launch import launched_size
from converters.train import failure
from converters.train.recipes import OptimiserRecipe
from vllm_sparse.errors import FormatError, UnsupportedError

_MASK = "mask"
_mesh: DeviceMesh | None = None


def size() -> int:
    """Processes that train together; 1 before :func:`join` and after :func:`leave`."""
    return dist.get_world_size() if _mesh is not None else 1


def rank() -> int:
    """This process among them."""
    return dist.get_rank() if _mesh is not None else 0


def is_main() -> bool:
    """Whether this process writes files and talks to the user."""
    return rank() == 0


def join(device: torch.device) -> torch.device:
    """Meet the other processes of the launch; returns the device of this one.

    Raises:
        UnsupportedError: more processes than GPUs.
    """
    global _mesh
    if launched_size() == 1 or _mesh is not None:
        return device
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise UnsupportedError(
                f"process {local} of this machine has no GPU of its own ({torch.cuda.device_count()} found); "
                "lower --nproc-per-node"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    failure.watch()
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    _mesh = init_device_mesh(device.type, (launched_size(),))
    return device


def leave() -> None:
    """Part from the other processes, after all have come this far."""
    global _mesh
    if _mesh is not None:
        dist.barrier()
        failure.part()
        _mesh = None
        dist.destroy_process_group()


def finish_other_ranks() -> None:
    """Process 0 goes on alone; the others end here, successfully.

    Raises:
        SystemExit: on every process but the first.
    """
    main = is_main()
    leave()
    if not main:
        _end()


def _end() -> NoReturn:
    raise SystemExit(0)


def barrier() -> None:
    """Wait until all processes are here."""
    if _mesh is not None:
        dist.barrier()


def shard(model: nn.Module) -> None:
    """Cut a decoder's parameters over the processes, one communication group a layer; masks follow."""
    if _mesh is None:
        return
    from torch.distributed.fsdp import fully_shard

    decoder: Any = model
    for layer in decoder.model.layers:
        fully_shard(layer, mesh=_mesh)
    fully_shard(model, mesh=_mesh)
    for module in model.modules():
        mask = module._buffers.get(_MASK)
        weight = module._parameters.get("weight")
        if mask is not None and isinstance(weight, DTensor):
            module._buffers[_MASK] = like(mask, weight)


def local(tensor: Tensor) -> Tensor:
    """This process's rows of a sharded tensor; sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """All rows of a sharded tensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor that every process has whole, sharded as ``other`` is."""
    if not isinstance(other, DTensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.detach(), other.device_mesh, other.placements, src_data_rank=None)


def summed(tensor: Tensor) -> Tensor:
    """Sum over processes."""
    if _mesh is not None:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def largest(tensor: Tensor) -> Tensor:
    """Maximum over processes."""
    if _mesh is not None:
        tensor = tensor.clone()
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def average_gradient(parameter: nn.Parameter) -> None:
    """Replace the gradient of a parameter that every process has whole by its mean over processes."""
    if _mesh is not None and parameter.grad is not None:
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()


def averaged(values: Tensor) -> Tensor:
    """Mean over processes, float64 on the way and rounded to the values' own type."""
    if _mesh is None:
        return values
    wide = values.double()
    dist.all_reduce(wide)
    return (wide / dist.get_world_size()).to(values.dtype)


def own_part(batch: Tensor) -> Tensor:
    """This process's sequences of a batch ``[batch, sequence]``."""
    return batch.chunk(size())[rank()]


def check_batch(recipe: OptimiserRecipe) -> None:
    """Refuse a batch that processes and accumulation steps cannot share evenly.

    Raises:
        FormatError: it does not divide.
    """
    parts = size() * recipe.accumulation
    if size() > 1 and recipe.batch_size % parts:
        raise FormatError(
            f"optimiser.batch_size {recipe.batch_size} is not a multiple of {size()} processes times "
            f"accumulation {recipe.accumulation}; choose {-(-recipe.batch_size // parts) * parts}"
        )


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients so that their joint L2 norm is at most ``max_norm``; returns the norm before.

    Squares are summed in float64, so that the norm does not depend on how parameters are cut.
    """
    grads = [local(p.grad) for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros(())
    squares = [torch.linalg.vector_norm(g, dtype=torch.float64).square() for g in grads]
    norm = summed(torch.stack(squares).sum()).sqrt().float()
    torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def gather_into(plain: nn.Module, sharded: nn.Module) -> None:
    """Copy a sharded model's tensors into an ordinary one of the same structure, on process 0.

    The other processes end here; see :func:`finish_other_ranks`. On one process the models are the same one
    and nothing happens.
    """
    if _mesh is None:
        return
    state: dict[str, Any] = {}
    for name, tensor in sharded.state_dict().items():
        whole = full(tensor)
        if is_main():
            state[name] = whole.cpu()
    finish_other_ranks()
    plain.load_state_dict(state)
