"""One training job as every cluster sees it: so many nodes, so many ranks on each, one `accelerate launch` a node.

Generated scripts have three parts: what the ranks' environment is and why, where the nodes meet, and the launch. The
first and the last are here, the middle is each cluster's own.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from ..training.recipe import Recipe

GRACE_S = 120
"""Seconds between SIGTERM and SIGKILL that every cluster is asked for: a step is finished and saved in them."""
LAUNCHER_GRACE_S = GRACE_S - 20
"""Seconds that the launcher gives its ranks: less than it has itself, so that it is there to see them end."""
JOIN_S = 1800
"""Seconds that a node waits for the others: images are pulled and queues move at different speeds."""

ENVIRONMENT = f"""\
# A rank that gets SIGTERM finishes its step, saves and exits with 143. The launcher passes SIGTERM on and, by default,
# kills after 30 s; a step and a save of a large model take longer.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${{TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-{LAUNCHER_GRACE_S}}}
# A collective that fails, or outlives the recipe's parallel.timeout_s, ends its process: a dead rank stops the job, and
# the job starts again; without this the others wait for it for ever.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${{TORCH_NCCL_ASYNC_ERROR_HANDLING:-3}}
# The last 2,000 collectives of each rank are remembered, and written down when one times out: they name who is missing.
export TORCH_FR_BUFFER_SIZE=${{TORCH_FR_BUFFER_SIZE:-2000}}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${{TORCH_NCCL_DUMP_ON_TIMEOUT:-1}}
# NCCL says what it could not do, and nothing else. It finds the fast network by itself; where it picks a wrong one, set
# NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME (to eth0, say), and NCCL_IB_HCA for InfiniBand.
export NCCL_DEBUG=${{NCCL_DEBUG:-WARN}}
# The ranks of a node share its cores; by default each would take one, or all of them.
cores=$(($(nproc) / GPUS))
export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-$((cores > 0 ? cores : 1))}} PYTHONUNBUFFERED=1
"""


@dataclass(frozen=True)
class Job:
    """What is launched. `gpus` are ranks on one node, `nodes * gpus` in all."""

    name: str
    recipe: Recipe
    recipe_path: Path
    overrides: tuple[str, ...]
    nodes: int
    gpus: int
    restarts: int
    """How often a job that crashed is started again; being preempted does not count."""
    folder: Path
    """Where it was launched: relative paths of the recipe start here, on machines that share this file system."""
    python: str
    image: str
    storage: str
    accelerator: str

    def here(self) -> str:
        """The recipe and its overrides, quoted for a shell on a machine that sees this file system."""
        return shlex.join([str(self.recipe_path), *self.overrides])


def job_name(run_dir: str) -> str:
    """A name that Slurm, Kubernetes (RFC 1123, with room for pod suffixes) and SkyPilot all take."""
    words = re.sub(r"[^a-z0-9]+", "-", Path(run_dir).name.lower()).strip("-")
    return f"shipyard-{words}"[:40].rstrip("-")


def accelerate(arguments: str, node: str = "") -> str:
    """The shell lines that become this node's launcher. They read PYTHON, NNODES, GPUS (ranks on a node), NODE_RANK,
    MASTER_ADDR and MASTER_PORT. `arguments`, and `node`, the options of what stands between it and its scheduler and
    ends with the ranks' own code (node.py), are quoted already.

    The rendezvous is static: every node is told its rank and where node 0 is, so no host name is guessed. The launcher
    itself restarts nothing: of many nodes all must start again together, and a bad step not at all. Whoever started
    the launcher starts it afresh.
    """
    return f"""\
config=$("$PYTHON" -c 'import shipyard; print(shipyard.__path__[0])')/launch/accelerate/nodes.yaml
exec "$PYTHON" -m shipyard.launch.node {node}\\
    "$PYTHON" -m accelerate.commands.launch --config_file "$config" \\
    --num_machines "$NNODES" --machine_rank "$NODE_RANK" --num_processes "$((NNODES * GPUS))" \\
    --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" \\
    --rdzv_conf timeout={JOIN_S} --max_restarts 0 \\
    -m shipyard.launch.cli train {arguments}
"""


def local_script(job: Job) -> str:
    """A bash script that runs the job on this machine."""
    return f"""\
#!/bin/bash
# {job.name}: {job.gpus} ranks on this machine, written by `shipyard launch`. Start it again and it goes on.
set -euo pipefail
cd {shlex.quote(str(job.folder))}
PYTHON={shlex.quote(job.python)}
NNODES=1 NODE_RANK=0 GPUS={job.gpus} MASTER_ADDR=127.0.0.1 MASTER_PORT=0 # 0: a free port

{ENVIRONMENT}
{accelerate(job.here())}"""
