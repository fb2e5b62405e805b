"""What the operating system and the processor say about this process."""

import resource
from pathlib import Path

import psutil


def peak_memory() -> int:
    """Return the most resident memory that this process has had, bytes."""
    return resident_memory()[1]


def resident_memory() -> tuple[int, int]:
    """Return this process's resident memory, bytes: now, and the most that it has had."""
    status = Path("/proc/self/status")
    if not status.is_file():
        # getrusage's own figure may be that of the program which started this one.
        return psutil.Process().memory_info().rss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = dict(line.split(":", 1) for line in status.read_text(encoding="ascii", errors="replace").splitlines() if ":" in line)
    now, most = (int(found[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, most


def bf16_is_fast() -> bool:
    """Return whether this machine has instructions for bf16; without them PyTorch computes it on a CPU, but number by number."""
    import torch

    if torch.accelerator.is_available():
        return True
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) if torch.backends.mkldnn.is_available() else False
