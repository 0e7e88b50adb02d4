"""Compile the CUDA C++ kernels with this machine's nvcc.

``python -m vllm_sparse.kernels.cuda.build [--arch 90 ...] [--out FILE]`` writes the library that
``library.py`` loads; no GPU is needed. nvcc is looked for in ``$CUDACXX``, ``$CUDA_HOME/bin``, PATH,
``/usr/local/cuda/bin`` and NVIDIA's pip packages. Installing the package uses this module too
(``install.py``), so it imports the standard library alone.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vllm_sparse.errors import UnsupportedError, UserError
from vllm_sparse.kernels.cuda.library import DEFAULT_PATH, ENV_LIBRARY, PIP_TOOLKIT

SOURCES = Path(__file__).parent / "csrc"
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
# Products of whole warpgroups exist in code for exactly this capability only.
_WITH_OWN_INSTRUCTIONS = {90: "90a"}
_FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden")


def find_nvcc() -> Path:
    """The compiler.

    Raises:
        UnsupportedError: there is none; says where it was looked for.
    """
    home = os.environ.get("CUDA_HOME", "").strip()
    wanted = [os.environ.get("CUDACXX", "").strip(), f"{home}/bin/nvcc" if home else "", "nvcc"]
    for name in [*filter(None, wanted), "/usr/local/cuda/bin/nvcc", *_pip_compilers()]:
        found = shutil.which(name)
        if found:
            return Path(found)
    raise UnsupportedError(
        "no nvcc: looked in $CUDACXX, $CUDA_HOME/bin, PATH, /usr/local/cuda/bin and NVIDIA's pip packages. "
        f"Install the CUDA toolkit (12.8 or later), or {PIP_TOOLKIT}; or go without: the Triton kernels "
        "need no compiler."
    )


def _pip_compilers() -> list[str]:
    """Where NVIDIA's pip packages put nvcc: ``nvidia/cu13/bin`` among the packages of this environment.

    The interpreter's own folder comes too: in pip's isolated builds it is not on the path.
    """
    spec = importlib.util.find_spec("nvidia")
    folders = [*((spec and spec.submodule_search_locations) or ()), sysconfig.get_path("purelib") + "/nvidia"]
    return sorted({str(found) for folder in folders for found in Path(folder).glob("*/bin/nvcc")})


def sources() -> list[Path]:
    """The translation units."""
    return sorted(SOURCES.glob("*.cu"))


def compile_command(
    nvcc: Path, source: Path, target: Path, architectures: Iterable[int], macros: Iterable[str] = ()
) -> list[str]:
    """The command that compiles one translation unit."""
    names = [_WITH_OWN_INSTRUCTIONS.get(arch, str(arch)) for arch in architectures]
    code = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    defined = [f"-D{macro}" for macro in macros]
    return [str(nvcc), *_FLAGS, *defined, *code, "-c", str(source), "-o", str(target)]


def link_command(nvcc: Path, objects: Iterable[Path], target: Path) -> list[str]:
    """The command that makes the library."""
    # The pip packages have lib where a toolkit has lib64, which is where nvcc looks.
    folder = nvcc.parent.parent / "lib"
    places = [f"-L{folder}"] if (folder / "libcudart_static.a").exists() else []
    return [str(nvcc), "-shared", "--cudart=static", *places, *map(str, objects), "-o", str(target)]


def run(command: list[str]) -> None:
    """Run a compiler.

    Raises:
        UnsupportedError: it fails; with what it said.
    """
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        text = (result.stderr or result.stdout).strip()
        raise UnsupportedError(f"{' '.join(command)} failed:\n{text[-4000:]}")


def build(target: Path, architectures: Iterable[int], jobs: int, macros: Iterable[str] = ()) -> Path:
    """Compile and link; ``target`` appears only when it is whole.

    Args:
        target: the library to write.
        architectures: compute capabilities times ten.
        jobs: compilers at a time.
        macros: defined for the preprocessor, such as ``SPARSE24_SERIAL_PRODUCTS`` (csrc/wgmma_sp_kernel.cuh).

    Raises:
        UnsupportedError: no nvcc, or it fails, with what it said; or the folder is not writable.
        OSError: the folder cannot be made.
    """
    nvcc = find_nvcc()
    architectures, macros = tuple(architectures), tuple(macros)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Said now: compiling takes minutes.
    if not os.access(target.parent, os.W_OK):
        raise UnsupportedError(
            f"{target.parent} is not writable; write the library elsewhere with --out and name it in "
            f"{ENV_LIBRARY}"
        )
    with tempfile.TemporaryDirectory() as folder:
        objects = [Path(folder) / f"{source.stem}.o" for source in sources()]
        commands = [
            compile_command(nvcc, source, out, architectures, macros)
            for source, out in zip(sources(), objects, strict=True)
        ]
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(run, commands))
        # A name of its own: another build may write the same library at the same time.
        fresh = target.with_name(f".{Path(folder).name}.{target.name}")
        try:
            run(link_command(nvcc, objects, fresh))
            fresh.replace(target)
        finally:
            fresh.unlink(missing_ok=True)
    return target


def _here() -> tuple[int, ...]:
    """Architectures of this machine's GPUs, all supported ones without a GPU."""
    import torch

    found = set()
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        found.add(10 * major + minor)
    return tuple(sorted(found)) or ARCHITECTURES


def positive(text: str) -> int:
    """A number of at least 1 from a command line."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--arch", nargs="+", type=int, help="such as 80 90; this machine's GPUs, without one all supported"
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_PATH, help="the library to write")
    parser.add_argument("--jobs", type=positive, default=os.cpu_count() or 1, help="compilers at a time")
    parser.add_argument("--define", nargs="*", default=[], metavar="MACRO", help="for the preprocessor")
    chosen = parser.parse_args(arguments)
    try:
        architectures = tuple(chosen.arch or _here())
        sys.stdout.write(f"compiling for {' '.join(f'sm_{arch}' for arch in architectures)}\n")
        sys.stdout.flush()
        path = build(chosen.out, architectures, chosen.jobs, chosen.define)
    except (UserError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return UserError.exit_code
    sys.stdout.write(f"wrote {path} ({path.stat().st_size >> 10} KiB)\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
