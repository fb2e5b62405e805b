"""The run that is meant: its command line, its DeepSpeed configuration, precision, processes and batch."""

from collections.abc import Sequence
from dataclasses import dataclass

from dialogpt_ds.commandline import Parsed
from dialogpt_ds.config.arguments import TrainingArguments
from dialogpt_ds.config.batch import resolve_batch
from dialogpt_ds.config.configuration import Configuration, resolve
from dialogpt_ds.doctor.facts import HostFacts
from dialogpt_ds.doctor.report import Finding, ok, problem
from dialogpt_ds.errors import UserError
from dialogpt_ds.launching.hostfile import Host

CONFIG, BATCH = "config", "batch"
MASTER_PORT = 29_500
"""Where the ranks meet unless the launcher is told otherwise (deepspeed's default)."""


@dataclass
class DoctorArguments(TrainingArguments):
    """Look at the hosts, the software and the configuration of a run, and say what would keep it from training."""

    hostfile: str = ""
    """Hostfile of the run, one NAME slots=N a line, as for deepspeed --hostfile; not given: this machine alone."""
    num_gpus: int | None = None
    """Processes on each host, as for deepspeed --num_gpus; not given: the hostfile's slots, else this machine's
    GPUs."""
    master_port: int = MASTER_PORT
    """Port on the first host at which the ranks meet, as for deepspeed --master_port."""
    master_addr: str = ""
    """Address of the first host, as for deepspeed --master_addr; not given: the first that the host has."""
    no_ssh: bool = False
    """The run is started on each host by itself, as with deepspeed --no_ssh: pdsh is not needed. The doctor asks the
    hosts by ssh still."""
    ssh_port: int | None = None
    """Port of the hosts' ssh servers, as for deepspeed --ssh_port; not given: as ~/.ssh/config says."""


def config_findings(parsed: Parsed[DoctorArguments]) -> tuple[list[Finding], Configuration | None]:
    """Read the configuration as the trainer does it."""
    try:
        found = resolve(parsed)
    except UserError as error:
        return [problem(CONFIG, str(error))], None
    offload = [
        f"{what} on {place}"
        for what, place in zip(("optimizer", "weights"), found.offload, strict=True)
        if place != "none"
    ]
    parts = [
        found.arguments.deepspeed_config or "built in (no --deepspeed_config)",
        f"ZeRO-{found.zero_stage}",
        found.precision,
        *offload,
        *found.notes,
    ]
    return [ok(CONFIG, ", ".join(parts))], found


def ranks_of(
    arguments: DoctorArguments, hosts: Sequence[Host], seen: Sequence[tuple[str, HostFacts]]
) -> dict[str, int]:
    """Return how many processes would be on each host, as the deepspeed launcher counts them; this machine alone is
    ""."""
    if hosts:
        return {host.name: host.slots for host in hosts}
    visible = seen[0][1].num_visible if seen and seen[0][1].on_gpu else 0
    return {"": arguments.num_gpus or visible or 1}


def batch_findings(parsed: Parsed[DoctorArguments], configuration: Configuration, world_size: int) -> list[Finding]:
    """Divide the batch over the processes as the trainer does it."""
    arguments = parsed.arguments
    processes = f"{world_size:,} process{'es' * (world_size != 1)}"
    if arguments.expect_world_size is not None and arguments.expect_world_size != world_size:
        text = f"--expect_world_size {arguments.expect_world_size}, but the hostfile or --num_gpus make it {processes}"
        return [problem(BATCH, text, "correct one of them")]
    try:
        batch = resolve_batch(
            arguments.train_batch_size,
            arguments.gradient_accumulation_steps,
            parsed.explicit,
            configuration.deepspeed,
            world_size,
        )
    except UserError as error:
        return [problem(BATCH, str(error))]
    text = f"{processes} x {batch.accumulation} micro-batches of {batch.micro} = {batch.train:,} rows a step"
    return [ok(BATCH, text)]
