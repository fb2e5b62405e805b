"""A SLURM of two tasks on this machine, for a batch script to meet: srun, scontrol and squeue on PATH, and the job's
variables."""

import os
import shutil
import signal
import sys
from pathlib import Path

SRUN = Path(__file__).with_name("fake_srun.py")


class FakeSlurm:
    """A job in a folder of its own; a restart of it is another call of `environment`."""

    def __init__(self, folder: Path, checkout: Path, nodes: int = 1) -> None:
        self.folder, self.checkout, self.nodes = folder, checkout, nodes
        self._requeued, self._state = folder / "requeued", folder / "state"
        commands = folder / "bin"
        commands.mkdir(parents=True)
        self._command(commands / "srun", f'exec "{sys.executable}" "{SRUN}" "$@"')
        self._command(commands / "scontrol", f'echo "$@" >> "{self._requeued}"')
        self._command(commands / "squeue", f'cat "{self._state}"')
        self.is_now("RUNNING")

    def _command(self, path: Path, line: str) -> None:
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)

    def script(self, script: Path) -> str:
        """Return where SLURM has put its copy of a batch script."""
        copy = self.folder / "spool" / "slurm_script"
        copy.parent.mkdir(exist_ok=True)
        return str(shutil.copy(script, copy))

    def environment(self, restarts: int = 0) -> dict[str, str]:
        """Return what SLURM sets for the batch script at its first start, or after so many restarts."""
        variables = {
            "PATH": os.pathsep.join([str(self.folder / "bin"), os.environ["PATH"]]),
            "FAKE_SLURM": str(self.folder),
            "VENV": sys.prefix,
            "SLURM_SUBMIT_DIR": str(self.checkout),
            "SLURM_JOB_ID": str(4_000_000 + os.getpid()),
            "SLURM_NTASKS": "2",
            "SLURM_NNODES": str(self.nodes),
            "SLURM_CPUS_PER_TASK": "1",
            # A batch script is a task of its own, and these are its.
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
            "SLURM_NODEID": "0",
        }
        return variables | ({"SLURM_RESTART_COUNT": str(restarts)} if restarts else {})

    def signal_tasks(self, number: signal.Signals) -> None:
        """Send all tasks a signal, as SLURM does before a limit or at a preemption."""
        for pid in (self.folder / "tasks").read_text().split():
            os.kill(int(pid), number)

    def is_now(self, state: str) -> None:
        """Let the job be in one of squeue's states."""
        self._state.write_text(state + "\n")

    @property
    def requeues(self) -> list[str]:
        """What scontrol was told."""
        return self._requeued.read_text().splitlines() if self._requeued.exists() else []
