"""What each rank reports at the end of a step, in the one reduction that the loss needs anyway, and what all of them
together say."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from dialogpt_ds.distributed.stop_requests import REASONS, first_reason
from dialogpt_ds.hardware import GIB, resident_memory

GAUGES = (
    "seconds_data",
    "peak_memory_gib",
    "host_memory_gib",
    "gpu_memory_gib",
    "gpu_reserved_gib",
    "gpu_alloc_retries",
)
"""Names of logs.metrics: of each the largest over all ranks is recorded."""
OF_GPUS = tuple(name for name in GAUGES if name.startswith("gpu_"))
NUM_FLAGS = len(REASONS) + 2


@dataclass(frozen=True)
class RankReport:
    """Of one rank."""

    stop_requests: list[float] = field(default_factory=lambda: [0.0] * len(REASONS))
    """1 for each of REASONS that has come to it, else 0."""
    wants_checkpoint: bool = False
    """By the clock: rank 0 alone."""
    rows_failed: bool = False
    """Whether it can't read the rows of the next step."""
    gauges: list[float] = field(default_factory=lambda: [0.0] * len(GAUGES))

    def pack(self, rank: int, world_size: int) -> list[float]:
        """Return numbers whose sums over all ranks are what `unpack` takes: flags, and gauges in this rank's own place
        among zeros.

        With 3 ranks and 2 gauges those of rank 1 are 0 0 a b 0 0.
        """
        places = [0.0] * (len(GAUGES) * world_size)
        places[rank * len(GAUGES) : (rank + 1) * len(GAUGES)] = self.gauges
        return [*self.stop_requests, float(self.wants_checkpoint), float(self.rows_failed), *places]


class AllReports(NamedTuple):
    """Of all ranks together, equal on each."""

    stop_reason: str | None
    """Why the run is to stop: the first of REASONS that some rank had."""
    checkpoint_wanted: bool
    rows_failed: bool
    gauges: dict[str, float | None]
    """The largest over all ranks, by name; None for the GPU's where there is none."""


def unpack(sums: list[float]) -> AllReports:
    """Return what all ranks together say, from the sums of what `pack` gave."""
    flags, places = sums[:NUM_FLAGS], sums[NUM_FLAGS:]
    gauges: dict[str, float | None] = {name: max(places[number :: len(GAUGES)]) for number, name in enumerate(GAUGES)}
    if not gauges["gpu_memory_gib"]:
        gauges |= dict.fromkeys(OF_GPUS)
    return AllReports(first_reason(flags[: len(REASONS)]), flags[-2] > 0, flags[-1] > 0, gauges)


def gauges_of(device: torch.device, seconds_data: float) -> list[float]:
    """Return this rank's GAUGES.

    Args:
        device: that it computes on.
        seconds_data: that it has waited for the step's rows.
    """
    now, most = resident_memory()
    held = reserved = retries = 0
    if device.type == "cuda":
        found = torch.cuda.memory_stats(device)  # once: each look takes a tenth of a millisecond
        most, held = found["allocated_bytes.all.peak"], found["allocated_bytes.all.current"]
        reserved, retries = found["reserved_bytes.all.current"], found["num_alloc_retries"]
    return [seconds_data, most / GIB, now / GIB, held / GIB, reserved / GIB, float(retries)]
