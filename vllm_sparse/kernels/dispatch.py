"""Choosing a backend for a layer, and remembering what was chosen.

The order of preference is fixed per device; ``VLLM_SPARSE_BACKEND`` forces one backend instead.
``VLLM_SPARSE_PREFILL`` then adds another form of the weights for many tokens to the backend chosen, where the
two go together. Nothing is chosen silently: a :class:`Selection` carries the reason for every backend that
was passed over.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import torch

from vllm_sparse.errors import UnsupportedError
from vllm_sparse.kernels.base import Backend, LinearSpec

logger = logging.getLogger(__name__)

ENV_BACKEND = "VLLM_SPARSE_BACKEND"
ENV_PREFILL = "VLLM_SPARSE_PREFILL"
_PREFILL_KERNELS = ("cusparselt",)


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


def _prefill(name: str) -> Backend:
    from vllm_sparse.kernels.cuda.backend import CudaBackend
    from vllm_sparse.kernels.cusparselt import CusparseltBackend
    from vllm_sparse.kernels.prefill import PrefillBackend
    from vllm_sparse.kernels.triton.backend import TritonBackend

    return PrefillBackend(CudaBackend() if name == "cuda" else TritonBackend(), CusparseltBackend())


_LOADERS: dict[str, Callable[[], Backend]] = {
    "cpu": _cpu,
    "triton": _triton,
    "cuda": _cuda,
    "cusparselt": _cusparselt,
    "triton+cusparselt": partial(_prefill, "triton"),
    "cuda+cusparselt": partial(_prefill, "cuda"),
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
        rejected: ``(name, reason)`` of every backend preferred to it that cannot serve the layer, or is
            measured to be slower.
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


def select(spec: LinearSpec, device: torch.device, prompts: bool = True) -> Selection:
    """Choose the backend for one layer and record the choice.

    With ``VLLM_SPARSE_PREFILL`` a shape is measured when it is first met on a GPU.

    Args:
        spec: the layer as this rank sees it.
        device: where its weight lives.
        prompts: whether all tokens of a prompt go through the layer; a head sees the last of each.

    Raises:
        UnsupportedError: the backend named by ``VLLM_SPARSE_BACKEND`` does not exist or cannot serve this
            layer, or no backend can; or ``VLLM_SPARSE_PREFILL`` names nothing that there is.
    """
    prefill = _prefill_kernels()
    forced = os.environ.get(ENV_BACKEND, "").strip().lower()
    selection = _select_forced(forced, spec, device) if forced else _select_best(spec, device)
    if prefill is not None and not selection.backend.name.endswith(f"+{prefill}"):
        selection = _add_prefill(prefill, selection, spec, device, prompts)
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


def _prefill_kernels() -> str | None:
    named = os.environ.get(ENV_PREFILL, "").strip().lower()
    if named and named not in _PREFILL_KERNELS:
        raise UnsupportedError(
            f"{ENV_PREFILL}={named}: allowed is {' or '.join(_PREFILL_KERNELS)}. Unset it to serve prompts "
            "and decode batches from one form of the weights."
        )
    return named or None


def _add_prefill(
    prefill: str, selection: Selection, spec: LinearSpec, device: torch.device, prompts: bool
) -> Selection:
    """The chosen backend with ``prefill`` beside it, or as it is with the reason."""
    name = f"{selection.backend.name}+{prefill}"
    reason = _not_added_reason(name, prefill, spec, device, prompts)
    if reason is None:
        return replace(selection, backend=get_backend(name))
    return replace(selection, rejected=(*selection.rejected, (name, reason)))


def _not_added_reason(
    name: str, prefill: str, spec: LinearSpec, device: torch.device, prompts: bool
) -> str | None:
    if name not in _LOADERS:
        partners = [other.partition("+")[0] for other in _LOADERS if other.endswith(f"+{prefill}")]
        return f"{ENV_PREFILL} adds to the {' and '.join(partners)} kernels only"
    if not prompts:
        return "a head multiplies few tokens of a prompt"
    backend = get_backend(name)
    return backend.unsupported_reason(spec, device) or backend.slower_reason(spec, device)


def selections() -> dict[tuple[LinearSpec, str], Selection]:
    """Every choice made in this process, by ``(spec, device)``."""
    return dict(_recorded)
