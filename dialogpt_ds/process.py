"""What the operating system says about this process."""

import resource
from pathlib import Path


def peak_memory() -> int:
    """Return the most resident memory that this process has had, bytes."""
    # getrusage's own figure may be that of the program which started this one.
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii", errors="replace").splitlines() if status.is_file() else []
    found = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if found is None else found) * 1024
