"""Kubernetes manifests: a Kubeflow TrainJob with its runtime, or a plain JobSet for clusters without Kubeflow Trainer.

Both run the same pods. The resolved recipe travels in a ConfigMap; relative paths live on a volume all pods mount.
"""

from typing import Any

import yaml

from ..training.ending import START
from ..training.exit_code import FINAL
from ..training.recipe import dump_recipe
from .job import ENVIRONMENT, GRACE_S, Job, accelerate

STORAGE = "/storage"
RECIPE = "/etc/shipyard/recipe.yaml"
SAME_START = {"fieldRef": {"fieldPath": "metadata.labels['jobset.sigs.k8s.io/jobset-uid']"}}
"""JobSet labels its pods with it, those that it starts again too."""
TRAINER = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
"""The label by which Kubeflow finds the job whose container the TrainJob's `trainer` fills in."""
WHERE_KUBEFLOW = "NNODES=$PET_NNODES NODE_RANK=$PET_NODE_RANK MASTER_ADDR=$PET_MASTER_ADDR MASTER_PORT=$PET_MASTER_PORT"


def trainjob_manifest(job: Job) -> str:
    """ConfigMap, TrainingRuntime and TrainJob, trainer.kubeflow.org/v1alpha1 (Kubeflow Trainer 2).

    Its torch policy tells every pod where node 0 is, in the variables PET_*.
    """
    node = {"metadata": {"labels": TRAINER}, "spec": _job_spec(job)}
    runtime = _object("trainer.kubeflow.org/v1alpha1", "TrainingRuntime", job)
    runtime["spec"] = {
        "mlPolicy": {"numNodes": job.nodes, "torch": {}},
        "template": {
            "spec": {
                "failurePolicy": _failure_policy(job),
                "network": {"publishNotReadyAddresses": True},
                "replicatedJobs": [{"name": "node", "template": node}],
            }
        },
    }
    train = _object("trainer.kubeflow.org/v1alpha1", "TrainJob", job)
    train["spec"] = {
        "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": job.name},
        "trainer": {
            "image": job.image,
            "command": ["/bin/bash", "-euc", _pod_script(job, WHERE_KUBEFLOW)],
            "numNodes": job.nodes,
            "numProcPerNode": job.gpus,
            "resourcesPerNode": _resources(job),
        },
    }
    return _header(job, "a Kubeflow TrainJob") + _documents(_config_map(job), runtime, train)


def jobset_manifest(job: Job) -> str:
    """ConfigMap and JobSet, jobset.x-k8s.io/v1alpha2. Pods find node 0 by its name, which a JobSet fixes."""
    node_0 = f"{job.name}-node-0-0.{job.name}"
    where = f"NNODES={job.nodes} NODE_RANK=$JOB_COMPLETION_INDEX MASTER_ADDR={node_0} MASTER_PORT=29500"
    spec = _job_spec(job) | {"parallelism": job.nodes, "completions": job.nodes, "completionMode": "Indexed"}
    container = spec["template"]["spec"]["containers"][0]
    container["command"] = ["/bin/bash", "-euc", _pod_script(job, where)]
    container["resources"] = _resources(job)
    jobset = _object("jobset.x-k8s.io/v1alpha2", "JobSet", job)
    jobset["spec"] = {
        "failurePolicy": _failure_policy(job),
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": spec}}],
    }
    return _header(job, "a JobSet") + _documents(_config_map(job), jobset)


def _header(job: Job, kind: str) -> str:
    return f"""\
# {job.name}: {job.nodes} pods of {job.gpus} ranks, as {kind}, written by `shipyard launch`. kubectl apply -f THIS FILE;
# to go on after it has ended: kubectl delete -f, then apply.
# terminationGracePeriodSeconds: an evicted pod gets SIGTERM, finishes its step and saves, within {GRACE_S} s.
# failurePolicy: all pods start again together and go on from the newest save, at most {job.restarts} times after a
#   crash, after an eviction or preemption (podFailurePolicy names it: DisruptionTarget) as often as it happens, and not
#   at all after a bad step or a mistake (exit codes {_codes()}). onJobFailureMessagePatterns needs JobSet 0.10.
# publishNotReadyAddresses: the pods find each other by name while they start.
# /dev/shm: NCCL and data workers need more than the 64 MiB that containers get.
# {STORAGE}: the volume claim {job.storage} (ReadWriteMany); the recipe's relative paths, run_dir too, are there.
"""


def _job_spec(job: Job) -> dict[str, Any]:
    mounts = [
        {"name": "storage", "mountPath": STORAGE},
        {"name": "recipe", "mountPath": RECIPE.rpartition("/")[0], "readOnly": True},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    env = [{"name": START, "valueFrom": SAME_START}]
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_S,
        "containers": [{"name": "node", "image": job.image, "workingDir": STORAGE, "env": env, "volumeMounts": mounts}],
        "volumes": [
            {"name": "storage", "persistentVolumeClaim": {"claimName": job.storage}},
            {"name": "recipe", "configMap": {"name": job.name}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }
    disrupted = {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    codes = {"containerName": "node", "operator": "In", "values": sorted(FINAL)}
    rules = [{"action": "FailJob", "onExitCodes": codes}, disrupted]
    return {"backoffLimit": 0, "podFailurePolicy": {"rules": rules}, "template": {"spec": pod}}


def _failure_policy(job: Job) -> dict[str, Any]:
    """https://jobset.sigs.k8s.io/docs/tasks/failure_policy: the reason is what podFailurePolicy's FailJob gives, by
    either of its rules; the message tells which: "Container node for pod NAME failed with exit code 3 matching FailJob
    rule at index 0"."""
    reason = {"onJobFailureReasons": ["PodFailurePolicy"]}
    pattern = f"failed with exit code ({'|'.join(map(str, sorted(FINAL)))}) matching"
    final = {"name": "final", "action": "FailJobSet", **reason, "onJobFailureMessagePatterns": [pattern]}
    preempted = {"name": "preempted", "action": "RestartJobSetAndIgnoreMaxRestarts", **reason}
    return {"maxRestarts": job.restarts, "rules": [final, preempted]}


def _codes() -> str:
    return " and ".join(map(str, sorted(FINAL)))


def _resources(job: Job) -> dict[str, Any]:
    return {"limits": {"nvidia.com/gpu": str(job.gpus)}}


def _pod_script(job: Job, where: str) -> str:
    return f"PYTHON=python GPUS={job.gpus}\n{where}\n{ENVIRONMENT}{accelerate(RECIPE)}"


def _config_map(job: Job) -> dict[str, Any]:
    return _object("v1", "ConfigMap", job) | {"data": {"recipe.yaml": dump_recipe(job.recipe)}}


def _object(version: str, kind: str, job: Job) -> dict[str, Any]:
    return {"apiVersion": version, "kind": kind, "metadata": {"name": job.name}}


def _documents(*objects: dict[str, Any]) -> str:
    return yaml.dump_all(objects, Dumper=BlockDumper, sort_keys=False, allow_unicode=True, width=120)


class BlockDumper(yaml.SafeDumper):
    """Writes text of several lines as a block, to be read, where YAML can do so without a loss."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _block(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


BlockDumper.add_representer(str, _block)
