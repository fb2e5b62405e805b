"""A process's share of its host's cores, for what computes there with OpenMP: PyTorch, and DeepSpeed's optimizers of an
offload."""

import ctypes
import os
from pathlib import Path

import psutil

CORES_VARIABLE = "OMP_NUM_THREADS"
MAPS = Path("/proc/self/maps")


def share_cores(ranks_here: int) -> str:
    """Give the calling thread this process's share of the host's cores, where nobody has set OMP_NUM_THREADS.

    Without that each process takes all of them (and under torchrun one), and threads that spin while they wait for
    their turn slow all others down.

    Args:
        ranks_here: the run's processes on this host.

    Returns:
        A note for the user, or "".
    """
    of_torchrun = _is_torchruns()
    if CORES_VARIABLE in os.environ and not of_torchrun:
        return ""
    threads = max(len(os.sched_getaffinity(0)) // ranks_here, 1)
    set_threads(threads)
    if not of_torchrun or threads == 1:
        return ""
    return (
        f"{CORES_VARIABLE}: {threads} for each process here, its share of the cores, and not torchrun's 1; set it to "
        "say otherwise"
    )


def set_threads(threads: int) -> None:
    """Let OpenMP use so many threads in parts that the calling thread starts.

    A copy of its library reads OMP_NUM_THREADS when it is loaded, and each has a number of its own for each thread.
    DeepSpeed's extensions use PyTorch's copy where that goes by the usual name, else the system's, which is loaded with
    the first of them.
    """
    import torch

    torch.set_num_threads(threads)
    os.environ[CORES_VARIABLE] = str(threads)
    for library in loaded_libraries():
        ctypes.CDLL(library).omp_set_num_threads(threads)


def loaded_libraries() -> set[str]:
    """Return the paths of the copies of GNU's OpenMP library in this process."""
    try:
        lines = MAPS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()  # not Linux
    paths = {line.split(maxsplit=5)[-1] for line in lines}
    return {path for path in paths if os.path.basename(path).startswith("libgomp") and os.path.exists(path)}


def _is_torchruns() -> bool:
    """Return whether OMP_NUM_THREADS is what torchrun sets where its own environment has none."""
    if os.environ.get(CORES_VARIABLE) != "1" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    try:
        return CORES_VARIABLE not in psutil.Process(os.getppid()).environ()  # as it was when torchrun started
    except psutil.Error:
        return True
