"""The processes of a run: who this one is, and how they come together and part."""

import ctypes
import io
import os
import socket
import sys
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dialogpt_ds.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt(3), from its malloc.h."""


@dataclass(frozen=True)
class World:
    """This process among all of the run."""

    rank: int
    size: int
    local_rank: int
    """Rank on this host, which is the number of its GPU."""

    @property
    def is_first(self) -> bool:
        """Rank 0 prints and writes; all ranks compute."""
        return self.rank == 0


def world_from_environment() -> World:
    """Return what the launcher (deepspeed, torchrun) says in the environment; without one, a world of one process."""
    return World(
        rank=int(os.environ.get("RANK", "0")),
        size=int(os.environ.get("WORLD_SIZE", "1")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
    )


def check_world(world: World, expected: int | None) -> None:
    """Refuse a world of another size than `--expect_world_size`; raises UserError."""
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if world.size == 1 and tasks > 1:
        raise UserError(
            f"srun started {tasks} tasks, but nothing tells them of each other (RANK and WORLD_SIZE are not set), so each would be a "
            "run of its own on one --output_dir. Start one task per node with torchrun in it, or set RANK, WORLD_SIZE, LOCAL_RANK, "
            "MASTER_ADDR and MASTER_PORT from SLURM's variables."
        )
    if expected is not None and world.size != expected:
        raise UserError(
            f"--expect_world_size {expected}, but {world.size} processes were started: look at the launcher's --num_gpus, "
            "--num_nodes and --hostfile (a host file that is missing is no error to the launcher)"
        )


def prepare_environment(world: World) -> None:
    """Set what DeepSpeed and its op builds need; before deepspeed is imported."""
    # An op is built with ninja on first use; pdsh shells and an unactivated venv don't have its folder on PATH.
    folder = os.path.dirname(sys.executable)
    if folder not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([folder, os.environ.get("PATH", "")])
    if "RANK" not in os.environ:
        # Without these DeepSpeed looks for MPI.
        os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(free_port()))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def prepare_cpu(world: World) -> None:
    """Make training on a CPU fast: cores shared out among the host's ranks, and freed memory kept for the next step.

    glibc gives every large block back to the system when it is freed, so each step pays for new, zeroed pages: half the time of the
    loss's backward pass on a small model (M_MMAP_MAX 0 and no trimming; see mallopt(3)). Other C libraries are left alone.
    """
    import torch

    if torch.accelerator.is_available():
        return
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world.size)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(len(os.sched_getaffinity(0)) // ranks_here, 1))
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def free_port() -> int:
    """Return a TCP port that is free on this host."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def join_world(world: World, verbose: bool = False) -> Any:
    """Start communication. Collective: every rank must call. Returns this rank's device; not `verbose` keeps DeepSpeed silent."""
    import deepspeed
    import torch
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        accelerator.set_device(world.local_rank)
    with nullcontext() if verbose else redirect_stdout(io.StringIO()):  # every rank would print that an op was built
        deepspeed.init_distributed(accelerator.communication_backend_name(), verbose=verbose, auto_mpi_discovery=False)
    device = torch.device(accelerator.current_device_name())
    # The first reduction makes DeepSpeed map its shared-memory buffers on a CPU.
    deepspeed.comm.all_reduce(torch.zeros(1, device=device))
    deepspeed.comm.barrier()
    _unlink_shared_buffer(world)
    return device


def _unlink_shared_buffer(world: World) -> None:
    """Remove this rank's name of DeepSpeed's shared-memory buffer: 69 MB that would stay behind after every run.

    All ranks have it mapped by now, and the memory goes with the last of them.
    """
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{world.rank}"
    Path("/dev/shm", name).unlink(missing_ok=True)


def leave_world(engine: Any) -> None:
    """End communication in good order; a process that just ends is aborted now and then. Collective."""
    import torch

    if engine is not None:
        engine.destroy()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
