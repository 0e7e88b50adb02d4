#!/bin/sh
# Starts `vllm serve` with an API key: from the file VLLM_API_KEY_FILE (a mounted secret) or from VLLM_API_KEY.
# Without one it starts only where nobody else can reach it (--host 127.0.0.1), or with VLLM_ALLOW_NO_API_KEY=1,
# which is for a server whose gateway asks for credentials. `convert`, `verify`, `inspect` and `doctor` run
# vllm-sparse instead.
set -eu

case "${1:-}" in
    convert | verify | inspect | doctor) exec vllm-sparse "$@" ;;
esac

if [ -n "${VLLM_API_KEY_FILE:-}" ]; then
    if [ ! -r "$VLLM_API_KEY_FILE" ]; then
        echo "entrypoint: VLLM_API_KEY_FILE is '$VLLM_API_KEY_FILE', which cannot be read by uid $(id -u); mount the secret there" >&2
        exit 2
    fi
    VLLM_API_KEY=$(cat "$VLLM_API_KEY_FILE")
    export VLLM_API_KEY
fi

loopback=no
previous=
for word in "$@"; do
    case "$previous $word" in
        "--host 127."* | "--host localhost" | "--host ::1") loopback=yes ;;
    esac
    case "$word" in
        --host=127.* | --host=localhost | --host=::1) loopback=yes ;;
    esac
    previous=$word
done

if [ -z "${VLLM_API_KEY:-}" ] && [ "$loopback" = no ] && [ "${VLLM_ALLOW_NO_API_KEY:-0}" != 1 ]; then
    echo "entrypoint: no API key, and the server would listen beyond loopback. Set VLLM_API_KEY_FILE (a mounted secret) or VLLM_API_KEY, serve with --host 127.0.0.1, or set VLLM_ALLOW_NO_API_KEY=1 behind a gateway that checks credentials" >&2
    exit 2
fi

exec vllm serve "$@"
