"""The processes of a run: who this one is, and how they come together and part."""

import ctypes
import io
import os
import socket
import sys
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from dialogpt_ds.distributed.cores import share_cores
from dialogpt_ds.distributed.op_locks import release_stale_locks
from dialogpt_ds.distributed.rendezvous import RendezvousWatch, meeting_place, name_interface
from dialogpt_ds.errors import RunError, UserError, first_line
from dialogpt_ds.hardware import device_of_run
from dialogpt_ds.launching.launcher import check_hostfile
from dialogpt_ds.launching.op_folder import use_own_folder
from dialogpt_ds.launching.processes import only_gpu

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt(3), from its malloc.h."""
SECONDS_AFTER_HANG = 60.0
WITHOUT_LIMIT = 7 * 24 * 3600.0
"""Seconds that a collective waits where hangs are not watched for."""


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
    """Return what the launcher says in the environment (see adopt_scheduler()); without one, a world of one process."""
    return World(
        rank=int(os.environ.get("RANK", "0")),
        size=int(os.environ.get("WORLD_SIZE", "1")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
    )


def spans_hosts(world: World) -> bool:
    """Return whether processes of the run are on other hosts, as far as the launcher says."""
    return ranks_here(world) < world.size


def ranks_here(world: World) -> int:
    """Return the number of the run's processes on this host, as the launcher says it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world.size)


def with_own_device(world: World) -> World:
    """Return the world with the number of this process's GPU among those that it sees, where its scheduler shows it
    only its own."""
    import torch

    only_gpu(torch.accelerator.device_count())
    return replace(world, local_rank=int(os.environ.get("LOCAL_RANK", "0")))


def check_world(world: World, expected: int | None) -> None:
    """Refuse a world that the launcher did not make as it was told to, or of another size than `--expect_world_size`;
    raises UserError."""
    check_hostfile()
    if expected is not None and world.size != expected:
        raise UserError(
            f"--expect_world_size {expected}, but {world.size} processes were started: look at the launcher's "
            "--num_gpus, --num_nodes and --hostfile (a host file that is missing is no error to the launcher)"
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
    # The number of targets changes from step to step: blocks of the old sizes would fill a small card up in some
    # hundred steps.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its older name
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    # Collectives that NCCL's flight recorder keeps, for the report of a hang.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    use_own_folder()


def prepare_cpu(world: World, offloads: bool = False) -> None:
    """Make what is computed on the CPU fast: cores shared out among the host's ranks, and freed memory kept for the
    next step.

    glibc gives every large block back to the system when it is freed, so each step pays for new, zeroed pages: half the
    time of the loss's backward pass on a small model (M_MMAP_MAX 0 and no trimming; see mallopt(3)). Other C libraries
    are left alone.

    Args:
        world: this process among all.
        offloads: whether a run on GPUs has its optimizer on the host.
    """
    on_cpu = device_of_run() == "cpu"
    if on_cpu or offloads:
        told = share_cores(ranks_here(world))
        if told and world.local_rank == 0:
            print(told, file=sys.stderr)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if on_cpu and mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def compute_deterministically() -> None:
    """Let a GPU compute the same bits each time; before it is used. Slower: attention's backward pass does not add by
    atomics then."""
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # of cuBLAS's guide; read when its first handle is made
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cuda.enable_cudnn_sdp(False)  # PyTorch has no deterministic backward pass by cuDNN


def free_port() -> int:
    """Return a TCP port that is free on this host."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def join_world(world: World, verbose: bool = False, hang_timeout: float = 0) -> Any:
    """Start communication. Collective: every rank must call.

    Args:
        world: this process among all.
        verbose: let DeepSpeed speak.
        hang_timeout: seconds after which a hang is reported; collectives wait for longer than that, so that the report
            comes first.

    Returns:
        This rank's device.

    Raises:
        RunError: the processes did not come together; names the place, and what to look at.
    """
    import deepspeed
    import torch
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        accelerator.set_device(world.local_rank)
    name_interface()
    for lock in release_stale_locks():
        print(f"removed {lock}, which a process that was killed has left behind", file=sys.stderr)
    if accelerator.device_name() == "cpu":
        # Built on first use, which can take a minute: nobody should think then that ranks are missing.
        with nullcontext() if verbose else redirect_stdout(io.StringIO()):
            accelerator.create_op_builder("ShareMemCommBuilder").load()
    limit = collective_limit(hang_timeout)
    with RendezvousWatch(world.rank, world.size, world.is_first or world.local_rank == 0):
        try:
            with (
                nullcontext() if verbose else redirect_stdout(io.StringIO())
            ):  # every rank would print that an op was built
                deepspeed.init_distributed(
                    accelerator.communication_backend_name(), verbose=verbose, auto_mpi_discovery=False, timeout=limit
                )
            device = torch.device(accelerator.current_device_name())
            # The first reduction makes DeepSpeed map its shared-memory buffers on a CPU.
            deepspeed.comm.all_reduce(torch.zeros(1, device=device))
            deepspeed.comm.barrier()
        except RuntimeError as error:
            raise RunError(_why_apart(error)) from error
    _unlink_shared_buffer(world)
    return device


def collective_limit(hang_timeout: float) -> timedelta:
    """Return how long a collective may take: longer than the watch over hangs waits, whose report is to come first."""
    return timedelta(seconds=hang_timeout + SECONDS_AFTER_HANG if hang_timeout else WITHOUT_LIMIT)


def limit_groups(limit: timedelta) -> None:
    """Give every group of processes the limit. DeepSpeed makes its own, which would end a run of NCCL's after 10
    minutes."""
    from torch.distributed.distributed_c10d import _set_pg_timeout, _world

    for group in list(_world.pg_map):
        _set_pg_timeout(limit, group)


def _why_apart(error: RuntimeError) -> str:
    """Return what to say where the processes did not come together."""
    said = first_line(error)
    if "EADDRINUSE" in str(error) or "address already in use" in str(error):
        return (
            f"port {os.environ['MASTER_PORT']}, where this run's processes meet, is taken on this host, perhaps by "
            "another run: name another one (deepspeed --master_port 29501 ..., torchrun --master_port 29501 ...). "
            f"({said[:200]})"
        )
    if "NCCL" in f"{type(error).__name__} {error}":
        reason = str(error).partition("Last error:")[2].strip() or said
        return (
            f"the processes met at {meeting_place()}, but their GPUs could not be connected (NCCL): "
            f"{' '.join(reason.split())[:500]}. Two processes on one GPU, a driver that fails, or an interface that "
            "leads nowhere (NCCL_SOCKET_IFNAME) are the usual reasons; NCCL_DEBUG=INFO says more"
        )
    return (
        f"the processes did not come together at {meeting_place()}: do all hosts reach this address and port? python "
        f"launch/doctor.py --hostfile HOSTS finds out. ({type(error).__name__}: {said[:300]})"
    )


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
