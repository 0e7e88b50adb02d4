#!/usr/bin/env bash
# One command: a model directory served with Prometheus and Grafana.
#   deploy/compose/up.sh MODEL_DIR [--dense DENSE_DIR] [--tls SITE] [-- ARGS OF docker compose up]
# Secrets are made once, in deploy/compose/secrets (only your user can enter that folder).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() { printf 'up.sh: %s\n' "$1" >&2; exit 2; }
model_dir() {
    [ -f "$1/config.json" ] || fail "'$1' is no model directory: it has no config.json"
    (cd "$1" && pwd)
}

[ $# -ge 1 ] || fail "usage: up.sh MODEL_DIR [--dense DENSE_DIR] [--tls SITE] [-- ARGS]"
MODEL_DIR=$(model_dir "$1")
export MODEL_DIR
shift
profiles=()
while [ $# -gt 0 ]; do
    case "$1" in
        --dense)
            DENSE_MODEL_DIR=$(model_dir "${2:?--dense needs a directory}")
            export DENSE_MODEL_DIR
            profiles+=(--profile compare)
            shift 2
            ;;
        --tls)
            export SITE=${2:?--tls needs the name of the site}
            profiles+=(--profile tls)
            shift 2
            ;;
        --) shift; break ;;
        *) fail "unknown option '$1'; known are --dense DIR, --tls SITE, and -- before arguments of docker compose up" ;;
    esac
done

secrets=${SECRETS_DIR:-$here/secrets}
mkdir -p "$secrets"
chmod 700 "$secrets"
for name in api_key grafana_password; do
    if [ ! -s "$secrets/$name" ]; then
        od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$secrets/$name"
        # Readable inside the containers, whose users have other numbers; the folder keeps everyone else out.
        chmod 644 "$secrets/$name"
    fi
done

if docker compose version >/dev/null 2>&1; then compose=(docker compose); else compose=(docker-compose); fi
command -v "${compose[0]}" >/dev/null || fail "neither 'docker compose' nor 'docker-compose' is installed"
echo "API key: $secrets/api_key · Grafana: http://127.0.0.1:${GRAFANA_PORT:-3000}, user admin, password in $secrets/grafana_password"
exec "${compose[@]}" --project-name vllm-sparse -f "$here/compose.yaml" "${profiles[@]}" up "$@"
