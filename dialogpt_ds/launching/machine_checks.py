"""What can be seen of a machine in a few milliseconds, by each process of a run, before it meets the others."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dialogpt_ds.errors import UserError
from dialogpt_ds.hardware import device_of_run
from dialogpt_ds.launching import gpu_precision
from dialogpt_ds.launching.environment_file import find_environment_files, read_environment_file
from dialogpt_ds.launching.needed_ops import NeededOp, build_problems, find_build_tools, needed_ops
from dialogpt_ds.launching.nvidia import num_device_files, num_pci_gpus, why_unused

SHARED_MEMORY = Path("/dev/shm")
CPU_RANK_BYTES = 69_000_000
"""What DeepSpeed's shared-memory operation takes there for each rank on a CPU (measured, 0.19.8)."""
GPU_RANK_BYTES = 128_000_000
"""Room there below which a warning is due for each rank on a GPU: NCCL keeps the buffers of a pair of GPUs there that can't reach each
other directly, and fails where it is full; NVIDIA's guide advises 1 GB for a container with eight."""


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


def launch_problems(rank: LaunchedRank) -> tuple[list[str], list[str]]:
    """Return what would make the run fail on this host, and warnings.

    Problems are looked for by every rank, warnings by the first on each host. No ssh, no network; torch must be imported already.
    """
    import torch

    on_gpu = device_of_run() != "cpu"
    visible = torch.cuda.device_count() if on_gpu and torch.cuda.is_available() else 0
    refusal, slowness = _precision_findings(rank, visible)
    problems = [*_gpu_problems(rank, visible), *refusal, *_op_problems(rank, on_gpu)]
    warnings: list[str] = []
    if rank.local_rank == 0:
        warnings += slowness
        shm_problem, shm_warning = shared_memory_findings(SHARED_MEMORY, rank.ranks_here, on_gpu)
        problems += shm_problem
        warnings += shm_warning
        if not on_gpu and not rank.cpu_is_meant and (num_pci_gpus() or num_device_files()):
            warnings.append(
                why_unused(num_pci_gpus(), num_device_files(), torch.version.cuda) + " (DS_ACCELERATOR=cpu says that it is meant)"
            )
    if rank.rank == 0:
        problems += disk_problems(rank.output_dir, rank.checkpoint_bytes)
        if rank.world_size > rank.ranks_here:
            warnings += secret_warnings()
    return problems, warnings


def _gpu_problems(rank: LaunchedRank, visible: int) -> Iterator[str]:
    if visible and rank.local_rank >= visible:
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
        because = f" (CUDA_VISIBLE_DEVICES={chosen})" if chosen is not None else ""
        yield (
            f"rank {rank.rank} is number {rank.local_rank + 1} on this host and would take GPU {rank.local_rank}, but there "
            f"{'is' if visible == 1 else 'are'} only {visible} here{because}: start no more than {visible} on it (deepspeed --num_gpus "
            f"{visible}, or slots={visible} in the hostfile)"
        )


def _precision_findings(rank: LaunchedRank, visible: int) -> tuple[list[str], list[str]]:
    """Return why this rank's GPU can't compute in the run's precision, and why it is slow in it. DeepSpeed takes emulated bf16 for good."""
    import torch

    if rank.local_rank >= visible or torch.version.hip is not None:
        return [], []
    name = torch.cuda.get_device_name(rank.local_rank)
    capability = torch.cuda.get_device_capability(rank.local_rank)
    refusal, slowness = gpu_precision.findings(rank.precision, capability, f"the GPU of rank {rank.rank} ({name})")
    return ([f"{refusal}: {gpu_precision.FP16_CONFIGURATION}"] if refusal else []), ([slowness] if slowness else [])


def _op_problems(rank: LaunchedRank, on_gpu: bool) -> list[str]:
    return list(build_problems(unbuilt(needed_ops(rank.deepspeed, on_gpu), built_ahead(on_gpu)), find_build_tools()))


def built_ahead(on_gpu: bool) -> set[str]:
    """Return the names of the operations that were built when DeepSpeed was installed; only if DeepSpeed is imported already."""
    installed = sys.modules.get("deepspeed.git_version_info")
    if installed is None:
        return set()
    if installed.accelerator_name != ("cuda" if on_gpu else "cpu"):
        return set()  # DeepSpeed takes them only on the kind of device that they were built for
    return {name for name, built in installed.installed_ops.items() if built}


def unbuilt(ops: list[NeededOp], built: set[str]) -> list[NeededOp]:
    """Return the operations that have to be built on their first use."""
    return [op for op in ops if op.name not in built]


def shared_memory_findings(folder: Path, ranks_here: int, on_gpu: bool) -> tuple[list[str], list[str]]:
    """Return a problem where a host's shared memory is too small for the run, or a warning where it may be."""
    try:
        found = shutil.disk_usage(folder)
    except OSError as error:
        return [f"{folder} can't be looked at ({error.strerror}), and ranks exchange data there: mount a tmpfs on it"], []
    return shared_memory_text(str(folder), found.total, found.free, ranks_here, on_gpu)


def shared_memory_text(where: str, total: int, free: int, ranks_here: int, on_gpu: bool) -> tuple[list[str], list[str]]:
    """Return the problem or the warning for a shared memory of `total` bytes with `free` ones."""
    way_out = (
        f"a container gets more by docker run --shm-size=1g; on a host: mount -o remount,size=1g {where}, or remove what fills it"
    )
    needed = CPU_RANK_BYTES * ranks_here
    if not on_gpu and ranks_here > 1 and free < needed:
        return [
            f"{where} has {free / 1e6:,.0f} MB free of {total / 1e6:,.0f}, and {ranks_here} ranks on a CPU need {needed / 1e6:,.0f} MB "
            f"there: {way_out}"
        ], []
    wanted = GPU_RANK_BYTES * ranks_here
    if on_gpu and ranks_here > 1 and free < wanted:
        return [], [
            f"{where} has {free / 1e6:,.0f} MB free of {total / 1e6:,.0f}; NCCL may need more for {ranks_here} GPUs, and ends with "
            f"'No space left on device' then: {way_out}"
        ]
    return [], []


def disk_problems(output_dir: Path, checkpoint_bytes: int) -> Iterator[str]:
    """Yield a problem where the disk of output_dir has no room for a single checkpoint."""
    place = existing_part(output_dir)
    try:
        free = shutil.disk_usage(place).free
    except OSError:
        return
    if free < checkpoint_bytes:
        yield (
            f"--output_dir {output_dir}: its disk has {free / 1e9:,.1f} GB free, and one checkpoint takes about "
            f"{checkpoint_bytes / 1e9:,.1f} GB: make room, or name a folder on another disk"
        )


def existing_part(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    folder = folder.expanduser().absolute()
    # Path.exists() raises where a folder above may not be entered.
    return next(place for place in (folder, *folder.parents) if os.path.exists(place))


def secret_warnings() -> Iterator[str]:
    """Yield a warning for each file of variables that gives secrets to all hosts."""
    for path in find_environment_files():
        with suppress(UserError):  # the launcher could not read it either, and would have ended
            secrets = read_environment_file(path).secrets
            if secrets:
                yield secrets_text(path, secrets)


def secrets_text(path: Path, secrets: list[str]) -> str:
    """Return the warning about secrets in a file of variables."""
    return (
        f"{path} holds {', '.join(secrets)}, and the launcher prints its values in its log and in every host's list of processes: put "
        "secrets where each host reads them itself (~/.netrc for wandb, HF_HOME's token file for the hub), and remove the line"
    )
