#!/bin/bash
# Serves what was trained over the OpenAI API: one server on this machine, behind the gateway.
#   launch/serve.sh runs/llama3-8b-dpo                        a run, a model directory or a GGUF file
#   HOST=0.0.0.0 PORT=8000 ENGINE=vllm SHIPYARD_API_KEY=... launch/serve.sh MODEL
# On several machines run it on each and put a load balancer before them; /health says when one takes requests.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=${PYTHON:-$([ -x "$here/.venv/bin/python" ] && echo "$here/.venv/bin/python" || echo python3)}
MODEL=${1:?a run, a model directory or a GGUF file}

# exec: SIGTERM goes to the server itself, which refuses new requests and finishes those that it has.
exec "$PYTHON" -m shipyard.launch.cli serve "$MODEL" \
    --engine "${ENGINE:-auto}" --host "${HOST:-127.0.0.1}" --port "${PORT:-8000}"
