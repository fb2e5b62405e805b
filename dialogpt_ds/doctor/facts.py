"""What is known of a host: plain values, as one host tells them and another one reads them."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dialogpt_ds.hardware import CpuRates
from dialogpt_ds.launching.machine_facts import DeviceFacts, NvmeFolder

FACTS_MARK = "dialogpt-doctor-facts "
"""Begins a host's answer; a login shell may print before it, also on its line."""


@dataclass(frozen=True)
class HostGpu:
    """A GPU."""

    name: str
    memory: int
    """Bytes."""
    used: int = 0
    """Bytes that processes have taken."""
    capability: str = ""
    """Compute capability, such as 8.0."""
    driver: str = ""


@dataclass(frozen=True)
class Request:
    """What a host is asked, beside what it is asked always."""

    folder: str
    """That the run is launched in."""
    output_dir: str = ""
    """Absolute path."""
    folders: list[str] = field(default_factory=list)
    """Shard directories, absolute paths."""
    precision: str = ""
    """Of the run; empty where the configuration is wrong already."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """The DeepSpeed configuration."""
    port: int = 0
    """Port that must be free; 0: not asked."""


@dataclass(frozen=True)
class HostFacts:
    """What a host says of itself."""

    hostname: str = ""
    boot_id: str = ""
    addresses: dict[str, str] = field(default_factory=dict)
    """IPv4 address -> interface."""
    name_addresses: list[str] = field(default_factory=list)
    """What the host's own name resolves to there."""

    executable: str = ""
    """Its Python."""
    folder_is_there: bool = True
    """Whether the folder that the run is launched in exists."""
    revision: str = ""
    """git commit of the code, "" where it is no checkout."""
    code: str = ""
    """SHA-256 over the files of the package."""
    packages: dict[str, str] = field(default_factory=dict)
    """Versions of python and of what the package requires; "" where it is not installed."""

    torch_cuda: str | None = None
    """CUDA that PyTorch was built with; None: for CPUs."""
    torch_error: str = ""
    """Why PyTorch can't use CUDA although it was built with it."""
    architectures: list[str] = field(default_factory=list)
    """GPU architectures that PyTorch was built for, such as sm_80."""
    num_visible: int = 0
    """GPUs that PyTorch can use."""
    gpus: list[HostGpu] = field(default_factory=list)
    driver_cuda: str = ""
    """Newest CUDA that the driver can run."""
    num_pci_gpus: int = 0
    num_device_files: int = 0
    cpu_is_meant: bool = False
    device: DeviceFacts = field(default_factory=DeviceFacts)
    """That the run would compute on; without a name where it was not looked at."""
    nvme_folders: dict[str, NvmeFolder] = field(default_factory=dict)
    """What is at the paths that the run's offload names."""

    compiler: str | None = None
    compiler_name: str = "c++"
    compiler_version: str = ""
    ninja: str | None = None
    nvcc: str = ""
    """Version of CUDA's compiler."""
    ops_built: list[str] = field(default_factory=list)
    """DeepSpeed's operations that were built when it was installed."""
    ops_folder: str = ""
    """Where others are built on first use."""
    ops_in_folder: list[str] = field(default_factory=list)
    """Those that were."""
    ops_compatible: dict[str, bool] = field(default_factory=dict)
    """All of DeepSpeed's operations, and whether each can be built, as ds_report says it."""

    shared_memory: tuple[int, int] = (0, 0)
    """Bytes of /dev/shm: all, and free; 0 where it can't be looked at."""
    open_files: int = 0
    """Limit of open files of a process."""
    memory: tuple[int, int] = (0, 0)
    """Bytes of the host's memory (or of its container's): all, and available."""
    cpus: int = 0

    output_problem: str = ""
    """Why no checkpoint can be saved in output_dir."""
    output_free: int = 0
    """Bytes free on its disk."""
    manifests: dict[str, str] = field(default_factory=dict)
    """Shard directory -> SHA-256 of its manifest, "" where there is none."""
    port_problem: str = ""
    """Why the port can't be listened on."""

    failures: dict[str, str] = field(default_factory=dict)
    """What could not be looked at, and why."""

    @property
    def on_gpu(self) -> bool:
        """Whether a run there is on GPUs."""
        return self.num_visible > 0 and not self.cpu_is_meant

    def same_machine(self, other: "HostFacts") -> bool:
        """Return whether two hosts are one: the same start of the system, and the same addresses (containers share the
        first)."""
        return bool(self.boot_id) and self.boot_id == other.boot_id and self.addresses == other.addresses


def to_line(facts: HostFacts) -> str:
    """Return the answer of a host."""
    return FACTS_MARK + json.dumps(dataclasses.asdict(facts))


def after_mark(output: str, mark: str) -> str | None:
    """Return what follows a mark on the first line that has it; None where none has."""
    return next((line.partition(mark)[2] for line in output.splitlines() if mark in line), None)


Seen = Sequence[tuple[str, HostFacts]]
"""The hosts that have answered, by name."""


def facts_in(output: str) -> HostFacts | None:
    """Return what a host's output says; None where it holds no answer."""
    said = after_mark(output, FACTS_MARK)
    if said is None:
        return None
    content: dict[str, Any] = json.loads(said)
    known = {field.name for field in dataclasses.fields(HostFacts)}  # another version there may say more
    content = {name: value for name, value in content.items() if name in known}
    content["gpus"] = [HostGpu(**gpu) for gpu in content.get("gpus", ())]
    device = content.get("device") or {}
    content["device"] = DeviceFacts(**device | {"rates": CpuRates(**device["rates"]) if device.get("rates") else None})
    content["nvme_folders"] = {path: NvmeFolder(**found) for path, found in content.get("nvme_folders", {}).items()}
    for name in ("shared_memory", "memory"):
        content[name] = tuple(content.get(name, (0, 0)))
    return HostFacts(**content)
