"""Facts of hosts that are not here."""

from dataclasses import replace
from typing import Any

from dialogpt_ds.doctor.facts import HostFacts, HostGpu
from dialogpt_ds.doctor.report import Finding

GIB = 2**30
A100 = HostGpu("NVIDIA A100-SXM4-40GB", 40 * GIB, 0, "8.0", "550.54")
V100 = HostGpu("Tesla V100-SXM2-16GB", 16 * GIB, 0, "7.0", "550.54")
NODE = HostFacts(
    hostname="worker-1",
    boot_id="1",
    addresses={"10.0.0.1": "eth0"},
    name_addresses=["10.0.0.1"],
    code="c0de",
    revision="abcdef0123456789",
    packages={"python": "3.11.7", "torch": "2.13.0+cu128", "deepspeed": "0.19.8", "numpy": "2.4.6"},
    torch_cuda="12.8",
    architectures=["sm_70", "sm_80", "sm_90"],
    num_visible=2,
    gpus=[A100, A100],
    driver_cuda="12.8",
    num_pci_gpus=2,
    num_device_files=2,
    compiler="/usr/bin/c++",
    compiler_version="c++ 12.2.0",
    ninja="/usr/bin/ninja",
    nvcc="12.8",
    ops_compatible={"cpu_adam": True, "fused_adam": True},
    shared_memory=(8 * GIB, 8 * GIB),
    open_files=65_536,
    memory=(256 * GIB, 240 * GIB),
    cpus=32,
    output_free=10**12,
)
"""A host with two A100, to which nothing is wrong."""
RANKS = {"worker-1": 2, "worker-2": 2}


def node(**changes: Any) -> HostFacts:
    return replace(NODE, **changes)


def pair(**changes: Any) -> list[tuple[str, HostFacts]]:
    """Return two hosts, the second with changes."""
    second: dict[str, Any] = {"hostname": "worker-2", "boot_id": "2", "addresses": {"10.0.0.2": "eth0"}} | changes
    return [("worker-1", NODE), ("worker-2", node(**second))]


def levels(findings: list[Finding]) -> list[str]:
    return [finding.level for finding in findings]


def only(findings: list[Finding]) -> Finding:
    (finding,) = findings
    return finding
