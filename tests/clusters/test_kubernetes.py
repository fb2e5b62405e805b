"""The Kubernetes manifests: what the API server would refuse, what must agree, and the pods' commands as they run."""

import copy
import signal
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest

from dialogpt_ds.commandline import parse
from dialogpt_ds.config.arguments import TrainingArguments
from tests.clusters.manifests import Pod, documents, pod_of_job, pods_of_pytorchjob
from tests.clusters.small_run import SmallWorld, options
from tests.helpers.output_folder import latest, steps_done
from tests.ranks.launch import BIN, Launched, free_port
from tests.ranks.run_tasks import losses_of

OLDEST = "1.31"
"""The release in which podFailurePolicy has become stable."""
RELEASES = (OLDEST, kubernetes_validate.latest_version())
PODS = {"Job": pod_of_job()} | pods_of_pytorchjob()

# The fields of PyTorchJob in release 1.9 of the training operator (its Python package kubeflow-training 1.9.4 lists
# them).
PYTORCHJOB_FIELDS = {
    "PyTorchJob": {"apiVersion", "kind", "metadata", "spec", "status"},
    "spec": {"elasticPolicy", "nprocPerNode", "pytorchReplicaSpecs", "runPolicy"},
    "runPolicy": {
        "activeDeadlineSeconds", "backoffLimit", "cleanPodPolicy", "managedBy", "schedulingPolicy", "suspend",
        "ttlSecondsAfterFinished",
    },
    "replica": {"replicas", "restartPolicy", "template"},
}  # fmt: skip


# What the API server would say.


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("kubernetes_job.yaml", "Job"),
        ("kubernetes_job.yaml", "Service"),
        ("kubernetes_volume.yaml", "PersistentVolumeClaim"),
    ],
)
def test_the_manifests_follow_kubernetes_own_schemas(release: str, file: str, kind: str) -> None:
    document = documents(file)[kind]
    kubernetes_validate.validate(document, release, strict=True)
    misspelt = copy.deepcopy(document)
    misspelt["spec"]["clusterIp"] = "None"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(misspelt, release, strict=True)


@pytest.mark.parametrize("release", RELEASES)
def test_the_pytorchjob_has_the_operators_fields_and_pods_of_kubernetes(release: str) -> None:
    job = documents("kubernetes_pytorchjob.yaml")["PyTorchJob"]
    spec = job["spec"]
    assert job["apiVersion"] == "kubeflow.org/v1"
    assert set(job) <= PYTORCHJOB_FIELDS["PyTorchJob"]
    assert set(spec) <= PYTORCHJOB_FIELDS["spec"]
    assert set(spec["runPolicy"]) <= PYTORCHJOB_FIELDS["runPolicy"]
    assert spec["runPolicy"]["cleanPodPolicy"] in ("All", "Running", "None")
    assert set(spec["pytorchReplicaSpecs"]) == {"Master", "Worker"}
    assert spec["pytorchReplicaSpecs"]["Master"]["replicas"] == 1
    assert isinstance(spec["nprocPerNode"], str)
    for replica in spec["pytorchReplicaSpecs"].values():
        assert set(replica) == PYTORCHJOB_FIELDS["replica"]
        assert replica["restartPolicy"] == "ExitCode"
        template = replica["template"]
        kubernetes_validate.validate(
            {"apiVersion": "v1", "kind": "PodTemplate", "template": template}, release, strict=True
        )
        assert Pod(template).container["name"] == "pytorch"
        assert "restartPolicy" not in template["spec"], "the operator sets it"


def test_the_jobs_rules_for_failed_pods_are_ones_that_the_api_takes() -> None:
    """What the API server checks beyond the schema."""
    spec = documents("kubernetes_job.yaml")["Job"]["spec"]
    assert spec["template"]["spec"]["restartPolicy"] == "Never", "podFailurePolicy needs it"
    assert spec["podReplacementPolicy"] == "Failed", "podFailurePolicy allows no other"
    for rule in spec["podFailurePolicy"]["rules"]:
        assert set(rule) in ({"action", "onExitCodes"}, {"action", "onPodConditions"})
        codes = rule.get("onExitCodes")
        if codes:
            assert codes["operator"] == "In"
            assert 0 not in codes["values"]
            assert codes["values"] == sorted(set(codes["values"]))
            assert codes["containerName"] == pod_of_job().container["name"]


@pytest.mark.parametrize(
    ("code", "disrupted", "action"),
    [
        (2, False, "FailJob"),
        (75, False, "Ignore"),
        (75, True, "Ignore"),
        (137, True, "Ignore"),
        (1, False, "Count"),
        (137, False, "Count"),
    ],
)
def test_what_the_job_does_about_a_pod_that_ended(code: int, disrupted: bool, action: str) -> None:
    def matches(rule: dict[str, Any]) -> bool:
        if "onExitCodes" in rule:
            return code in rule["onExitCodes"]["values"]
        return disrupted and rule["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]

    rules = documents("kubernetes_job.yaml")["Job"]["spec"]["podFailurePolicy"]["rules"]
    assert next((rule["action"] for rule in rules if matches(rule)), "Count") == action


# What must agree.


def test_the_jobs_numbers_and_names_agree() -> None:
    found = documents("kubernetes_job.yaml")
    job, service, pod = found["Job"], found["Service"], pod_of_job()
    name = job["metadata"]["name"]
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(pod.environment["NODES"])
    assert job["spec"]["completionMode"] == "Indexed"
    assert int(pod.environment["GPUS_PER_NODE"]) == pod.num_gpus
    assert pod.spec["subdomain"] == service["metadata"]["name"]
    assert pod.environment["MASTER_ADDR"] == f"{name}-0.{service['metadata']['name']}"
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}


def test_the_pytorchjobs_gpus_agree() -> None:
    spec = documents("kubernetes_pytorchjob.yaml")["PyTorchJob"]["spec"]
    assert {pod.num_gpus for pod in pods_of_pytorchjob().values()} == {int(spec["nprocPerNode"])}


@pytest.mark.parametrize("name", PODS)
def test_a_pod_has_time_for_a_checkpoint_a_volume_that_all_see_and_shared_memory(name: str) -> None:
    pod, claim = PODS[name], documents("kubernetes_volume.yaml")["PersistentVolumeClaim"]
    (grace,) = (word.partition("=")[2] for word in pod.container["command"] if word.startswith("--grace_seconds"))
    assert 60 <= int(grace) < pod.spec["terminationGracePeriodSeconds"]
    volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
    mounted = {mount["mountPath"]: volumes[mount["name"]] for mount in pod.container["volumeMounts"]}
    assert mounted["/data"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert mounted["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    assert pod.spec["securityContext"]["runAsNonRoot"]


@pytest.mark.parametrize("name", PODS)
def test_a_pods_arguments_are_ones_that_the_trainer_takes(name: str) -> None:
    arguments = parse(TrainingArguments, "", PODS[name].container["args"]).arguments
    assert arguments.output_dir.startswith("/data/")


@pytest.mark.parametrize("name", PODS)
def test_a_pods_shell_script_passes_shellcheck_and_kubernetes_leaves_it_alone(name: str) -> None:
    script = PODS[name].shell_script
    done = subprocess.run(
        [str(BIN / "shellcheck"), "--shell=bash", "-"], input=script, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout
    for word in PODS[name].container["command"]:
        assert "$(" not in word, "Kubernetes puts variables of its own there"
        assert "$$" not in word


# The commands, run.


def job_variables(index: int, port: int) -> dict[str, str]:
    """What differs on this machine from the Job's pod number `index`."""
    return {
        "JOB_COMPLETION_INDEX": str(index),
        "GPUS_PER_NODE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def operator_variables(index: int, port: int) -> dict[str, str]:
    """What the training operator sets in pod number `index` of two with a GPU each."""
    return {
        "RANK": str(index), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "PET_NODE_RANK": str(index), "PET_NNODES": "2", "PET_NPROC_PER_NODE": "1",
    }  # fmt: skip


def two_pods(kind: str, argv: list[str], folder: Path) -> list[Launched]:
    port = free_port()
    if kind == "Job":
        return [
            pod_of_job().started_here(job_variables(index, port), argv, folder / f"pod-{index}") for index in range(2)
        ]
    pods = pods_of_pytorchjob()
    return [
        pods[name].started_here(operator_variables(index, port), argv, folder / f"pod-{index}")
        for index, name in enumerate(("Master", "Worker"))
    ]


@pytest.mark.parametrize("kind", ["Job", pytest.param("PyTorchJob", marks=pytest.mark.slow)])
def test_two_pods_train_together_as_one_host_with_two_processes_does(
    small_world: SmallWorld, undisturbed_losses: list[float], tmp_path: Path, kind: str
) -> None:
    first, second = two_pods(kind, options(small_world, tmp_path / "out", 4), tmp_path)
    with first, second:
        assert [first.wait(), second.wait()] == [0, 0], first.output + second.output
    assert "micro-batches * 2 processes" in first.output
    assert losses_of(tmp_path / "out") == undisturbed_losses[:4]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "code"), [("Job", 75), ("PyTorchJob", 143)])
def test_sigterm_to_one_pod_stops_both_with_a_checkpoint(
    small_world: SmallWorld, tmp_path: Path, kind: str, code: int
) -> None:
    output = tmp_path / "out"
    first, second = two_pods(kind, options(small_world, output, 100_000), tmp_path)
    with first, second:
        first.wait_until(lambda: second.descendants() and steps_done(output) >= 5)
        second.process.send_signal(signal.SIGTERM)
        assert [first.wait(), second.wait()] == [code, code], first.output + second.output
    assert latest(output) == steps_done(output)


@pytest.mark.parametrize("kind", ["Job", pytest.param("PyTorchJob", marks=pytest.mark.slow)])
def test_a_mistake_ends_the_first_pod_with_2(small_world: SmallWorld, tmp_path: Path, kind: str) -> None:
    argv = [*options(small_world, tmp_path / "out", 4), "--train_input_file", "/nowhere"]
    port = free_port()
    if kind == "Job":
        pod, variables = pod_of_job(), job_variables(0, port)
    else:
        pod, variables = pods_of_pytorchjob()["Master"], operator_variables(0, port)
    with pod.started_here(variables, argv, tmp_path / "pod") as launched:
        assert launched.wait() == 2, launched.output
    assert "/nowhere" in launched.output
