"""Who this process is among all of a run: as deepspeed and torchrun say it, or as SLURM and MPI do."""

import os
import re
from collections.abc import MutableMapping
from dataclasses import dataclass

from dialogpt_ds.errors import UserError

FIRST_PORT, NUM_PORTS = 15_000, 17_000
"""Master ports of SLURM's steps: below those that Linux gives to outgoing connections (32,768 and above)."""

Environment = MutableMapping[str, str]


@dataclass(frozen=True)
class Scheduler:
    """Names of the variables by which a starter of processes tells each of them who it is."""

    name: str
    rank: str
    size: str
    local_rank: str
    local_size: str


SCHEDULERS = (
    # MPI first: in a job of SLURM its daemons are tasks of srun, and their variables reach the ranks.
    Scheduler(
        "mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    Scheduler("mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    # SLURM_STEP_NUM_TASKS is srun's alone; SLURM_NTASKS is there in a batch script too, which is one process.
    Scheduler("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ""),
)
TERMINAL = "SLURM_PTY_PORT"
"""Set by `srun --pty`: a person's shell, which is one of the tasks and speaks for none."""


_adopted: set[str] = set()
"""Who started this process, if it was srun or MPI."""


def is_task_of_scheduler() -> bool:
    """Return whether srun or MPI started this process, with no launcher between that ends the other processes of a host
    with it."""
    return bool(_adopted)


def adopt_scheduler(environment: Environment = os.environ) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK and what goes with them from what srun or MPI says, where no other launcher has.

    Raises:
        UserError: the tasks were not told enough to find each other.
    """
    if "RANK" in environment:
        return
    for scheduler in SCHEDULERS:
        told = all(name in environment for name in (scheduler.rank, scheduler.size, scheduler.local_rank))
        if told and int(environment[scheduler.size]) > 1 and not (scheduler.name == "srun" and TERMINAL in environment):
            break
    else:
        return
    local_size = slurm_tasks_here(environment) if scheduler.name == "srun" else environment.get(scheduler.local_size)
    address, port = _meeting_place(scheduler, environment)
    environment.update(
        RANK=environment[scheduler.rank],
        WORLD_SIZE=environment[scheduler.size],
        LOCAL_RANK=environment[scheduler.local_rank],
        MASTER_ADDR=address,
        MASTER_PORT=port,
    )
    if environment is os.environ:
        _adopted.add(scheduler.name)
    if local_size:
        environment.update(LOCAL_WORLD_SIZE=str(local_size), LOCAL_SIZE=str(local_size))


def _meeting_place(scheduler: Scheduler, environment: Environment) -> tuple[str, str]:
    """Return the address and port where the tasks meet: what a person set, else the first host of SLURM's step."""
    address, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
    nodes = environment.get("SLURM_STEP_NODELIST") if scheduler.name == "srun" else None
    if not address and nodes:
        address = first_host(nodes)
    if not port and scheduler.name == "srun":
        # Another job, or another step, on the same host gets another one.
        step = 7 * int(environment.get("SLURM_JOB_ID", "0")) + int(environment.get("SLURM_STEP_ID", "0"))
        port = str(FIRST_PORT + step % NUM_PORTS)
    if address and port:
        return address, port
    raise UserError(
        f"{scheduler.name} started {environment[scheduler.size]} tasks, but nothing tells them where to meet: set "
        "MASTER_ADDR to the first host and MASTER_PORT to a port that is free there, for all tasks (mpirun -x "
        "MASTER_ADDR=... -x MASTER_PORT=29500 ...)"
    )


def first_host(nodes: str) -> str:
    """Return the first host of one of SLURM's lists: node07 of "node[07-12,15],gpu3", a1b2 of "a[1-3]b[2,4]"."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])+", nodes)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0]) if first else ""


def slurm_tasks_here(environment: Environment) -> int | None:
    """Return the number of the step's tasks on this host: of "4(x2),3", 4 on hosts 0 and 1, and 3 on host 2."""
    host = int(environment.get("SLURM_NODEID", "0"))
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "")):
        host -= int(times or 1)
        if host < 0:
            return int(count)
    return None


def only_gpu(visible: int, environment: Environment = os.environ) -> None:
    """Let a process that its scheduler shows a single GPU (`--gpus-per-task=1`) take it, whatever its number on the
    host is."""
    rank = environment.get("RANK")
    if visible == 1 and any(environment.get(scheduler.rank, "") == rank for scheduler in SCHEDULERS):
        environment["LOCAL_RANK"] = "0"
