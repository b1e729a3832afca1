#!/bin/bash
# shipyard-llama-8b: 2 x 8 ranks on a Ray cluster, written by `shipyard launch`. bash THIS FILE
# submits it to $RAY_ADDRESS (http://127.0.0.1:8265 by default); `ray job stop` saves, and submitted again it goes on.
set -euo pipefail
cd '/home/me/my project'
PYTHON=/home/me/.venv/bin/python NNODES=2 GPUS=8

if [ -z "${NODE_RANK:-}" ]; then
    # Ray kills 3 s after it asked a job to stop; saving takes longer.
    exec ray job submit --no-wait --runtime-env-json '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120"}}' \
        -- "$PYTHON" -m shipyard.launch.ray_nodes "$NNODES" "$GPUS" 3 "$(realpath "$0")"
fi

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

config=$("$PYTHON" -c 'import shipyard; print(shipyard.__path__[0])')/launch/accelerate/nodes.yaml
exec "$PYTHON" -m shipyard.launch.node \
    "$PYTHON" -m accelerate.commands.launch --config_file "$config" \
    --num_machines "$NNODES" --machine_rank "$NODE_RANK" --num_processes "$((NNODES * GPUS))" \
    --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" \
    --rdzv_conf timeout=1800 --max_restarts 0 \
    -m shipyard.launch.cli train /home/me/recipes/llama.yaml optim.lr=1e-4
