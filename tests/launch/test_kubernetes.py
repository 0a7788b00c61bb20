"""The Kubernetes manifests: against the published schemas, and their command run with the variables of two pods."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import tomllib

import pytest
import yaml

from tests.launch import short_runs

FOLDER = short_runs.ROOT / "launch" / "kubernetes"
IMAGE_SCRIPTS = {"dptrain-torchrun": str(short_runs.ROOT / "launch" / "torchrun.sh"), "torchrun": "torchrun"}


def documents(name):
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


@pytest.mark.parametrize("version", ["1.29", "1.37"])
def test_the_job_and_its_service_follow_the_schemas(version):
    """Both documents are valid in the oldest release that they are for and in a new one, without an unknown field."""
    validate = pytest.importorskip("kubernetes_validate").validate
    kinds = [document["kind"] for document in documents("job.yaml")]
    assert kinds == ["Service", "Job"]
    for document in documents("job.yaml"):
        validate(document, version, strict=True)


def test_a_field_that_kubernetes_does_not_know_is_found():
    """The schemas refuse what the manifests must not have."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    _, job = documents("job.yaml")
    job["spec"]["completionsMode"] = "Indexed"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.37", strict=True)


def lost_fields(given, kept, path=""):
    """The fields of a manifest that its model did not take."""
    if isinstance(given, dict):
        return [
            lost
            for name, value in given.items()
            for lost in (
                lost_fields(value, kept[name], f"{path}.{name}")
                if isinstance(kept, dict) and name in kept
                else [f"{path}.{name}"]
            )
        ]
    if isinstance(given, list):
        return [
            lost for number, value in enumerate(given) for lost in lost_fields(value, kept[number], f"{path}[{number}]")
        ]
    return []


def test_the_train_job_follows_the_models_of_kubeflow_trainer():
    """Each field of the TrainJob is one that Kubeflow Trainer's own models know, with a value that they take."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    (manifest,) = documents("trainjob.yaml")
    job = models.TrainerV1alpha1TrainJob.from_dict(manifest)
    assert manifest["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
    assert lost_fields(manifest, job.to_dict()) == []
    manifest["spec"]["trainer"]["elasticPolicy"] = {"maxNodes": 3}
    again = models.TrainerV1alpha1TrainJob.from_dict(manifest)
    assert lost_fields(manifest, again.to_dict()) == [".spec.trainer.elasticPolicy"]


def test_the_pods_and_the_image_agree():
    """Both pods fit the job, the service selects them, and a pod that cannot get better is not started again."""
    service, job = documents("job.yaml")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    variables = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert spec["completions"] == spec["parallelism"] == int(variables["NNODES"])
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert variables["HEAD"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    image_files = (short_runs.ROOT / "Dockerfile").read_text()
    assert f"/usr/local/bin/{container['command'][0]}" in image_files


def free_port():
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_pods(container, *, run_dir, task, variables):
    """Run a container's command as two processes of this machine, each with the variables of its pod."""
    own = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry and entry["name"] != "HOME"}
    arguments = list(container["args"])
    arguments[arguments.index("--run-dir") + 1] = str(run_dir)
    position = arguments.index("--task")
    arguments[position : position + 2] = task
    command = [IMAGE_SCRIPTS[container["command"][0]], *container["command"][1:], *arguments]
    pods = [
        subprocess.Popen(
            command,
            env=short_runs.environment(**own | variables(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [pod.communicate(timeout=200)[0] for pod in pods]
    finally:
        for pod in pods:
            pod.kill()
            pod.wait()
    assert [pod.returncode for pod in pods] == [0, 0], "\n".join(outputs)


def of_job(port):
    """The container of the Indexed Job, and what its fields come to in pod `rank`, on loopback."""
    (container,) = documents("job.yaml")[1]["spec"]["template"]["spec"]["containers"]
    return container, lambda rank: {"NODE_RANK": str(rank), "HEAD": "127.0.0.1", "PORT": str(port), "NPROC": "1"}


def of_train_job(port):
    """The container of the TrainJob, and the variables that Trainer sets on node `rank`, on loopback."""
    container = documents("trainjob.yaml")[0]["spec"]["trainer"]
    of_trainer = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": "127.0.0.1"}
    return container, lambda rank: of_trainer | {"PET_NODE_RANK": str(rank), "PET_MASTER_PORT": str(port)}


@pytest.mark.parametrize("container_of", [of_job, of_train_job])
def test_the_command_of_the_pods_trains(container_of, tmp_path):
    """Two processes with the command and the variables of two pods train one run to its end, with exit code 0."""
    container, variables = container_of(free_port())
    run_pods(container, run_dir=tmp_path / "run", task=short_runs.write_task(tmp_path), variables=variables)
    rows = short_runs.train_rows(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert rows[-1]["progress/samples"] == 240
    assert {row["time/world_size"] for row in rows} == {2}


def test_the_validators_are_development_tools():
    """What this file needs is installed by `make env`, so that no test here is skipped in CI."""
    project = tomllib.loads((short_runs.ROOT / "pyproject.toml").read_text())["project"]
    wanted = " ".join(project["optional-dependencies"]["dev"])
    assert "kubernetes-validate" in wanted
    assert "kubeflow-trainer-api" in wanted
