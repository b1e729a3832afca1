"""Ray: one actor a node runs that node's `accelerate launch`. This file is also the program that Ray runs.

`python -m shipyard.launch.ray_nodes NODES GPUS RESTARTS SCRIPT` runs `bash SCRIPT` once on each of NODES nodes, with
NODE_RANK, MASTER_ADDR and MASTER_PORT set. The nodes share a file system. Nothing heavy is imported here.
"""

import os
import shlex
import signal
import socket
import subprocess
import sys
import uuid
from typing import Any

from ..training.ending import START
from ..training.exit_code import EXIT_PREEMPTED, FINAL
from .job import ENVIRONMENT, GRACE_S, Job, accelerate


def ray_script(job: Job) -> str:
    """A script that submits itself as a Ray job and, run by that job on each node, starts the node's ranks."""
    return f"""\
#!/bin/bash
# {job.name}: {job.nodes} x {job.gpus} ranks on a Ray cluster, written by `shipyard launch`. bash THIS FILE
# submits it to $RAY_ADDRESS (http://127.0.0.1:8265 by default); `ray job stop` saves, and submitted again it goes on.
set -euo pipefail
cd {shlex.quote(str(job.folder))}
PYTHON={shlex.quote(job.python)} NNODES={job.nodes} GPUS={job.gpus}

if [ -z "${{NODE_RANK:-}}" ]; then
    # Ray kills 3 s after it asked a job to stop; saving takes longer.
    exec ray job submit --no-wait --runtime-env-json '{{"env_vars": {{"RAY_JOB_STOP_WAIT_TIME_S": "{GRACE_S}"}}}}' \\
        -- "$PYTHON" -m shipyard.launch.ray_nodes "$NNODES" "$GPUS" {job.restarts} "$(realpath "$0")"
fi

{ENVIRONMENT}
{accelerate(job.here())}"""


class Node:
    """What runs on one node: the script, as a child that can be told to stop while it is waited for."""

    def __init__(self) -> None:
        self.child: subprocess.Popen[bytes] | None = None
        self.stopped = False

    def address(self) -> tuple[str, int]:
        """This node's address in the cluster, and a free port there."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def run(self, script: str, variables: dict[str, str]) -> int:
        """Run the script; return its exit code."""
        self.child = subprocess.Popen(["bash", script], env=os.environ | variables)
        if self.stopped:  # before there was a child
            self.child.terminate()
        return self.child.wait()

    def stop(self) -> None:
        """Pass SIGTERM on: the ranks save and end."""
        self.stopped = True
        if self.child is not None:
            self.child.terminate()


def run_on_nodes(nodes: int, gpus: int, restarts: int, script: str) -> int:
    """Run the script on every node, again after a crash at most `restarts` times; return 0, the last exit code that was
    not, or 143 after SIGTERM. A bad step or a mistake is final. Waits until the cluster has the nodes."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    ray.init()
    unit = "GPU" if ray.cluster_resources().get("GPU") else "CPU"
    stopped: list[int] = []
    actors: list[Any] = []

    def stop(number: int, frame: Any) -> None:
        stopped.append(number)
        _stop(actors)

    signal.signal(signal.SIGTERM, stop)
    code, start = 1, uuid.uuid4().hex
    for _ in range(restarts + 1):
        # All nodes or none, each bundle on a node of its own.
        group = placement_group([{unit: gpus}] * nodes, strategy="STRICT_SPREAD")
        ready = group.ready()
        while not ray.wait([ready], timeout=1)[0]:
            if stopped:
                return EXIT_PREEMPTED
        share = {"num_gpus": gpus, "num_cpus": 0} if unit == "GPU" else {"num_cpus": gpus}
        actors[:] = [
            ray.remote(Node)
            .options(**share, max_concurrency=2, scheduling_strategy=PlacementGroupSchedulingStrategy(group, index))
            .remote()
            for index in range(nodes)
        ]
        if stopped:  # before there were actors
            _stop(actors)
        address, port = ray.get(actors[0].address.remote())
        meeting = {"MASTER_ADDR": address, "MASTER_PORT": str(port), START: start}
        code = _wait(
            [actor.run.remote(script, meeting | {"NODE_RANK": str(rank)}) for rank, actor in enumerate(actors)], actors
        )
        remove_placement_group(group)
        if code in (0, *FINAL) or stopped:
            break
    return EXIT_PREEMPTED if stopped and code not in (0, *FINAL) else code


def _stop(actors: list[Any]) -> None:
    for actor in actors:
        actor.stop.remote()


def _wait(runs: list[Any], actors: list[Any]) -> int:
    """The exit code of all nodes: the first that is not 0 ends the others, a node that was lost counts as 1, and a node
    that knows of a bad step or a mistake is believed."""
    import ray
    from ray.exceptions import RayError

    code, waiting = 0, runs
    while waiting:
        done, waiting = ray.wait(waiting)
        try:
            ended = ray.get(done[0])
        except RayError as error:
            print(f"a node was lost: {error}", file=sys.stderr)
            ended = 1
        if ended and not code:
            code = ended
            _stop(actors)
        elif ended in FINAL:
            code = ended
    return code


if __name__ == "__main__":
    sys.exit(run_on_nodes(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))
