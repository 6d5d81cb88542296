"""The files for Kubernetes and SkyPilot fit the schema of Kubernetes, the launcher, the configs, and each other.

``test_slurm_training.py`` runs the files for Slurm.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from typing import Any

import kubernetes_validate
import pytest
import yaml
from torch.distributed.run import get_args_parser

from launch.train import build_parser
from pipeline.checkpoint.layout import split_url
from pipeline.config.loading import load_config
from pipeline.config.schema import Config
from tests.support.runs import REPOSITORY

KUBERNETES = REPOSITORY / "launch" / "kubernetes" / "train.yaml"
SKYPILOT = REPOSITORY / "launch" / "skypilot" / "train.yaml"
KUBERNETES_VERSION = "1.34"


def parse_command(command: list[str]) -> tuple[Any, Config]:
    """Return the options of torchrun, and the config of the run, of a complete command."""
    assert command[0].endswith("torchrun")
    launcher = get_args_parser().parse_args(command[1:])
    is_train = launcher.training_script == ("launch.train" if launcher.module else "launch/train.py")
    assert is_train, launcher.training_script
    train = build_parser().parse_args(launcher.training_script_args)
    return launcher, load_config(train.config, train.set)


def parse_container(container: dict[str, Any], index: int) -> tuple[Any, Config]:
    """Return what ``parse_command`` returns, for the pod with this index.

    Kubernetes replaces $(JOB_COMPLETION_INDEX), because each container of an Indexed Job has this variable.
    """
    words = [word.replace("$(JOB_COMPLETION_INDEX)", str(index)) for word in container["command"] + container["args"]]
    return parse_command(words)


@pytest.fixture(scope="module")
def documents() -> dict[str, Any]:
    """Return the objects in the file for Kubernetes, by kind. A Job stands for the template of the JobSet."""
    documents = {each["kind"]: each for each in yaml.safe_load_all(KUBERNETES.read_text())}
    (template,) = documents["JobSet"]["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": template["name"]}, **template["template"]}
    return {**documents, "Job": job}


@pytest.mark.parametrize("kind", ["PersistentVolumeClaim", "Job"])
def test_kubernetes_knows_every_key(documents: dict[str, Any], kind: str) -> None:
    kubernetes_validate.validate(documents[kind], KUBERNETES_VERSION, strict=True)


def test_the_jobset_has_one_pod_per_node_with_a_name_that_the_launcher_knows(documents: dict[str, Any]) -> None:
    """JobSet names the pods NAME-JOB-INDEX-POD.SUBDOMAIN."""
    jobset = documents["JobSet"]
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert jobset["spec"].keys() == {"failurePolicy", "network", "replicatedJobs"}
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    (nodes,) = jobset["spec"]["replicatedJobs"]
    job = nodes["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    launcher, _ = parse_container(container, index=1)

    assert nodes["replicas"] == 1 and job["backoffLimit"] == 0 and job["completionMode"] == "Indexed"
    assert launcher.nnodes == str(job["parallelism"]) == str(job["completions"])
    assert launcher.nproc_per_node == str(container["resources"]["limits"]["nvidia.com/gpu"])
    network = jobset["spec"]["network"]
    # The pods know who keeps the store, and wait ten minutes for each other. With c10d, they wait only one minute.
    assert launcher.rdzv_backend == "static" and not launcher.rdzv_endpoint and not launcher.rdzv_conf
    assert launcher.node_rank == 1 and parse_container(container, index=0)[0].node_rank == 0
    assert launcher.master_addr == f"{jobset['metadata']['name']}-{nodes['name']}-0-0.{network['subdomain']}"
    assert network["enableDNSHostnames"] and network["publishNotReadyAddresses"]
    assert [launcher.master_port] == [each["containerPort"] for each in container["ports"]]
    assert launcher.shutdown_timeout < pod["terminationGracePeriodSeconds"]


def test_all_pods_share_the_run_folder_and_the_data(documents: dict[str, Any]) -> None:
    pod = documents["Job"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    _, config = parse_container(container, index=0)
    claims = {each["name"]: each.get("persistentVolumeClaim", {}).get("claimName") for each in pod["volumes"]}
    mounts = {each["mountPath"]: claims[each["name"]] for each in container["volumeMounts"]}
    claim = documents["PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert config.run.device == "cuda", "with auto, a driver that is too old would let eight ranks train on the CPU"
    for path in (config.run.out_dir, config.data.path):
        assert path and path.startswith("/work/")
    assert mounts["/work"] == claim["metadata"]["name"] and mounts["/dev/shm"] is None


def test_skypilot_resumes_from_the_bucket() -> None:
    task = yaml.safe_load(SKYPILOT.read_text())
    # https://docs.skypilot.co/en/latest/reference/yaml-spec.html
    assert task.keys() == {"name", "num_nodes", "workdir", "envs", "resources", "file_mounts", "setup", "run"}
    assert task["resources"].keys() == {"accelerators", "use_spot", "disk_size", "job_recovery"}
    assert task["num_nodes"] == 1 and task["resources"]["use_spot"] is True

    variables = {**task["envs"], "SKYPILOT_NUM_GPUS_PER_NODE": task["resources"]["accelerators"].partition(":")[2]}
    used = set(re.findall(r"\$\{?(\w+)", task["run"] + task["setup"] + str(task["file_mounts"])))
    assert used <= variables.keys()
    for text in (task["run"], task["setup"]):
        assert subprocess.run(["bash", "-n", "-c", text]).returncode == 0
    script = task["run"].replace("\\\n", " ")
    command = re.sub(r"\$\{?(\w+)\}?", lambda match: variables[match[1]], script)
    launcher, config = parse_command(shlex.split(command))
    assert launcher.standalone and launcher.nproc_per_node == "8"
    assert config.checkpoint.remote and split_url(config.checkpoint.remote) == ("s3://my-bucket/gpt2", None)
    assert config.checkpoint.resume == "auto" and config.run.device == "cuda"
    assert config.data.path in task["file_mounts"]
    assert "[remote]" in task["setup"]
