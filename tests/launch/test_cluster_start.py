"""Launching, what happens: jobs start, stop, save and go on as they say; mistakes are told first."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from cluster_jobs import ROOT, plain_job, slurm_environment
from shipyard.launch.cli import run_command
from shipyard.launch.cluster import CLUSTERS, launch
from shipyard.launch.job import ENVIRONMENT, Job
from shipyard.training.recipe import load_recipe

LAUNCHER = """#!/bin/bash
# In place of Accelerate's launcher: notes its rank and port, trains or ends as told; on SIGTERM it saves, ends with 1.
if [ "$1" = -c ]; then echo /package; exit; fi
if [ "$2" = shipyard.launch.node ]; then exec PYTHON "$@"; fi
trap 'sleep 0.3; echo saved >>"$NOTES"; echo -n "${AT_TERM:-143}" >"$SHIPYARD_EXIT_CODES/1"; exit 1' TERM
while [ "$1" != --machine_rank ]; do shift; done
echo "rank $2 of ${NNODES:-1} at ${MASTER_ADDR:-}:${MASTER_PORT:-}" >>"$NOTES"
if [ "$2" = "${TRAINS:-none}" ]; then
    while [ "$1" != train ]; do shift; done
    PYTHON -m shipyard.launch.cli "$@" || exit 1
fi
if [ -n "${TELLS:-}" ]; then echo -n "$TELLS" >"$SHIPYARD_EXIT_CODES/1"; fi
if [ -n "${ENDS:-}" ]; then exit "$ENDS"; fi
while :; do sleep 0.05; done
""".replace("PYTHON", shlex.quote(sys.executable))


@pytest.fixture
def slurm_job(tmp_path: Path) -> tuple[Path, dict[str, str], Path]:
    """A job's script for two nodes, its environment, and what its launchers note."""
    python = tmp_path / "python"
    python.write_text(LAUNCHER)
    python.chmod(0o755)
    script, notes = tmp_path / "job.sbatch", tmp_path / "notes"
    job = Job(**{**vars(plain_job("slurm")), "python": str(python), "folder": tmp_path})
    script.write_text(CLUSTERS["slurm"].write(job))
    return script, slurm_environment(tmp_path, nodes=2) | {"NOTES": str(notes)}, notes


def test_slurm_preemption_saves_everywhere_and_requeues(slurm_job, tmp_path: Path) -> None:
    script, environment, notes = slurm_job
    process = subprocess.Popen(["bash", script], env=environment)
    until = time.monotonic() + 120
    while time.monotonic() < until and not (notes.is_file() and notes.read_text().count("rank") == 2):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)  # impatience must not cut the save short
    assert process.wait(120) == 143
    assert notes.read_text().count("saved") == 2
    assert (tmp_path / "scontrol.log").read_text() == "requeue 7\n"


@pytest.mark.parametrize(
    ("ends", "tells", "code", "attempts"),
    [("0", "", 0, 1), ("1", "", 1, 4), ("1", "4", 4, 4), ("1", "2", 2, 1), ("1", "3", 3, 1)],
)
def test_slurm_crash_starts_again_on_another_port(
    slurm_job, tmp_path: Path, ends: str, tells: str, code: int, attempts: int
) -> None:
    """What comes out the same again is not started again; a silent rank (4) is."""
    script, environment, notes = slurm_job
    environment |= {"ENDS": ends, "TELLS": tells}
    done = subprocess.run(["bash", script], env=environment, capture_output=True, timeout=120)
    assert done.returncode == code
    lines = notes.read_text().splitlines()
    assert sorted(line.split()[1] for line in lines) == sorted(["0", "1"] * attempts)
    assert len({line.rpartition(":")[2] for line in lines}) == attempts
    assert not (tmp_path / "scontrol.log").exists()


@pytest.mark.parametrize(("start", "attempts"), [("slurm-7-0", 1), ("slurm-6-0", 4), ("slurm-7-1", 4)])
def test_slurm_heeds_what_the_ranks_left_where_srun_hides_it(
    slurm_job, tmp_path: Path, start: str, attempts: int
) -> None:
    """srun ends with its worst code, that of a node which was killed because another one ended."""
    script, environment, notes = slurm_job
    left = tmp_path / "runs" / "llama-8b" / "ended"
    left.parent.mkdir(parents=True)
    left.write_text(f"3 {start}\nhealth: step 2\n")
    done = subprocess.run(["bash", script], env=environment | {"ENDS": "137"}, timeout=120)
    assert done.returncode == (3 if attempts == 1 else 137)
    assert notes.read_text().count("rank 0") == attempts


def test_slurm_heeds_ranks_that_cannot_read_their_recipe(slurm_job) -> None:
    """Which says where the run folder is, and where to leave word; the script knows it too."""
    script, environment, notes = slurm_job
    environment |= {"TRAINS": "0", "ENDS": "137"}
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert notes.read_text().count("rank 0") == 1
    assert done.stderr.count("/home/me/recipes/llama.yaml is not a file") == 1


def test_slurm_requeues_no_bad_step(slurm_job, tmp_path: Path) -> None:
    """SIGTERM came while a bad step was on its way: the job would only go back into the queue to end."""
    script, environment, notes = slurm_job
    process = subprocess.Popen(["bash", script], env=environment | {"AT_TERM": "3"})
    until = time.monotonic() + 120
    while time.monotonic() < until and not (notes.is_file() and notes.read_text().count("rank") == 2):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 3
    assert not (tmp_path / "scontrol.log").exists()


def test_local_crash_starts_again(slurm_job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    _, environment, notes = slurm_job
    for name in ("NOTES", "PATH"):
        monkeypatch.setenv(name, environment[name])
    changes = {"python": str(tmp_path / "python"), "folder": tmp_path, "restarts": 2}
    job = Job(**{**vars(plain_job("local")), **changes})
    monkeypatch.setenv("ENDS", "5")
    assert launch(job, "local", tmp_path / "local.sh") == 5
    assert notes.read_text().count("rank 0 of 1") == 3
    assert capfd.readouterr().err.count("starting again") == 2
    monkeypatch.setenv("ENDS", "0")
    assert launch(job, "local", tmp_path / "local.sh") == 0
    assert notes.read_text().count("rank 0 of 1") == 4


@pytest.mark.parametrize(("tells", "attempts"), [("3", 1), ("4", 3), ("2", 1)])
def test_a_local_job_ends_with_its_ranks_own_code(
    tells: str, attempts: int, slurm_job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    """Accelerate's launcher ends with 1 whatever its ranks say. A bad step (3) or a mistake (2) comes out the same."""
    _, environment, notes = slurm_job
    for name in ("NOTES", "PATH"):
        monkeypatch.setenv(name, environment[name])
    monkeypatch.setenv("ENDS", "1")
    monkeypatch.setenv("TELLS", tells)
    changes = {"python": str(tmp_path / "python"), "folder": tmp_path, "restarts": 2}
    job = Job(**{**vars(plain_job("local")), **changes})
    assert launch(job, "local", tmp_path / "local.sh") == int(tells)
    assert notes.read_text().count("rank 0 of 1") == attempts
    assert ("is not started again" in capfd.readouterr().err) == (attempts == 1)


RECIPE = str(ROOT / "launch" / "recipes" / "llama3-8b-qlora.yaml")
MISTAKES = [
    (["gone.yaml"], "gone.yaml is not a file"),
    ([RECIPE, "optim.lrr=1"], "did you mean 'optim.lr'"),
    ([RECIPE, "--nodes", "0", "--on", "slurm"], "nodes: 0"),
    ([RECIPE, "--nodes", "2"], "nodes: 2, this machine is one"),
    ([RECIPE, "--gpus", "8", "--nodes", "9", "--on", "slurm"], "batch.size: 64 samples cannot feed 72 ranks"),
    ([RECIPE, "resume=never", "--on", "slurm"], "resume: never"),
    ([RECIPE, "--on", "kubernetes", "--storage", "x"], "image: kubernetes starts containers"),
    ([RECIPE, "--on", "jobset", "--image", "x", "--storage", "a b"], "storage: 'a b'"),
    ([RECIPE, "--on", "skypilot", "--image", "x"], "give --storage s3://BUCKET"),
    ([RECIPE, "--on", "moon"], "'--on'"),
]


@pytest.mark.parametrize(("arguments", "said"), MISTAKES, ids=[said for _, said in MISTAKES])
def test_mistakes_are_one_line_and_write_nothing(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(["launch", *arguments]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert said in errors
    assert not list(tmp_path.iterdir())


def test_a_job_is_not_written_over_its_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(Path(RECIPE).read_text())
    monkeypatch.chdir(tmp_path)
    assert run_command(["launch", str(recipe), "--on", "slurm", "--out", "mine.yaml"]) == 2
    assert "out: mine.yaml is the recipe itself" in capsys.readouterr().err
    assert recipe.read_text() == Path(RECIPE).read_text()


def test_written_then_started_or_said_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tools = tmp_path / "tools"
    tools.mkdir()
    monkeypatch.setenv("PATH", str(tools))
    command = ["launch", RECIPE, "run_dir=my runs/a", "--on", "slurm", "--nodes", "2"]
    assert run_command([*command, "--dry-run"]) == 0
    script = capfd.readouterr().out
    assert script.startswith("#!/bin/bash\n#SBATCH")
    assert not (tmp_path / "my runs").exists()

    assert run_command(command) == 2
    written = tmp_path / "my runs/a/launch/shipyard-a.sbatch"
    errors = capfd.readouterr().err
    assert errors.startswith("shipyard: error: sbatch: not found on this machine")
    assert "sbatch 'my runs/a/launch/shipyard-a.sbatch'" in errors
    assert written.read_text() == script

    sbatch = tools / "sbatch"
    sbatch.write_text('#!/bin/bash\necho "Submitted $1"\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    assert run_command([*command, "--out", "other.sbatch"]) == 0
    assert "Submitted other.sbatch" in capfd.readouterr().out
    sbatch.write_text("#!/bin/bash\necho 'invalid partition' >&2; exit 1\n")
    assert run_command(command) == 2
    assert "sbatch: refused my runs/a/launch/shipyard-a.sbatch: invalid partition" in capfd.readouterr().err


def test_checked_in_scripts_set_what_generated_ones_set() -> None:
    """One text says how ranks start; ranks.sh and six generators must not drift apart."""
    text = (ROOT / "launch" / "ranks.sh").read_text()
    assert ENVIRONMENT in text
    launcher = text[text.index("exec ") :].replace("launch/accelerate/nodes.yaml", '"$config"')
    generated = CLUSTERS["local"].write(plain_job("local"))
    assert launcher.split("train ")[0] == generated[generated.index("exec ") :].split("train ")[0]
    for name in ("pretrain", "qlora", "dpo", "grpo"):
        found = re.search(r"RECIPE:-(\S+\.yaml)", (ROOT / "launch" / f"{name}.sh").read_text())
        assert found is not None
        assert load_recipe(ROOT / found[1]).method == {"qlora": "sft"}.get(name, name)


def test_scripts_for_several_machines(tmp_path: Path) -> None:
    """NNODES, NODE_RANK, MASTER_ADDR, GPUS and overrides become Accelerate's flags; a missing address is said."""
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "GPUS": "4", "NNODES": "2", "NODE_RANK": "1"}
    command = [ROOT / "launch" / "dpo.sh", "dpo.beta=0.2", "run_dir=a b"]
    refused = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "MASTER_ADDR: the address of the machine with NODE_RANK=0" in refused.stderr
    done = subprocess.run(
        command, env=environment | {"MASTER_ADDR": "10.0.0.1"}, capture_output=True, text=True, check=True
    )
    words = done.stdout.splitlines()
    flags = shlex.split(
        "--num_machines 2 --machine_rank 1 --num_processes 8 --main_process_ip 10.0.0.1 --main_process_port 29500"
    )
    assert words[words.index("--num_machines") :][: len(flags)] == flags
    assert words[-4:] == ["train", "launch/recipes/llama3-8b-dpo.yaml", "dpo.beta=0.2", "run_dir=a b"]


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"GPUS": "0"}, "GPUS=0"),
        ({"GPUS": "-2"}, "GPUS: '-2' is no count"),
        ({"GPUS": "2", "NNODES": "two"}, "NNODES: 'two' is no count"),
        ({"GPUS": "2", "NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}, "rank 2 of NNODES=2"),
    ],
)
def test_a_script_refuses_ranks_that_cannot_be(variables: dict[str, str], said: str) -> None:
    environment = os.environ | {"PYTHON": "echo"} | variables
    done = subprocess.run([ROOT / "launch" / "qlora.sh"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ranks.sh: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_files_are_what_the_code_uses(stage: int) -> None:
    """For people who give DeepSpeed's file to Accelerate themselves: what a recipe decides is "auto", the rest ours."""
    import torch
    from shipyard.training.zero import deepspeed_config

    recipe = load_recipe(ROOT / "launch" / "recipes" / "llama3-8b-pretrain.yaml", [f"parallel.engine=zero{stage}"])
    config = deepspeed_config(recipe, rounds=4)
    config |= dict.fromkeys(
        ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"
    )
    assert config["zero_optimization"]["overlap_comm"] is torch.cuda.is_available()
    config["zero_optimization"]["overlap_comm"] = True  # these files are for GPUs
    path = ROOT / "launch" / "deepspeed" / f"zero{stage}.json"
    if os.environ.get("SHIPYARD_WRITE_GOLDEN"):
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    assert json.loads(path.read_text()) == config


def tiny_recipe(folder: Path, model: Path, rows: Path, steps: int) -> Path:
    tree = {"method": "sft", "steps": steps, "run_dir": str(folder / "it's a run"), "data": {"train": str(rows)}}
    tree |= {"model": {"name": str(model), "dtype": "float32"}, "batch": {"size": 8, "micro": 2}}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_local_launch_trains_on_two_ranks(tmp_path: Path, tiny_model: Path, chat_rows: Path, shipyard) -> None:
    recipe = tiny_recipe(tmp_path, tiny_model, chat_rows, steps=2)
    done = shipyard("launch", recipe, "optim.lr=1e-3", "--on", "local", "--gpus", "2")
    assert "on 2 ranks (cpu)" in done.stdout
    run = tmp_path / "it's a run"
    assert (run / "model" / "model.safetensors").is_file()
    assert len((run / "log.jsonl").read_text().splitlines()) == 2
    assert yaml.safe_load((run / "recipe.yaml").read_text())["optim"]["lr"] == 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("where", ["local", "slurm"])
def test_real_training_saves_on_sigterm_and_goes_on(
    where: str, tmp_path: Path, tiny_model: Path, chat_rows: Path, shipyard
) -> None:
    """Two real ranks, for Slurm on two nodes: SIGTERM saves within a step, exit code 143, the same command goes on."""
    recipe = tiny_recipe(tmp_path, tiny_model, chat_rows, steps=400)
    nodes, gpus = ("1", "2") if where == "local" else ("2", "1")
    arguments = ["launch", str(recipe), "--on", where, "--nodes", nodes, "--gpus", gpus]
    cli = [sys.executable, "-m", "shipyard.launch.cli", *arguments]
    if where == "slurm":
        script = tmp_path / "job.sbatch"
        script.write_text(shipyard(*arguments, "--dry-run").stdout)
        cli = ["bash", str(script)]
    environment = slurm_environment(tmp_path, nodes=2) | {"OMP_NUM_THREADS": "1"}
    log = tmp_path / "it's a run" / "log.jsonl"
    before = 0
    for _ in range(2):
        process = subprocess.Popen(cli, env=environment)
        until = time.monotonic() + 200
        while time.monotonic() < until and not (log.is_file() and len(log.read_text().splitlines()) > before + 3):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(100) == 143
        steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) > before
        assert (log.parent / f"step-{len(steps):06d}").is_dir()
        before = len(steps)
