"""A real SLURM on this machine that poses as two nodes, where it is installed (Debian 12: slurmctld slurmd
slurm-client; 22.05)."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.conftest import ROOT
from tests.ranks.launch import free_port

PROGRAMS = ("slurmctld", "slurmd", "slurmstepd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")


def what_is_missing() -> str:
    """Return why there can be no SLURM here, "" if there can."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"not installed: {', '.join(missing)}" if missing else "" if os.geteuid() == 0 else "slurmd needs root"


class RealSlurm:
    """A controller and two nodes, as long as the block lasts. No GPUs, no accounting, no checks of who somebody is."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []
        self.environment: dict[str, str] = {"SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> "RealSlurm":
        host = socket.gethostname()
        here = self._folder
        for name in ("state", "spool"):
            (here / name).mkdir(parents=True)
        ports = [free_port() for _ in range(3)]
        nodes = "\n".join(
            f"NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[number]} CPUs=4 RealMemory=1000"
            for number in (1, 2)
        )
        (here / "slurm.conf").write_text(
            f"ClusterName=test\nSlurmctldHost={host}(127.0.0.1)\nSlurmctldPort={ports[0]}\nSlurmUser=root\n"
            "AuthType=auth/none\nCredType=cred/none\nProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nMpiDefault=none\n"
            f"StateSaveLocation={here}/state\nSlurmdSpoolDir={here}/spool/%n\nSlurmctldPidFile={here}/slurmctld.pid\n"
            f"SlurmdPidFile={here}/%n.pid\nSlurmctldLogFile={here}/slurmctld.log\nSlurmdLogFile={here}/%n.log\n"
            "SlurmdParameters=config_overrides\nSelectType=select/cons_tres\nSelectTypeParameters=CR_Core\nReturnToService=2\n"
            f"{nodes}\nPartitionName=main Nodes=n[1-2] Default=YES\n"
        )
        self._start("slurmctld", "-D", "-c")
        for node in ("n1", "n2"):
            self._start("slurmd", "-D", "-N", node, "-d", str(shutil.which("slurmstepd")))
        try:
            wait_until(lambda: self.say("sinfo", "--noheader", "--format=%D %t", check=False) == "2 idle", 60)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.say("scancel", "--partition=main", check=False)
        wait_until(lambda: not self.say("squeue", "--noheader", check=False), 60)
        self._end()

    def _end(self) -> None:
        for daemon in self._daemons:
            daemon.terminate()
        for daemon in self._daemons:
            daemon.wait(30)

    def _start(self, *command: str) -> None:
        with open(self._folder / "daemons.log", "ab") as log:
            self._daemons.append(subprocess.Popen(command, env=os.environ | self.environment, stdout=log, stderr=log))

    def say(self, *command: str, check: bool = True, variables: dict[str, str] | None = None) -> str:
        """Run one of SLURM's commands in the checkout; returns what it prints."""
        environment = os.environ | self.environment | (variables or {})
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 or not check, done.stderr
        return done.stdout.strip()

    def state(self, job: str) -> tuple[str, int]:
        """Return a job's state and how often it was started again."""
        facts = dict(
            word.partition("=")[::2] for word in self.say("scontrol", "--oneliner", "show", "job", job).split()
        )
        return facts["JobState"], int(facts["Restarts"])


def wait_until(what: Callable[[], object], timeout: float) -> None:
    """Wait until something is so; fails when time runs out before that."""
    deadline = time.monotonic() + timeout
    while not what():
        assert time.monotonic() < deadline, f"waited for {timeout} s"
        time.sleep(0.2)
