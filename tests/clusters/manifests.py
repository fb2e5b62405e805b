"""The Kubernetes manifests of launch/, as a test reads them, and as it runs them: pods that are processes of this
machine."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import ROOT
from tests.ranks.launch import Launched

HOSTFILE = "/tmp/hostfile"


def documents(name: str) -> dict[str, dict[str, Any]]:
    """Return the documents of launch/NAME by their kind."""
    found = [document for document in yaml.safe_load_all((ROOT / "launch" / name).read_text()) if document]
    by_kind = {document["kind"]: document for document in found}
    assert len(by_kind) == len(found)
    return by_kind


@dataclass(frozen=True)
class Pod:
    """A pod template, whose first container trains."""

    template: dict[str, Any]

    @property
    def spec(self) -> dict[str, Any]:
        """The pod's specification."""
        return self.template["spec"]

    @property
    def container(self) -> dict[str, Any]:
        """The container that trains."""
        (container,) = self.spec["containers"]
        return container

    @property
    def environment(self) -> dict[str, str]:
        """Its variables that are written down; those from secrets aside."""
        return {variable["name"]: variable["value"] for variable in self.container["env"] if "value" in variable}

    @property
    def shell_script(self) -> str:
        """What `bash -c` is given in its command."""
        command = self.container["command"]
        return command[command.index("bash") + 2]

    @property
    def num_gpus(self) -> int:
        """The pod's GPUs."""
        return self.container["resources"]["limits"]["nvidia.com/gpu"]

    def started_here(self, variables: dict[str, str], argv: list[str], folder: Path) -> Launched:
        """Run the container's command on this machine, with a folder for what would be its own; CPUs take the place of
        GPUs."""
        folder.mkdir()
        command = [word.replace(HOSTFILE, str(folder / "hostfile")) for word in self.container["command"]]
        assert command[0] == "python"
        environment = self.environment | {"DS_ACCELERATOR": "cpu"} | variables
        return Launched([sys.executable, *command[1:], *argv], folder / "log", environment)


def pod_of_job() -> Pod:
    """Return the pod of launch/kubernetes_job.yaml."""
    return Pod(documents("kubernetes_job.yaml")["Job"]["spec"]["template"])


def pods_of_pytorchjob() -> dict[str, Pod]:
    """Return the pods of launch/kubernetes_pytorchjob.yaml by kind of replica."""
    replicas = documents("kubernetes_pytorchjob.yaml")["PyTorchJob"]["spec"]["pytorchReplicaSpecs"]
    return {name: Pod(replica["template"]) for name, replica in replicas.items()}
