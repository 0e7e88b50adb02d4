"""The CUDA C++ kernels as a part of installing the package: whether, for which GPUs, and what if it fails.

``setup.py`` imports this where nothing but the standard library and setuptools is certain to be installed.
"""

import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vllm_sparse.errors import UnsupportedError, UserError
from vllm_sparse.kernels.cuda.build import ARCHITECTURES, build
from vllm_sparse.kernels.cuda.library import BUILD_COMMAND

ENV_BUILD = "VLLM_SPARSE_BUILD_CUDA"
_QUERY = ("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")


@dataclass(frozen=True)
class Request:
    """What an installation compiles.

    Attributes:
        architectures: such as 90; none compiles nothing.
        required: asked for by the user, so that failing is an error.
    """

    architectures: tuple[int, ...] = ()
    required: bool = False


def gpu_architectures() -> tuple[int, ...]:
    """Those of this machine's GPUs that have kernels, by ``nvidia-smi``; none without it."""
    try:
        answer = subprocess.run(_QUERY, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    if answer.returncode:
        return ()
    capabilities = re.findall(r"^\s*(\d+)\.(\d)\s*$", answer.stdout, re.MULTILINE)
    found = {10 * int(major) + int(minor) for major, minor in capabilities}
    return tuple(sorted(found & set(ARCHITECTURES)))


def request() -> Request:
    """By ``VLLM_SPARSE_BUILD_CUDA``; without it for this machine's GPUs, if it has any.

    Raises:
        UserError: the variable is neither 0, 1 nor a list of architectures.
    """
    text = os.environ.get(ENV_BUILD, "").strip()
    if not text:
        return Request(gpu_architectures())
    if text in ("0", "1"):
        return Request(ARCHITECTURES, required=True) if text == "1" else Request()
    names = text.replace(",", " ").split()
    allowed = {str(arch): arch for arch in ARCHITECTURES}
    unknown = [name for name in names if name not in allowed]
    if unknown:
        raise UserError(
            f"{ENV_BUILD}={text}: {unknown[0]!r} is no architecture that has kernels; allowed are 0 "
            f"(nothing), 1 (all) or a list of {', '.join(allowed)}"
        )
    return Request(tuple(sorted({allowed[name] for name in names})), required=True)


def compile_for(wanted: Request, target: Path, jobs: int, warn: Callable[[str], None]) -> bool:
    """Make the library if it can be made.

    Args:
        wanted: for which GPUs.
        target: the library to write.
        jobs: compilers at a time.
        warn: told why there is none, where nobody asked for it.

    Returns:
        Whether it was made.

    Raises:
        UnsupportedError: it was asked for and cannot be made.
    """
    try:
        build(target, wanted.architectures, jobs)
    except (UnsupportedError, OSError) as error:
        if wanted.required:
            raise UnsupportedError(
                f"the CUDA C++ kernels were not built, and are required: {error}"
            ) from error
        warn(
            f"this machine has an NVIDIA GPU, but the CUDA C++ kernels were not built ({error}). Without "
            "them 2:4 layers are slower than dense ones in decode batches of 3 to 64 tokens; in the "
            f"environment that serves, {BUILD_COMMAND} builds them later"
        )
        return False
    return True
