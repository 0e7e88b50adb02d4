"""Builds the optional kernels; everything else about the package is in pyproject.toml.

The CPU library is compiled against libtorch's stable ABI, so one build serves every Python from 3.11 and
every torch from 2.10. It is optional: without a compiler (or with VLLM_SPARSE_NO_EXTENSION=1) the package
installs all the same and the reference backend serves; ``vllm-sparse doctor`` says so. What is shipped
(wheels, images) is built with VLLM_SPARSE_REQUIRE_EXTENSION=1, which makes missing CPU kernels an error.

The CUDA C++ kernels are compiled for this machine's NVIDIA GPUs, if it has any and an nvcc is found; a
failure is a warning. VLLM_SPARSE_BUILD_CUDA=1 compiles them for all supported architectures, a list such as
"90 100" for those, and makes a failure an error; 0 compiles none.
"""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# The package's own build module, which needs the standard library only. Build frontends leave this folder out
# of the path.
sys.path.insert(0, str(Path(__file__).parent))
from vllm_sparse.errors import UserError
from vllm_sparse.kernels.cuda import install

sys.path.pop(0)

SOURCES = Path("vllm_sparse/kernels/csrc")
CUDA_LIBRARY = "vllm_sparse.kernels.cuda._mma_sp"
# torch 2.10: the first release whose stable ABI has parallel_for.
STABLE_ABI_TARGET = "0x020a000000000000"
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", *AVX2]
# Each instruction-set level has its own file and flags; common code is built for the baseline and the level
# is chosen when the library is loaded.
LEVEL_FLAGS = {
    "level_avx512bf16.cpp": [*AVX512, "-mavx512bf16", "-mavx512vbmi", "-mavx512vbmi2", "-mavx512vnni"],
    "dense_avx512bf16.cpp": [*AVX512, "-mavx512bf16", "-mavx512vbmi"],
    "tiles.cpp": [*AVX512, "-mavx512bf16", "-mavx512vbmi", "-mavx512vbmi2"],
    "tiles_amx.cpp": ["-mamx-tile", "-mamx-bf16", "-mamx-int8"],
    "level_avx512.cpp": AVX512,
    "encode_avx512.cpp": [*AVX512, "-mavx512vbmi2", "-mpopcnt"],
    "level_avx2.cpp": AVX2,
    "dense_avx2.cpp": AVX2,
    "token_lanes_avx2.cpp": AVX2,
    "token_lanes_avx512bf16.cpp": [*AVX512, "-mavx512bf16", "-mavx512vnni"],
}
IS_X86_64 = platform.machine().lower() in {"x86_64", "amd64"}


def sources() -> list[str]:
    """The C++ files for this machine, relative to the repository root."""
    files = sorted(SOURCES.glob("*.cpp"))
    return [str(f) for f in files if IS_X86_64 or f.name not in LEVEL_FLAGS]


class OptionalKernels(build_ext):
    """Compiles each source with its own flags; only kernels that were asked for can fail the installation."""

    def get_ext_filename(self, fullname: str) -> str:
        """The CUDA library is no Python module, so that its name says nothing of a Python."""
        # Asked both by the whole name and by its last part.
        if fullname in (CUDA_LIBRARY, CUDA_LIBRARY.rpartition(".")[2]):
            return fullname.replace(".", "/") + ".so"
        return super().get_ext_filename(fullname)

    def build_extension(self, ext: Extension) -> None:
        """Compile and link, or explain why the package goes without the kernels."""
        if ext.name == CUDA_LIBRARY:
            self._build_cuda(Path(self.get_ext_fullpath(ext.name)))
            return
        try:
            self._build(ext)
        except Exception as error:  # noqa: BLE001 - whatever went wrong, the package works without the kernels
            if os.environ.get("VLLM_SPARSE_REQUIRE_EXTENSION") == "1":
                sys.exit(f"the CPU kernels were not built, and are required: {error}")
            self.warn(f"the CPU kernels were not built ({error}); the reference backend will serve instead")

    def _build_cuda(self, target: Path) -> None:
        names = " ".join(map(str, CUDA.architectures))
        self.announce(f"compiling the CUDA C++ kernels for {names}", level=2)
        try:
            install.compile_for(CUDA, target, os.cpu_count() or 1, self.warn)
        except UserError as error:
            sys.exit(str(error))

    def _build(self, ext: Extension) -> None:
        import torch
        from torch.utils.cpp_extension import include_paths

        library = Path(torch.__file__).parent / "lib"
        common = [
            "-O3",
            "-g0",
            "-std=c++20",
            "-fvisibility=hidden",
            "-fPIC",
            "-Wall",
            "-Wextra",
            "-Wno-unused-parameter",
        ]
        common += [
            "-Wno-psabi",
            "-Wno-ignored-attributes",
            "-Wno-maybe-uninitialized",
            "-Wno-uninitialized",
            f"-DTORCH_TARGET_VERSION={STABLE_ABI_TARGET}",
        ]
        includes = [f"-isystem{path}" for path in include_paths()]

        def compiled(source: str) -> list[str]:
            flags = common + includes + LEVEL_FLAGS.get(Path(source).name, [])
            return self.compiler.compile([source], output_dir=self.build_temp, extra_postargs=flags)

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            objects = [name for names in pool.map(compiled, ext.sources) for name in names]
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Written under another name first: a process that has the old library mapped must not see it change.
        fresh = target.with_suffix(".new")
        self.compiler.link_shared_object(
            objects,
            str(fresh),
            libraries=["torch_cpu", "c10"],
            library_dirs=[str(library)],
            target_lang="c++",
        )
        fresh.replace(target)


try:
    CUDA = install.request()
except UserError as error:
    sys.exit(str(error))
nothing = os.environ.get("VLLM_SPARSE_NO_EXTENSION") == "1"
extensions = []
if sys.platform == "linux" and not nothing:
    extensions.append(
        Extension("vllm_sparse.kernels._cpu", sources=sources(), py_limited_api=True, optional=True)
    )
if sys.platform == "linux" and CUDA.architectures and (CUDA.required or not nothing):
    extensions.append(Extension(CUDA_LIBRARY, sources=[], optional=True))

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": OptionalKernels},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
