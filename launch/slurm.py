"""The sbatch script: SIGTERM reaches the ranks, they save, the job goes back into the queue and goes on from there."""

import shlex
import textwrap

from ..training.ending import FILE, RUN_DIR, START
from ..training.exit_code import EXIT_PREEMPTED, FINAL
from .job import ENVIRONMENT, GRACE_S, Job, accelerate


def slurm_script(job: Job) -> str:
    """A batch script for `sbatch` (https://slurm.schedmd.com/sbatch.html), whose nodes share this file system."""
    # Indented before the arguments are put in: they may hold line breaks, which must stay what they are.
    launch = textwrap.indent(accelerate("ARGUMENTS"), "    ").replace("ARGUMENTS", job.here())
    return f"""\
#!/bin/bash
#SBATCH --job-name={job.name}
#SBATCH --nodes={job.nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={job.gpus}
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --signal=B:TERM@{GRACE_S}
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
#
# {job.name}: {job.nodes} x {job.gpus} ranks, written by `shipyard launch`. One task a node starts that node's ranks.
# --signal sends SIGTERM to this script {GRACE_S} s before the time limit; --requeue lets Slurm start it again after it
# took the nodes for another job or lost one. sbatch reads SBATCH_PARTITION, SBATCH_ACCOUNT and SBATCH_TIMELIMIT.
set -uo pipefail
cd {shlex.quote(str(job.folder))} || exit 2
export PYTHON={shlex.quote(job.python)} NNODES=$SLURM_JOB_NUM_NODES GPUS={job.gpus}
export {START}=slurm-$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}} # once requeued, it is another start
export {RUN_DIR}={shlex.quote(job.recipe.run_dir)}

# shellcheck disable=SC2329 # srun starts it by its name
ranks() {{ # on every node
{textwrap.indent(ENVIRONMENT, "    ")}
    NODE_RANK=$SLURM_PROCID
{launch}}}
export -f ranks

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR

step='' stopped=''
# shellcheck disable=SC2329 # the trap below
stop() {{ # srun passes SIGTERM on to the launchers, and they to the ranks; a second one would cut the save short
    trap '' TERM
    stopped=yes
    if [ -n "$step" ]; then kill -TERM "$step"; fi
}}
trap stop TERM

final() {{ # a bad step or a mistake, which come out the same again: srun says so, or the ranks have left word
    local ended start word="${RUN_DIR}/{FILE}"
    case $code in {" | ".join(map(str, sorted(FINAL)))}) return 0 ;; esac
    [ -f "$word" ] && read -r ended start <"$word" && [ "$start" = "${START}" ] && code=$ended
}}

code=0
for ((attempt = 0; attempt <= {job.restarts}; attempt++)); do
    # A port of this job and attempt: other jobs' differ, and the last attempt's may still be closing.
    export MASTER_PORT=$((20000 + (SLURM_JOB_ID + attempt * 7919) % 20000))
    if [ -n "$stopped" ]; then break; fi
    # One node's failure ends the step on all; a step takes no cores that it does not ask for.
    srun --ntasks-per-node=1 --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" bash -euc ranks &
    step=$!
    while :; do # a trap ends `wait`, not srun
        wait "$step"
        code=$?
        kill -0 "$step" 2>/dev/null || break
    done
    if [ "$code" = 0 ]; then exit 0; fi
    if final; then
        echo "exit code $code: a bad step or a mistake comes out the same again, so the job is not started again" >&2
        exit "$code"
    fi
    if [ -n "$stopped" ]; then break; fi
    echo "attempt $attempt ended with exit code $code" >&2
done
if [ -n "$stopped" ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit {EXIT_PREEMPTED}
fi
exit "$code"
"""
