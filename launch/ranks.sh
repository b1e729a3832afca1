#!/bin/bash
# Starts a recipe on every GPU of this machine, or of several. Nothing stands between this file and Accelerate.
#   launch/ranks.sh RECIPE [KEY=VALUE ...]
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 launch/ranks.sh RECIPE    on the first of two machines; NODE_RANK=1 on the other
# GPUS: ranks on this machine; PYTHON: which one. The same line again goes on after a stop.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
RECIPE=${1:?a recipe, launch/recipes/llama3-8b-qlora.yaml for instance}
shift
GPUS=${GPUS:-$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() or 1)')}
NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0}
# Accelerate takes these as they are, and a rank that is none of the job's waits half an hour for the others.
for name in GPUS NNODES NODE_RANK; do
    case ${!name} in *[!0-9]*) echo "ranks.sh: $name: '${!name}' is no count; give a whole number" >&2 && exit 2 ;; esac
done
if [ "$GPUS" -lt 1 ] || [ "$NODE_RANK" -ge "$NNODES" ]; then
    echo "ranks.sh: GPUS=$GPUS, rank $NODE_RANK of NNODES=$NNODES; give GPUS=1 or more, NODE_RANK=0 to NNODES - 1" >&2
    exit 2
fi
# One machine needs no meeting place: port 0 is any free one. Several meet at the first, whose address all must be given.
if [ "$NNODES" -gt 1 ]; then : "${MASTER_ADDR:?the address of the machine with NODE_RANK=0}"; fi
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1} MASTER_PORT=${MASTER_PORT:-$((NNODES > 1 ? 29500 : 0))}

# A rank that gets SIGTERM finishes its step, saves and exits with 143. The launcher passes SIGTERM on and, by default,
# kills after 30 s; a step and a save of a large model take longer.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-100}
# A collective that fails, or outlives the recipe's parallel.timeout_s, ends its process: a dead rank stops the job, and
# the job starts again; without this the others wait for it for ever.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-3}
# The last 2,000 collectives of each rank are remembered, and written down when one times out: they name who is missing.
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
# NCCL says what it could not do, and nothing else. It finds the fast network by itself; where it picks a wrong one, set
# NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME (to eth0, say), and NCCL_IB_HCA for InfiniBand.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# The ranks of a node share its cores; by default each would take one, or all of them.
cores=$(($(nproc) / GPUS))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > 0 ? cores : 1))} PYTHONUNBUFFERED=1

exec "$PYTHON" -m shipyard.launch.node \
    "$PYTHON" -m accelerate.commands.launch --config_file launch/accelerate/nodes.yaml \
    --num_machines "$NNODES" --machine_rank "$NODE_RANK" --num_processes "$((NNODES * GPUS))" \
    --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" \
    --rdzv_conf timeout=1800 --max_restarts 0 \
    -m shipyard.launch.cli train "$RECIPE" "$@"
