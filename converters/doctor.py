"""``vllm-sparse doctor``: what this machine can run, with which kernel, and why not with another."""

import importlib
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from converters.serving import this_device
from vllm_sparse import __version__, vllm_versions
from vllm_sparse.errors import UnsupportedError, UserError
from vllm_sparse.kernels.base import ActivationQuant, LinearSpec, WeightFormat
from vllm_sparse.kernels.dispatch import available_backends, get_backend, select

SCHEMA = "vllm-sparse/doctor/1"
# A shape that every kernel's tiles divide.
_N = _K = 1024
_CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd", "sve")
FORMATS: dict[str, tuple[WeightFormat, ActivationQuant, int | None]] = {
    "2:4 bf16": (WeightFormat.BF16, ActivationQuant.NONE, None),
    "2:4 fp16": (WeightFormat.FP16, ActivationQuant.NONE, None),
    "2:4 fp32": (WeightFormat.FP32, ActivationQuant.NONE, None),
    "2:4 int8, int8 activations": (WeightFormat.INT8, ActivationQuant.INT8_PER_TOKEN, None),
    "2:4 int8, weight only": (WeightFormat.INT8, ActivationQuant.NONE, None),
    "2:4 fp8, fp8 activations": (WeightFormat.FP8_E4M3, ActivationQuant.FP8_PER_TOKEN, None),
    "2:4 fp8, weight only": (WeightFormat.FP8_E4M3, ActivationQuant.NONE, None),
    "2:4 int4 in groups of 128": (WeightFormat.INT4, ActivationQuant.NONE, 128),
    "2:4 int4 in groups of 128, int8 activations": (WeightFormat.INT4, ActivationQuant.INT8_PER_TOKEN, 128),
}


@dataclass(frozen=True)
class FormatReport:
    """Who serves one format here."""

    format: str
    backend: str | None
    passed_over: dict[str, str]


@dataclass(frozen=True)
class Diagnosis:
    """The machine as this project sees it.

    Attributes:
        version: of vllm-sparse.
        python: interpreter version.
        torch: torch version.
        vllm: vLLM version, None when it is not installed.
        vllm_supported: whether that version is in the supported range.
        device: where vLLM would run.
        device_name: CPU or GPU model.
        isa: instruction sets of interest that the CPU has.
        backends: ``{name: "ready" or why not}``.
        formats: which backend each format would use.
        advice: what those backends lack here to be fast; empty when nothing.
        problems: what stops serving; empty when all is well.
    """

    version: str
    python: str
    torch: str
    vllm: str | None
    vllm_supported: bool
    device: str
    device_name: str
    isa: tuple[str, ...]
    backends: dict[str, str]
    formats: tuple[FormatReport, ...]
    advice: tuple[str, ...]
    problems: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The machine-readable form."""
        return {"schema": SCHEMA, **asdict(self)}


def vllm_version() -> tuple[str | None, str | None]:
    """``(version, problem)``: vLLM's version without importing all of it, or why there is none."""
    try:
        module = importlib.import_module("vllm.version")
    except ModuleNotFoundError:
        return None, "vLLM is not installed; pip install 'vllm-sparse[cpu]' or 'vllm-sparse[cuda]'"
    except (ImportError, OSError, RuntimeError) as error:
        return None, f"vLLM is installed but does not import: {error}"
    return str(module.__version__), None


def cpu_facts() -> tuple[str, tuple[str, ...]]:
    """CPU model and the instruction sets of interest, from the kernel's own account."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine(), ()
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return fields.get("model name", platform.machine()), tuple(flag for flag in _CPU_FLAGS if flag in flags)


def _spec(name: str) -> LinearSpec:
    weight, activations, group = FORMATS[name]
    dtype = {WeightFormat.FP16: torch.float16, WeightFormat.FP32: torch.float32}.get(weight, torch.bfloat16)
    return LinearSpec(_N, _K, weight, dtype, activations, group)


def _format_report(name: str, device: torch.device) -> FormatReport:
    try:
        selection = select(_spec(name), device)
    except UnsupportedError as error:
        return FormatReport(name, None, {"all": str(error)})
    return FormatReport(name, selection.backend.name, dict(selection.rejected))


def _backend_state(name: str, device: torch.device) -> str:
    spec = LinearSpec(_N, _K, WeightFormat.BF16, torch.bfloat16)
    try:
        return get_backend(name).unsupported_reason(spec, device) or "ready"
    except (UserError, ImportError, OSError) as error:
        return f"does not load: {error}"


def _advice(formats: Sequence[FormatReport]) -> tuple[str, ...]:
    """What the chosen backends lack, each thing once."""
    found = (get_backend(row.backend).advice(_spec(row.format)) for row in formats if row.backend)
    return tuple(dict.fromkeys(filter(None, found)))


def diagnose() -> Diagnosis:
    """Look at this machine; starts nothing."""
    device = this_device()
    version, problem = vllm_version()
    model, isa = cpu_facts()
    problems = [problem] if problem else []
    supported = version is not None and vllm_versions.is_tested(version)
    if version is not None and not supported:
        problems.append(f"vLLM {version} is not one of the tested releases, {vllm_versions.tested_range()}")
    formats = tuple(_format_report(name, device) for name in FORMATS)
    return Diagnosis(
        version=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        vllm=version,
        vllm_supported=supported,
        device=str(device),
        device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else model,
        isa=isa,
        backends={name: _backend_state(name, device) for name in available_backends()},
        formats=formats,
        advice=_advice(formats),
        problems=tuple(problems),
    )
