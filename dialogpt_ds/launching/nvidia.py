"""NVIDIA GPUs as the machine has them, whatever PyTorch can use: a run must not end up on the CPU in silence."""

import os
from pathlib import Path

NVIDIA = "0x10de"
"""PCI's number of the maker (pci-ids.ucw.cz)."""
DISPLAY = "0x03"
"""Class of graphics and compute cards; the same maker's sound and network chips have others."""
PCI_DEVICES = Path("/sys/bus/pci/devices")


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
    return os.environ.get("DS_ACCELERATOR") == "cpu" or os.environ.get("CUDA_VISIBLE_DEVICES", "unset").strip() in ("", "-1")


def why_unused(num_pci: int, num_files: int, cuda_of_torch: str | None) -> str:
    """Say why PyTorch uses no GPU of a machine that has some, and the way out.

    Args:
        num_pci: GPUs on the bus.
        num_files: GPUs that the driver gives to this system or container.
        cuda_of_torch: CUDA's version that PyTorch was built with; None for its CPU build.
    """
    has = f"this machine has {max(num_pci, num_files)} NVIDIA GPU{'s' * (max(num_pci, num_files) != 1)}"
    if cuda_of_torch is None:
        return (
            f"{has}, but PyTorch is the build for CPUs, so training would be on the CPU: pip install --force-reinstall torch from an index "
            "of CUDA builds (see launch/constraints.txt for the version)"
        )
    if not num_files:
        return (
            f"{has}, but no driver gives them to this system (no /dev/nvidia0), so training would be on the CPU: in a container, start it "
            "with docker run --gpus all; else install NVIDIA's driver"
        )
    return (
        f"{has}, but PyTorch (CUDA {cuda_of_torch}) can't use them, so training would be on the CPU: look at nvidia-smi; the usual "
        "reasons are a driver too old for this CUDA, or one that was updated without a restart"
    )
