"""What the operating system and the processor say about this process."""

import resource
from pathlib import Path


def peak_memory() -> int:
    """Return the most resident memory that this process has had, bytes."""
    # getrusage's own figure may be that of the program which started this one.
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii", errors="replace").splitlines() if status.is_file() else []
    found = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if found is None else found) * 1024


def bf16_is_fast() -> bool:
    """Return whether this machine has instructions for bf16; without them PyTorch computes it on a CPU, but number by number."""
    import torch

    if torch.accelerator.is_available():
        return True
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) if torch.backends.mkldnn.is_available() else False
