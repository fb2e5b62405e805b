"""What a machine has for a run, as values: read in milliseconds by each rank at its start and by the doctor on each
host."""

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dialogpt_ds.hardware import CpuRates

NVIDIA = "0x10de"
"""PCI's number of the maker (pci-ids.ucw.cz)."""
DISPLAY = "0x03"
"""Class of graphics and compute cards; the same maker's sound and network chips have others."""
PCI_DEVICES = Path("/sys/bus/pci/devices")
SHARED_MEMORY = Path("/dev/shm")


def num_pci_gpus(devices: Path = PCI_DEVICES) -> int:
    """Return the number of NVIDIA GPUs on the PCI bus; a container sees those too that it was not given."""
    found = 0
    for device in devices.glob("*") if devices.is_dir() else ():
        try:
            maker, kind = ((device / name).read_text(encoding="ascii").strip() for name in ("vendor", "class"))
        except (OSError, UnicodeDecodeError):
            continue
        found += maker == NVIDIA and kind.startswith(DISPLAY)
    return found


def num_device_files(folder: Path = Path("/dev")) -> int:
    """Return the number of GPUs that the driver gives to this system or container (/dev/nvidia0 and so on)."""
    return sum(1 for file in folder.glob("nvidia*") if file.name.removeprefix("nvidia").isdigit())


def cpu_is_meant() -> bool:
    """Return whether the environment says that the GPUs are not to be used."""
    return os.environ.get("DS_ACCELERATOR") == "cpu" or os.environ.get("CUDA_VISIBLE_DEVICES", "unset").strip() in (
        "",
        "-1",
    )


@dataclass(frozen=True)
class DeviceFacts:
    """The device that a run computes on, as DeepSpeed sees it."""

    name: str = ""
    """Kind of device: cpu, cuda and others."""
    computes_fp16: bool = True
    """Looked at for a run in fp16."""
    rates: CpuRates | None = None
    """Measured for a run in bf16 on a CPU."""


def device_facts(precision: str) -> DeviceFacts:
    """Return what the run's precision meets on this machine; imports DeepSpeed, and measures a CPU in a fraction of a
    second."""
    from deepspeed.accelerator import get_accelerator

    from dialogpt_ds.matmul import cpu_rates

    accelerator = get_accelerator()
    name = str(accelerator.device_name())
    computes_fp16 = precision != "fp16" or bool(accelerator.is_fp16_supported())
    return DeviceFacts(name, computes_fp16, cpu_rates() if precision == "bf16" and name == "cpu" else None)


@dataclass(frozen=True)
class BuildTools:
    """Programs that a build on first use calls, where they are; None where they aren't."""

    compiler: str | None
    ninja: str | None
    compiler_name: str = "c++"
    """C++ compiler that torch calls for a build."""
    nvcc: str | None = None
    """Version of CUDA's compiler, "" where there is none; None: not looked for, as that starts a program."""


def find_build_tools(path: str | None = None) -> BuildTools:
    """Return the programs on a PATH: this process's, with the folder of its Python in front as the trainer puts it
    there, by default."""
    path = path or os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    compiler = (os.environ.get("CXX") or "c++").split()[0]
    return BuildTools(shutil.which(compiler, path=path), shutil.which("ninja", path=path), compiler)


def built_ahead(on_gpu: bool) -> set[str]:
    """Return the names of the operations that were built when DeepSpeed was installed; only if DeepSpeed is imported
    already."""
    installed = sys.modules.get("deepspeed.git_version_info")
    if installed is None:
        return set()
    if installed.accelerator_name != ("cuda" if on_gpu else "cpu"):
        return set()  # DeepSpeed takes them only on the kind of device that they were built for
    return {name for name, built in installed.installed_ops.items() if built}


def async_io_works() -> bool:
    """Return whether DeepSpeed's operation for NVMe can be had here: libaio with its headers, and io_setup."""
    from deepspeed.accelerator import get_accelerator

    return bool(get_accelerator().get_op_builder("AsyncIOBuilder")().is_compatible())


@dataclass(frozen=True)
class NvmeFolder:
    """A folder that a configuration names for offload, and what is there."""

    existing: str
    """The folder, or the nearest one above it that exists."""
    is_folder: bool
    is_writable: bool


def nvme_folders(zero: dict[str, Any]) -> dict[str, NvmeFolder]:
    """Return the folders that a `zero_optimization` block names for offload to NVMe, by their paths."""
    blocks = [zero.get(name) or {} for name in ("offload_optimizer", "offload_param")]
    found = {}
    for path in (block.get("nvme_path") for block in blocks if block.get("device") == "nvme"):
        if path:
            # DeepSpeed makes the folder where its parent can be written to.
            place = next(parent for parent in (Path(path), *Path(path).parents) if os.path.exists(parent))
            found[path] = NvmeFolder(str(place), os.path.isdir(place), os.access(place, os.W_OK))
    return found


def shared_memory(folder: Path = SHARED_MEMORY) -> tuple[int, int]:
    """Return the bytes of the shared memory: all, and free; 0 where it can't be looked at."""
    try:
        found = shutil.disk_usage(folder)
    except OSError:
        return 0, 0
    return found.total, found.free


def existing_part(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    folder = folder.expanduser().absolute()
    # Path.exists() raises where a folder above may not be entered.
    return next(place for place in (folder, *folder.parents) if os.path.exists(place))


def free_bytes(folder: Path) -> int | None:
    """Return what is free on the disk of a folder that need not exist; None where it can't be looked at."""
    try:
        return shutil.disk_usage(existing_part(folder)).free
    except OSError:
        return None
