"""All that a host says of itself: python -m dialogpt_ds.doctor.host_facts REQUEST prints it as one line of JSON."""

import ctypes
import json
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import psutil

import dialogpt_ds
from dialogpt_ds.doctor.facts import HostFacts, HostGpu, Request, to_line
from dialogpt_ds.doctor.meeting import port_problem
from dialogpt_ds.files import rename_problem, sha256_of_file
from dialogpt_ds.launching.machine_facts import (
    cpu_is_meant,
    device_facts,
    existing_part,
    find_build_tools,
    num_device_files,
    num_pci_gpus,
    nvme_folders,
    shared_memory,
)
from dialogpt_ds.shards.manifest import MANIFEST
from dialogpt_ds.versions import code_sha256, git_revision

PROGRAM_SECONDS = 8.0
"""Longest wait for a program such as nvidia-smi, which hangs where a driver is broken."""
CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def network(request: Request) -> dict[str, Any]:
    """Name, addresses and whether the port is free."""
    addresses = {
        address.address: name
        for name, of_interface in psutil.net_if_addrs().items()
        for address in of_interface
        if address.family == socket.AF_INET
    }
    hostname = socket.gethostname()
    try:
        resolved = sorted({str(info[4][0]) for info in socket.getaddrinfo(hostname, None)})
    except OSError:
        resolved = []
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "hostname": hostname,
        "boot_id": boot.read_text(encoding="ascii").strip() if boot.is_file() else "",
        "addresses": addresses,
        "name_addresses": resolved,
        "port_problem": port_problem(request.port) if request.port else "",
    }


def limits(request: Request) -> dict[str, Any]:
    """Memory, shared memory, open files."""
    memory = psutil.virtual_memory()
    total = min([memory.total, *_container_limits()])
    return {
        "memory": (total, min(memory.available, total)),
        "shared_memory": shared_memory(),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "cpus": len(os.sched_getaffinity(0)),
    }


def _container_limits() -> list[int]:
    texts = [Path(path).read_text(encoding="ascii").strip() for path in CONTAINER_LIMITS if Path(path).is_file()]
    return [int(text) for text in texts if text.isdigit()]


def output_folder(request: Request) -> dict[str, Any]:
    """Whether output_dir, or the folder that it would be made in, takes what a checkpoint does there, and the room on
    its disk."""
    if not request.output_dir:
        return {}
    place = existing_part(Path(request.output_dir))
    found: dict[str, Any] = {"output_free": shutil.disk_usage(place).free}
    if not place.is_dir():
        return found | {"output_problem": f"{place} is a file"}
    refused = rename_problem(place)
    return found | ({"output_problem": f"{place} can't be written to as a checkpoint is: {refused}"} if refused else {})


def nvidia(request: Request) -> dict[str, Any]:
    """GPUs as the driver sees them."""
    return {
        "num_pci_gpus": num_pci_gpus(),
        "num_device_files": num_device_files(),
        "cpu_is_meant": cpu_is_meant(),
        "driver_cuda": _driver_cuda(),
        "gpus": _smi_gpus(),
    }


def _driver_cuda() -> str:
    """Return the newest CUDA that the driver can run, as cuDriverGetVersion of its library says it (1000 * major + 10 *
    minor)."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return ""
    return f"{version.value // 1000}.{version.value % 1000 // 10}" if version.value else ""


def _smi_gpus() -> list[HostGpu]:
    columns = "name,memory.total,memory.used,compute_cap,driver_version"
    output = said_by(["nvidia-smi", f"--query-gpu={columns}", "--format=csv,noheader,nounits"])
    return [gpu for gpu in map(gpu_of_line, (output or "").splitlines()) if gpu]


def gpu_of_line(line: str) -> HostGpu | None:
    """Return the GPU of a line of nvidia-smi; it writes [N/A] for what it doesn't know."""
    parts = [part.strip() for part in line.split(",")]
    if len(parts) != 5:
        return None
    name, total, used, capability, driver = parts
    total, used = (part if part.isdigit() else "0" for part in (total, used))
    return HostGpu(name, int(total) << 20, int(used) << 20, capability if capability[:1].isdigit() else "", driver)


def build_tools(request: Request) -> dict[str, Any]:
    """Compilers and ninja."""
    tools = find_build_tools()
    version = said_by([tools.compiler, "--version"]) if tools.compiler else ""
    return {
        "compiler": tools.compiler,
        "compiler_name": tools.compiler_name,
        "compiler_version": (version or "").partition("\n")[0],
        "ninja": tools.ninja,
        "nvcc": nvcc_version(),
    }


def nvcc_version() -> str:
    """Return the version of CUDA's compiler, where torch's builds look for it; "" where there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [os.path.join(home, "bin", "nvcc")] if home else [shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    program = next((place for place in places if place and os.path.exists(place)), None)
    found = re.search(r"release (\d+\.\d+)", said_by([program, "-V"]) or "") if program else None
    return found[1] if found else ""


def said_by(command: list[str]) -> str | None:
    """Return what a program prints; None where it is missing, fails, or takes too long."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PROGRAM_SECONDS, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


def code(request: Request) -> dict[str, Any]:
    """The package's files, and what of the run's other files is there."""
    manifests = {folder: Path(folder, MANIFEST) for folder in request.folders}
    return {
        "executable": sys.executable,
        "folder_is_there": os.path.isdir(request.folder),
        "code": code_sha256(),
        "manifests": {folder: sha256_of_file(file) if file.is_file() else "" for folder, file in manifests.items()},
    }


def packages(request: Request) -> dict[str, Any]:
    """Versions of Python, of this package and of all that it requires."""
    names = [requirement_name(line) for line in required()]
    found = {name: _version(name) for name in names}
    return {"packages": {"python": platform.python_version(), "dialogpt-ds": dialogpt_ds.__version__} | found}


def required() -> list[str]:
    """Return what the package requires without its extras, as lines of PEP 508; nothing where it was not installed."""
    try:
        return [line for line in requires("dialogpt-ds") or [] if "extra ==" not in line]
    except PackageNotFoundError:
        return []


def requirement_name(line: str) -> str:
    """Return the name of a requirement."""
    from packaging.requirements import Requirement

    return Requirement(line).name


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def revision(request: Request) -> dict[str, Any]:
    """The commit of the code."""
    found = git_revision()
    return {"revision": found["commit"] if found else ""}


def torch_facts(request: Request) -> dict[str, Any]:
    """CUDA as PyTorch sees it."""
    import torch

    found: dict[str, Any] = {"torch_cuda": torch.version.cuda, "num_visible": 0}
    if torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
        return found
    if not torch.cuda.is_available():
        return found | {"torch_error": _why_no_cuda()}
    found |= {"num_visible": torch.cuda.device_count(), "architectures": torch.cuda.get_arch_list()}
    properties = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return found | {"gpus_of_torch": [HostGpu(p.name, p.total_memory, 0, f"{p.major}.{p.minor}") for p in properties]}


def _why_no_cuda() -> str:
    import torch

    try:
        torch.cuda.init()
    except Exception as error:
        return str(error).partition("\n")[0]
    return "torch.cuda.is_available() is false"


def deepspeed_ops(request: Request) -> dict[str, Any]:
    """DeepSpeed's compiled operations, as its ds_report lists them."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import accelerator_name, installed_ops
    from deepspeed.ops.op_builder.all_ops import ALL_OPS
    from deepspeed.ops.op_builder.builder import probe_is_compatible

    from dialogpt_ds.launching.op_folder import is_built, op_folder

    fits = accelerator_name == get_accelerator().device_name()
    folder = op_folder()
    return {
        "ops_folder": str(folder),
        "ops_in_folder": sorted(name for name in ALL_OPS if is_built(name, folder)),
        "ops_built": sorted(name for name, built in installed_ops.items() if built and fits),
        "ops_compatible": {name: bool(probe_is_compatible(builder)) for name, builder in ALL_OPS.items()},
    }


def requirements(request: Request) -> dict[str, Any]:
    """What the run's precision and offload meet here."""
    if not request.precision:
        return {}
    zero = request.deepspeed.get("zero_optimization") or {}
    return {"device": device_facts(request.precision), "nvme_folders": nvme_folders(zero)}


FACTS: tuple[Callable[[Request], dict[str, Any]], ...] = (
    network,
    limits,
    output_folder,
    nvidia,
    build_tools,
    code,
    packages,
    torch_facts,
    deepspeed_ops,
    requirements,
    revision,
)


def gather(request: Request) -> HostFacts:
    """Return what this host says of itself; a part that fails is named in it, and the others are there all the same."""
    found: dict[str, Any] = {}
    failures: dict[str, str] = {}
    for part in FACTS:
        try:
            found |= part(request)
        except Exception as error:  # a broken installation raises anything when it is imported
            failures[part.__name__] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:300]
    of_torch = found.pop("gpus_of_torch", [])
    found["gpus"] = found.get("gpus") or of_torch
    return HostFacts(**found, failures=failures)


def main() -> int:
    """Print the answer to the request on the command line."""
    os.environ["PATH"] = os.pathsep.join(
        [os.path.dirname(sys.executable), os.environ.get("PATH", "")]
    )  # as the trainer does
    with redirect_stdout(sys.stderr):  # libraries print on being imported
        line = to_line(gather(Request(**json.loads(sys.argv[1]))))
    print(line, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
