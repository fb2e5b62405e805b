"""What the system of this host says: names, limits, memory, disks, NVIDIA's tools. Nothing here imports PyTorch."""

import ctypes
import errno
import os
import re
import resource
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import psutil

from dialogpt_ds.doctor.facts import HostGpu, Request
from dialogpt_ds.files import rename_problem
from dialogpt_ds.launching.machine_checks import SHARED_MEMORY, existing_part
from dialogpt_ds.launching.needed_ops import find_build_tools
from dialogpt_ds.launching.nvidia import cpu_is_meant, num_device_files, num_pci_gpus

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


def port_problem(port: int) -> str:
    """Return why this process can't listen on a port; "" where it can."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a connection that has just ended is no hindrance
        try:
            probe.bind(("", port))
            probe.listen()
        except OverflowError:
            return f"port {port} is none: ports go from 1 to 65535"
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return f"port {port} is in use{_user_of(port)}"
            return f"port {port} can't be listened on ({error.strerror})"
    return ""


def _user_of(port: int) -> str:
    """Return which process listens on a port, as far as this one may see it."""
    try:
        owners = {c.pid for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr and c.laddr[1] == port}
        named = [f"{psutil.Process(pid).name()}, process {pid}" for pid in owners if pid]
    except psutil.Error:
        return ""
    return f" (by {'; '.join(named)})" if named else ""


def limits(request: Request) -> dict[str, Any]:
    """Memory, shared memory, open files."""
    memory = psutil.virtual_memory()
    total = min([memory.total, *_container_limits()])
    try:
        disk = shutil.disk_usage(SHARED_MEMORY)
        shared = (disk.total, disk.free)
    except OSError:
        shared = (0, 0)
    return {
        "memory": (total, min(memory.available, total)),
        "shared_memory": shared,
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "cpus": len(os.sched_getaffinity(0)),
    }


def _container_limits() -> list[int]:
    texts = [Path(path).read_text(encoding="ascii").strip() for path in CONTAINER_LIMITS if Path(path).is_file()]
    return [int(text) for text in texts if text.isdigit()]


def output_folder(request: Request) -> dict[str, Any]:
    """Whether output_dir, or the folder that it would be made in, takes what a checkpoint does there, and the room on its disk."""
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
    """Return the newest CUDA that the driver can run, as cuDriverGetVersion of its library says it (1000 * major + 10 * minor)."""
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
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROGRAM_SECONDS, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None
