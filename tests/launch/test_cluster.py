"""Launching, what is written: scripts and manifests read well, are valid, and carry any name safely."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import pytest
import yaml
from cluster_jobs import ROOT, SLURM, plain_job, slurm_environment
from kubeflow_trainer_api.models.io_k8s_api_core_v1_config_map import IoK8sApiCoreV1ConfigMap
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob
from kubeflow_trainer_api.models.trainer_v1alpha1_training_runtime import TrainerV1alpha1TrainingRuntime
from pydantic import BaseModel, ConfigDict, Field
from shipyard.launch.cluster import CLUSTERS
from shipyard.launch.job import GRACE_S, LAUNCHER_GRACE_S, Job
from shipyard.training.recipe import load_recipe, parse_recipe

GOLDEN = ROOT / "tests" / "golden" / "cluster"
SHELLCHECK = Path(sys.executable).parent / "shellcheck"
GOLDEN_FILES = {
    "local": "local.sh",
    "slurm": "slurm.sbatch",
    "kubernetes": "trainjob.yaml",
    "jobset": "jobset.yaml",
    "skypilot": "skypilot.yaml",
    "ray": "ray.sh",
}
AWKWARD = 'it\'s a "run" $(touch owned) `touch owned` ; &é'


def awkward_recipe(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "a recipe's.yaml"
    tree = {"method": "sft", "steps": 1, "run_dir": str(folder / AWKWARD), "model": {"name": "tiny"}}
    path.write_text(yaml.safe_dump({**tree, "data": {"train": "rows.jsonl", "system": "EOF\nEND_OF_RECIPE\n'\t\n"}}))
    return path


@pytest.mark.parametrize("where", CLUSTERS)
def test_golden(where: str) -> None:
    """What users get, read as a whole in review. SHIPYARD_WRITE_GOLDEN=1 writes the files anew."""
    text, path = CLUSTERS[where].write(plain_job(where)), GOLDEN / GOLDEN_FILES[where]
    if os.environ.get("SHIPYARD_WRITE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def shell_scripts(where: str, text: str) -> str:
    """The shell in a job's file: all of it, or what a manifest runs."""
    if not text.startswith("#!"):
        last = list(yaml.safe_load_all(text))[-1]
        if where == "skypilot":
            return "#!/bin/bash\n" + last["run"]
        if where == "kubernetes":
            return "#!/bin/bash\n" + last["spec"]["trainer"]["command"][2]
        pod = last["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
        return "#!/bin/bash\n" + pod["containers"][0]["command"][2]
    return text


def test_shell_is_clean(tmp_path: Path) -> None:
    """bash -n and shellcheck, generated scripts and checked-in ones, plain names and awkward ones."""
    scripts = [*ROOT.glob("launch/*.sh"), *SLURM.iterdir()]
    scripts = [script for script in scripts if script.name != "environment.sh"]
    assert {script.name for script in scripts} >= {f"{n}.sh" for n in ("pretrain", "qlora", "dpo", "grpo", "serve")}
    recipe = awkward_recipe(tmp_path)
    for where, cluster in CLUSTERS.items():
        plain = plain_job(where)
        awkward = Job(
            **{**vars(plain), "recipe": load_recipe(recipe), "recipe_path": recipe, "folder": tmp_path / AWKWARD}
        )
        for number, job in enumerate((plain, awkward)):
            scripts.append(tmp_path / f"{where}{number}.sh")
            scripts[-1].write_text(shell_scripts(where, cluster.write(job)), encoding="utf-8")
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)
    # SC2016: an awkward name holds $(...) between single quotes, which is the point of it.
    command = [SHELLCHECK, "--shell=bash", "--exclude=SC2016", *scripts]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


MODELS = {
    "ConfigMap": IoK8sApiCoreV1ConfigMap,
    "TrainingRuntime": TrainerV1alpha1TrainingRuntime,
    "TrainJob": TrainerV1alpha1TrainJob,
    "JobSet": JobsetV1alpha2JobSet,
}


@pytest.mark.parametrize("where", ["kubernetes", "jobset"])
def test_manifests_fit_their_schemas(where: str) -> None:
    """The models that the Kubeflow project generates from its and JobSet's schemas: types hold, no key is unknown."""
    job = plain_job(where)
    objects = list(yaml.safe_load_all(CLUSTERS[where].write(job)))
    assert [item["kind"] for item in objects][-1] == {"kubernetes": "TrainJob", "jobset": "JobSet"}[where]
    for item in objects:
        model = MODELS[item["kind"]].from_dict(item)
        assert model is not None
        assert model.to_dict() == item, f"{item['kind']}: a key that the schema does not know"
        assert re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", item["metadata"]["name"])
    assert parse_recipe(yaml.safe_load(objects[0]["data"]["recipe.yaml"])) == job.recipe
    pods = objects[-2 if where == "kubernetes" else -1]["spec"]
    pods = pods.get("template", {"spec": pods})["spec"]
    assert pods["failurePolicy"]["maxRestarts"] == job.restarts
    pod = pods["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == GRACE_S > LAUNCHER_GRACE_S
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


FAILURES = [  # reason and message of a failed Job, as Kubernetes' job controller writes them
    (
        "PodFailurePolicy",
        "Container node for pod a/b-0-3-x failed with exit code 3 matching FailJob rule at index 0",
        3,
    ),
    (
        "PodFailurePolicy",
        "Container node for pod a/b-0-2-x failed with exit code 2 matching FailJob rule at index 0",
        2,
    ),
    ("PodFailurePolicy", "Pod a/b-node-0-3-x has condition DisruptionTarget matching FailJob rule at index 1", 143),
    ("BackoffLimitExceeded", "Job has reached the specified backoff limit", 1),
    ("BackoffLimitExceeded", "Job has reached the specified backoff limit", 4),
]


@pytest.mark.parametrize(("reason", "message", "code"), FAILURES)
@pytest.mark.parametrize("where", ["kubernetes", "jobset"])
def test_a_jobset_starts_again_what_a_restart_can_mend(where: str, reason: str, message: str, code: int) -> None:
    """The rules, applied as the controllers do: the first that matches counts, without one all pods start again."""
    objects = list(yaml.safe_load_all(CLUSTERS[where].write(plain_job(where))))
    spec = objects[-2 if where == "kubernetes" else -1]["spec"]
    spec = spec.get("template", {"spec": spec})["spec"]
    pods = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    assert pods[1]["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert (code in pods[0]["onExitCodes"]["values"]) == (message.endswith("index 0"))
    actions = [
        rule["action"]
        for rule in spec["failurePolicy"]["rules"]
        if reason in rule["onJobFailureReasons"]
        and any(re.search(pattern, message) for pattern in rule.get("onJobFailureMessagePatterns", [""]))
    ]
    expected = {2: "FailJobSet", 3: "FailJobSet", 143: "RestartJobSetAndIgnoreMaxRestarts"}.get(code, "RestartJobSet")
    assert [*actions, "RestartJobSet"][0] == expected


class Closed(BaseModel):
    """The part of SkyPilot's task schema that a job uses, after https://docs.skypilot.co/en/latest/reference/yaml-spec.html
    (SkyPilot 0.14, whose own schema has no name for unknown keys either)."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Recovery(Closed):
    max_restarts_on_errors: Annotated[int, Field(ge=0)]
    recover_on_exit_codes: list[Annotated[int, Field(ge=0, le=255)]]


class Resources(Closed):
    accelerators: Annotated[str, Field(pattern=r"^[A-Za-z0-9][-.\w]*:[1-9][0-9]*$")]
    image_id: Annotated[str, Field(pattern=r"^docker:\S+$")]
    job_recovery: Recovery


class Mount(Closed):
    source: Annotated[str, Field(pattern=r"^[a-z0-9]+://\S+$")]
    mode: Annotated[str, Field(pattern=r"^(MOUNT|COPY|MOUNT_CACHED)$")]


class Task(Closed):
    name: str
    num_nodes: Annotated[int, Field(ge=1)]
    resources: Resources
    file_mounts: Mapping[str, Mount]
    run: str


def test_skypilot_task_fits_its_schema_and_carries_the_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(awkward_recipe(tmp_path))
    job = Job(**{**vars(plain_job("skypilot")), "recipe": recipe})
    task = Task.model_validate(yaml.safe_load(CLUSTERS["skypilot"].write(job)))
    first, _, rest = task.run.partition("END_OF_RECIPE'\n")
    assert first.splitlines()[-1].startswith("cat >/tmp/recipe.yaml")
    copied = subprocess.run(
        ["bash"], input=f"cat <<'END_OF_RECIPE'\n{rest}".partition("\nPYTHON=")[0], capture_output=True, text=True
    )
    assert parse_recipe(yaml.safe_load(copied.stdout)) == recipe


def test_awkward_names_reach_the_ranks_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder, a recipe, an override with quotes, blanks and `$(...)`: what the launcher gets is what was typed."""
    folder = tmp_path / AWKWARD
    recipe = awkward_recipe(folder)
    python = folder / "python"
    python.write_text('#!/bin/bash\nif [ "$1" = -c ]; then echo /package; else printf "%s\\0" "$@" >"$ARGUMENTS"; fi\n')
    python.chmod(0o755)
    overrides = (f"run_dir={AWKWARD}", "data.system=two\nlines '\" \\ $HOME")
    job = Job(
        **{
            **vars(plain_job("local")),
            "recipe_path": recipe,
            "folder": folder,
            "python": str(python),
            "overrides": overrides,
        }
    )
    for where in ("local", "slurm", "ray"):
        script = tmp_path / f"{where}.sh"
        script.write_text(CLUSTERS[where].write(job), encoding="utf-8")
        environment = slurm_environment(tmp_path, nodes=1) | {"ARGUMENTS": str(tmp_path / where), "MASTER_ADDR": "head"}
        environment |= {"NODE_RANK": "0", "MASTER_PORT": "1"}
        subprocess.run(["bash", script], check=True, env=environment, cwd=tmp_path)
        got = (tmp_path / where).read_text(encoding="utf-8").split("\0")[:-1]
        assert got[-6:] == ["-m", "shipyard.launch.cli", "train", str(recipe), *overrides], where
    assert not list(tmp_path.rglob("owned"))
