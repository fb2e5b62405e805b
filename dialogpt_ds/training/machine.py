"""Whether this rank's machine can do the run, looked at in a few milliseconds before the ranks come together."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dialogpt_ds.hardware import device_of_run
from dialogpt_ds.launching.environment_file import secrets_warnings
from dialogpt_ds.launching.machine_checks import (
    Trouble,
    capability_troubles,
    count_troubles,
    device_troubles,
    disk_troubles,
    offload_troubles,
    op_troubles,
    shared_memory_troubles,
    why_unused,
)
from dialogpt_ds.launching.machine_facts import (
    SHARED_MEMORY,
    async_io_works,
    built_ahead,
    device_facts,
    find_build_tools,
    free_bytes,
    num_device_files,
    num_pci_gpus,
    nvme_folders,
    shared_memory,
)
from dialogpt_ds.launching.needed_ops import ASYNC_IO, needed_ops, offload_ops, unbuilt


@dataclass(frozen=True)
class LaunchedRank:
    """A process of a run, and what of the run the machine has to bear."""

    rank: int
    world_size: int
    local_rank: int
    ranks_here: int
    """Processes on this host."""
    deepspeed: dict[str, Any]
    """The final DeepSpeed configuration."""
    output_dir: Path
    cpu_is_meant: bool = False
    """Whether the environment asked for the CPU, see cpu_is_meant(); before the trainer itself sets DS_ACCELERATOR."""
    checkpoint_bytes: int = 0
    """About what one checkpoint takes; 0: not known."""
    precision: str = "fp32"


def machine_troubles(rank: LaunchedRank) -> list[Trouble]:
    """Return what would make the run fail on this host, and warnings.

    The former is looked for by every rank, the latter by the first on each host. No ssh, no network; torch must be
    imported already.
    """
    import torch

    on_gpu = device_of_run() != "cpu"
    visible = torch.cuda.device_count() if on_gpu and torch.cuda.is_available() else 0
    found = [*_device_troubles(rank), *_gpu_troubles(rank, visible), *_offload_troubles(rank.deepspeed)]
    found += op_troubles(unbuilt(needed_ops(rank.deepspeed, on_gpu), built_ahead(on_gpu)), find_build_tools())
    if rank.local_rank == 0:
        found += shared_memory_troubles(SHARED_MEMORY, *shared_memory(SHARED_MEMORY), rank.ranks_here, on_gpu)
        if not on_gpu and not rank.cpu_is_meant and (num_pci_gpus() or num_device_files()):
            unused = why_unused(num_pci_gpus(), num_device_files(), torch.version.cuda)
            found.append(Trouble(f"{unused} (DS_ACCELERATOR=cpu says that it is meant)", fatal=False))
    if rank.rank == 0:
        if (free := free_bytes(rank.output_dir)) is not None:
            found += disk_troubles(rank.output_dir, free, rank.checkpoint_bytes)
        if rank.world_size > rank.ranks_here:
            found += [Trouble(text, fatal=False) for text in secrets_warnings()]
    return [trouble for trouble in found if trouble.fatal or rank.local_rank == 0]


def _device_troubles(rank: LaunchedRank) -> Iterator[Trouble]:
    for trouble in device_troubles(rank.precision, device_facts(rank.precision)):
        if trouble.fatal or rank.rank == 0:
            yield trouble


def _gpu_troubles(rank: LaunchedRank, visible: int) -> Iterator[Trouble]:
    import torch

    if rank.local_rank < visible:
        if torch.version.hip is None:
            capability = torch.cuda.get_device_capability(rank.local_rank)
            name = torch.cuda.get_device_name(rank.local_rank)
            yield from capability_troubles(rank.precision, capability, f"the GPU of rank {rank.rank} ({name})")
    elif visible:
        processes = max(rank.ranks_here, rank.local_rank + 1)
        yield from count_troubles(processes, visible, os.environ.get("CUDA_VISIBLE_DEVICES"))


def _offload_troubles(deepspeed: dict[str, Any]) -> Iterator[Trouble]:
    zero = deepspeed.get("zero_optimization") or {}
    needs_async_io = any(op.name == ASYNC_IO for op in offload_ops(deepspeed, on_gpu=True))
    yield from offload_troubles(zero, nvme_folders(zero), not needs_async_io or async_io_works())


def offload_troubles_here(deepspeed: dict[str, Any]) -> list[Trouble]:
    """Return what this machine lacks for the offload of a configuration, compilers included; DeepSpeed must be imported
    already."""
    on_gpu = device_of_run() != "cpu"
    to_build = unbuilt(offload_ops(deepspeed, on_gpu), built_ahead(on_gpu))
    return [*_offload_troubles(deepspeed), *op_troubles(to_build, find_build_tools())]
