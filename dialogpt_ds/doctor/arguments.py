"""The doctor's command line: the arguments of the run that is meant, and those of its launcher."""

from dataclasses import dataclass

from dialogpt_ds.config.arguments import TrainingArguments

MASTER_PORT = 29_500
"""Where the ranks meet unless the launcher is told otherwise (deepspeed's default)."""


@dataclass
class DoctorArguments(TrainingArguments):
    """Look at the hosts, the software and the configuration of a run, and say what would keep it from training."""

    hostfile: str = ""
    """Hostfile of the run, one NAME slots=N a line, as for deepspeed --hostfile; not given: this machine alone."""
    num_gpus: int | None = None
    """Processes on each host, as for deepspeed --num_gpus; not given: the hostfile's slots, else this machine's GPUs."""
    master_port: int = MASTER_PORT
    """Port on the first host at which the ranks meet, as for deepspeed --master_port."""
    master_addr: str = ""
    """Address of the first host, as for deepspeed --master_addr; not given: the first that the host has."""
    no_ssh: bool = False
    """The run is started on each host by itself, as with deepspeed --no_ssh: pdsh is not needed. The doctor asks the hosts by ssh still."""
    ssh_port: int | None = None
    """Port of the hosts' ssh servers, as for deepspeed --ssh_port; not given: as ~/.ssh/config says."""
