"""What the operating system and the processor say about this process."""

import os
import resource
from dataclasses import dataclass
from pathlib import Path

import psutil

GIB = 2**30
"""Bytes."""
AS_FAST = 0.8
"""Share of fp32's rate from which bf16 is worth it: it halves the memory traffic of activations, but masters in fp32
come on top."""


@dataclass(frozen=True)
class CpuRates:
    """What a core of this machine was measured to do, floating-point operations per second."""

    fp32: float
    bf16: float

    def __str__(self) -> str:
        return f"{self.bf16 / 1e9:,.3g} GFLOP/s in bf16, {self.fp32 / 1e9:,.3g} in fp32"

    @property
    def bf16_is_fast(self) -> bool:
        """Whether bf16 is about as fast as fp32, or faster."""
        return self.bf16 >= AS_FAST * self.fp32


def peak_memory() -> int:
    """Return the most resident memory that this process has had, bytes."""
    return resident_memory()[1]


def resident_memory() -> tuple[int, int]:
    """Return this process's resident memory, bytes: now, and the most that it has had."""
    status = Path("/proc/self/status")
    if not status.is_file():
        # getrusage's own figure may be that of the program which started this one.
        return psutil.Process().memory_info().rss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = dict(
        line.split(":", 1) for line in status.read_text(encoding="ascii", errors="replace").splitlines() if ":" in line
    )
    now, most = (int(found[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, most


def device_of_run() -> str:
    """Return the kind of device that a run in this process computes on, as DeepSpeed calls it: cpu, cuda and others.

    As DeepSpeed finds it, whose import takes seconds: what DS_ACCELERATOR says, else the machine's accelerator.
    """
    import torch

    if said := os.environ.get("DS_ACCELERATOR"):
        return said
    if torch.cuda.is_available():
        return "cuda"
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


def bf16_is_fast() -> bool:
    """Return whether the run's device computes in bf16 about as fast as in fp32, or faster; on a CPU by measuring
    both."""
    import torch

    from dialogpt_ds.matmul import cpu_rates

    device = device_of_run()
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device != "cpu" or cpu_rates().bf16_is_fast
