"""What each rank tells of itself at the end of a step, in the reduction that the loss needs anyway, and the largest over all ranks."""

import torch

from dialogpt_ds.distributed.world import World
from dialogpt_ds.hardware import resident_memory

GIB = 2**30
GAUGES = ("seconds_data", "peak_memory_gib", "host_memory_gib", "gpu_memory_gib", "gpu_reserved_gib", "gpu_alloc_retries")
"""Names of logs.metrics."""
OF_GPUS = tuple(name for name in GAUGES if name.startswith("gpu_"))


def told_by_this_rank(world: World, device: torch.device, seconds_data: float) -> list[float]:
    """Return this rank's gauges in its own place among zeros, so that their sum over all ranks holds every rank's.

    With 3 ranks and 2 gauges rank 1 returns 0 0 a b 0 0.
    """
    now, most = resident_memory()
    held = reserved = retries = 0
    if device.type == "cuda":
        found = torch.cuda.memory_stats(device)  # once: each look takes a tenth of a millisecond
        most, held = found["allocated_bytes.all.peak"], found["allocated_bytes.all.current"]
        reserved, retries = found["reserved_bytes.all.current"], found["num_alloc_retries"]
    mine = [seconds_data, most / GIB, now / GIB, held / GIB, reserved / GIB, float(retries)]
    told = [0.0] * (len(GAUGES) * world.size)
    told[world.rank * len(GAUGES) : (world.rank + 1) * len(GAUGES)] = mine
    return told


def largest(told: list[float]) -> dict[str, float | None]:
    """Return each gauge's largest value over all ranks, from the sums of what they told; None for the GPU's where there is none."""
    found: dict[str, float | None] = {name: max(told[place :: len(GAUGES)]) for place, name in enumerate(GAUGES)}
    return found if found["gpu_memory_gib"] else found | dict.fromkeys(OF_GPUS)
