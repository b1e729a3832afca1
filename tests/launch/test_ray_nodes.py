"""Ray, what happens: two nodes of a real cluster start, crash, stop and save together."""

import os
import re
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_jobs import plain_job
from shipyard.launch.job import Job
from shipyard.launch.ray_nodes import Node, ray_script
from test_cluster_start import LAUNCHER, tiny_recipe

RAY_NODE = [
    sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1", "--num-gpus=0",
    "--object-store-memory=100000000", "--dashboard-agent-listen-port=0", "--min-worker-port=0", "--max-worker-port=0",
]  # fmt: skip
"""A node of one CPU beside others on one machine: every port is a free one. It lives as long as this process."""

JOBS = "RAY_API_SERVER_ADDRESS"
"""The variable with the address that takes jobs, which comes before RAY_ADDRESS."""


@pytest.fixture(scope="module")
def nodes() -> Iterator[dict[str, str]]:
    """The environment of a driver, and of `ray job`; its cluster is two nodes on this machine."""
    with socket.socket() as first, socket.socket() as second, socket.socket() as third:
        for free in (first, second, third):
            free.bind(("127.0.0.1", 0))
        port, clients, jobs = (free.getsockname()[1] for free in (first, second, third))
    head = ["--head", f"--port={port}", f"--ray-client-server-port={clients}", f"--dashboard-port={jobs}"]
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:  # Ray's sockets take no longer path
        environment = os.environ | {"RAY_TMPDIR": folder, "OMP_NUM_THREADS": "1"}
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(), "RAY_USAGE_STATS_ENABLED": "0"}
        environment.pop("RAY_ADDRESS", None)
        started: list[subprocess.Popen[bytes]] = []
        try:
            for role in (head, [f"--address=127.0.0.1:{port}"]):
                started.append(subprocess.Popen([*RAY_NODE, *role], env=environment, stdout=subprocess.DEVNULL))
                wait_for_door(port, started[0])
            wait_for_door(jobs, started[0])
            yield environment | {"RAY_ADDRESS": f"127.0.0.1:{port}", JOBS: f"http://127.0.0.1:{jobs}"}
        finally:
            for node in reversed(started):
                node.terminate()
            for node in started:
                node.wait(100)


def wait_for_door(port: int, node: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 300
    while node.poll() is None and time.monotonic() < until:
        with socket.socket() as door:
            if door.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError(f"ray start opened no port; exit code {node.poll()}")


def standing_in(folder: Path, **told: str) -> tuple[Path, Path]:
    """The script of a job whose launchers only note that they ran, and end as told; and what they note."""
    folder = folder / "it's here"
    folder.mkdir()
    python, script, notes = (folder / name for name in ("python", "job.sh", "notes"))
    told["NOTES"] = str(notes)
    told_here = "".join(f"export {name}={shlex.quote(text)}\n" for name, text in told.items())
    # One that ends takes the other with it: both first note that they ran.
    ends = 'if [ -n "${TELLS'
    together = 'while [ $(($(grep -c rank "$NOTES") % 2)) = 1 ]; do sleep 0.05; done\n'
    assert ends in LAUNCHER
    python.write_text("#!/bin/bash\n" + told_here + LAUNCHER.replace(ends, together + ends))
    python.chmod(0o755)
    script.write_text(ray_script(Job(**{**vars(plain_job("ray")), "gpus": 1, "python": str(python), "folder": folder})))
    return script, notes


def driver(script: Path, restarts: int) -> list[str]:
    return [sys.executable, "-m", "shipyard.launch.ray_nodes", "2", "1", str(restarts), str(script)]


@pytest.mark.parametrize(("tells", "attempts"), [("4", 2), ("2", 1), ("3", 1)])
def test_ray_starts_a_crash_again_on_another_port(
    nodes: dict[str, str], tmp_path: Path, tells: str, attempts: int
) -> None:
    """At most as often as it may; what comes out the same again (2, 3) is not started again."""
    script, notes = standing_in(tmp_path, ENDS="1", TELLS=tells)
    done = subprocess.run(driver(script, restarts=1), env=nodes, capture_output=True, text=True, timeout=600)
    assert done.returncode == int(tells), done.stderr
    lines = [line for line in notes.read_text().splitlines() if line != "saved"]
    assert sorted(line.split()[1] for line in lines) == sorted(["0", "1"] * attempts)
    meetings = {line.split()[-1] for line in lines}
    assert len(meetings) == attempts
    assert all(meeting.count(":") == 1 and not meeting.startswith(":") for meeting in meetings)


def test_ray_saves_on_every_node_when_the_job_is_stopped(nodes: dict[str, str], tmp_path: Path) -> None:
    script, notes = standing_in(tmp_path)
    process = subprocess.Popen(driver(script, restarts=1), env=nodes)
    until = time.monotonic() + 600
    while time.monotonic() < until and not (notes.is_file() and notes.read_text().count("rank") == 2):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(600) == 143
    assert notes.read_text().count("saved") == 2
    assert notes.read_text().count("rank") == 2


def test_a_node_that_is_stopped_before_it_runs_does_not_run_on(tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text("exec sleep 20\n")
    node = Node()
    node.stop()
    assert node.run(str(script), {}) == -signal.SIGTERM


def test_two_nodes_of_ray_train(
    nodes: dict[str, str], tmp_path: Path, tiny_model: Path, chat_rows: Path, shipyard
) -> None:
    recipe = tiny_recipe(tmp_path, tiny_model, chat_rows, steps=2)
    script = tmp_path / "job.sh"
    script.write_text(shipyard("launch", recipe, "--on", "ray", "--nodes", "2", "--gpus", "1", "--dry-run").stdout)
    done = subprocess.run(driver(script, restarts=0), env=nodes, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "it's a run"
    assert (run / "model" / "model.safetensors").is_file()
    assert len((run / "log.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_ray_takes_a_job_and_a_stopped_one_has_saved(
    nodes: dict[str, str], tmp_path: Path, tiny_model: Path, chat_rows: Path, shipyard
) -> None:
    """As a user does it: the script submits itself, `ray job stop` ends it."""
    recipe = tiny_recipe(tmp_path, tiny_model, chat_rows, steps=4000)
    script, log = tmp_path / "job.sh", tmp_path / "it's a run" / "log.jsonl"
    script.write_text(shipyard("launch", recipe, "--on", "ray", "--nodes", "2", "--gpus", "1", "--dry-run").stdout)
    environment = nodes | {"PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"}

    def said(*command: str | Path) -> str:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    found = re.search(r"raysubmit_\w+", said("bash", script))
    assert found is not None
    until = time.monotonic() + 600
    while time.monotonic() < until and not log.is_file():
        time.sleep(0.1)
    assert "was stopped" in said("ray", "job", "stop", found[0])
    steps = len(log.read_text().splitlines())
    assert 0 < steps < 4000
    assert (log.parent / f"step-{steps:06d}").is_dir()
    assert len(list((log.parent / f"step-{steps:06d}").glob("rank-*.safetensors"))) == 2
