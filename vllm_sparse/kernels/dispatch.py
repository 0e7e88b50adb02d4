"""Choosing a backend for a layer, and remembering what was chosen.

The order of preference is fixed per device; ``VLLM_SPARSE_BACKEND`` forces one backend instead. Nothing is
chosen silently: a :class:`Selection` carries the reason for every backend that was passed over.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from vllm_sparse.errors import UnsupportedError
from vllm_sparse.kernels.base import Backend, LinearSpec

logger = logging.getLogger(__name__)

ENV_BACKEND = "VLLM_SPARSE_BACKEND"


def _reference() -> Backend:
    from vllm_sparse.kernels.reference import ReferenceBackend

    return ReferenceBackend()


def _cpu() -> Backend:
    from vllm_sparse.kernels.cpu import CpuBackend

    return CpuBackend()


def _triton() -> Backend:
    from vllm_sparse.kernels.triton.backend import TritonBackend

    return TritonBackend()


def _cuda() -> Backend:
    from vllm_sparse.kernels.cuda.backend import CudaBackend

    return CudaBackend()


def _cusparselt() -> Backend:
    from vllm_sparse.kernels.cusparselt import CusparseltBackend

    return CusparseltBackend()


_LOADERS: dict[str, Callable[[], Backend]] = {
    "cpu": _cpu,
    "triton": _triton,
    "cuda": _cuda,
    "cusparselt": _cusparselt,
    "reference": _reference,
}
# In order of preference; the reference backend comes last and takes whatever is left. On GPUs decode counts
# most, where the Triton kernels read the fewest bytes. cuSPARSELt serves where it is asked for by name; so
# does "cuda", whose kernel the Triton backend takes by itself where a measured table says so.
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cusparselt", "reference")}


@dataclass(frozen=True)
class Selection:
    """The backend that serves a layer.

    Attributes:
        backend: the chosen backend.
        rejected: ``(name, reason)`` of every backend preferred to it that cannot serve the layer.
        forced: whether ``VLLM_SPARSE_BACKEND`` made the choice.
    """

    backend: Backend
    rejected: tuple[tuple[str, str], ...] = ()
    forced: bool = False


_recorded: dict[tuple[LinearSpec, str], Selection] = {}


@cache
def get_backend(name: str) -> Backend:
    """The backend called ``name`` (one instance per process).

    Raises:
        UnsupportedError: there is no such backend.
    """
    if name not in _LOADERS:
        raise UnsupportedError(
            f"there is no kernel backend {name!r}; this installation has {', '.join(available_backends())}. "
            f"Unset {ENV_BACKEND} to let the best one be chosen."
        )
    return _LOADERS[name]()


def available_backends() -> tuple[str, ...]:
    """Names of all backends of this installation, preferred first."""
    return tuple(_LOADERS)


def select(spec: LinearSpec, device: torch.device) -> Selection:
    """Choose the backend for one layer and record the choice.

    Args:
        spec: the layer as this rank sees it.
        device: where its weight lives.

    Raises:
        UnsupportedError: the backend named by ``VLLM_SPARSE_BACKEND`` does not exist or cannot serve this
            layer, or no backend can.
    """
    forced = os.environ.get(ENV_BACKEND, "").strip().lower()
    selection = _select_forced(forced, spec, device) if forced else _select_best(spec, device)
    _recorded[spec, str(device)] = selection
    return selection


def _select_forced(name: str, spec: LinearSpec, device: torch.device) -> Selection:
    backend = get_backend(name)
    reason = backend.unsupported_reason(spec, device)
    if reason is not None:
        raise UnsupportedError(
            f"{ENV_BACKEND}={name} cannot serve a {spec.weight} 2:4 layer of {spec.n}x{spec.k} on {device}: "
            f"{reason}. Unset {ENV_BACKEND} to let the best backend be chosen."
        )
    return Selection(backend, forced=True)


def _select_best(spec: LinearSpec, device: torch.device) -> Selection:
    rejected: list[tuple[str, str]] = []
    for name in _PREFERENCE.get(device.type, ("reference",)):
        backend = get_backend(name)
        reason = backend.unsupported_reason(spec, device)
        if reason is None:
            return Selection(backend, tuple(rejected))
        rejected.append((name, reason))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in rejected)
    raise UnsupportedError(f"no kernel backend can serve this 2:4 layer ({spec}): {reasons}")


def selections() -> dict[tuple[LinearSpec, str], Selection]:
    """Every choice made in this process, by ``(spec, device)``."""
    return dict(_recorded)
