"""Starting the product as a user does, in a clean environment, with an end in bounded time."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from dialogpt_ds.distributed.world import free_port
from tests.conftest import ROOT

TRAIN = str(ROOT / "launch" / "train.py")
TRAIN_FP16_ON_CPU = str(ROOT / "tests" / "ranks" / "train_fp16_on_cpu.py")
TRAIN_ON_OLD_GPU = str(ROOT / "tests" / "ranks" / "train_on_old_gpu.py")
BIN = Path(sys.executable).parent


def deepspeed(ranks: int, script: str = TRAIN) -> list[str]:
    """Return the command of the real deepspeed launcher."""
    return [str(BIN / "deepspeed"), "--num_gpus", str(ranks), "--master_port", str(free_port()), script]


def torchrun(ranks: int) -> list[str]:
    """Return the command of torchrun."""
    return [str(BIN / "torchrun"), "--nproc_per_node", str(ranks), "--master_port", str(free_port()), TRAIN]


def python(script: str = TRAIN) -> list[str]:
    """Return the command of plain python."""
    return [sys.executable, script]


def clean_environment() -> dict[str, str]:
    """Return the tests' environment without what a launcher sets."""
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in dropped}


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


class Launched:
    """A command at work in the background, in a process group of its own; everything of it is gone when the block
    ends."""

    def __init__(self, command: list[str], log: Path, environment: dict[str, str] | None = None) -> None:
        self.log = log
        with open(log, "wb") as file:
            self.process = subprocess.Popen(
                command,
                stdout=file,
                stderr=file,
                cwd=ROOT,
                start_new_session=True,
                env=clean_environment() | (environment or {}),
            )
        self._seen: dict[int, psutil.Process] = {}

    def __enter__(self) -> "Launched":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.descendants():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.kill()
        self.process.wait()

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace")

    def descendants(self) -> list[psutil.Process]:
        """Return all processes that were ever seen below it and still run, also where those between are gone."""
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                self._seen.setdefault(child.pid, child)
        return [process for process in self._seen.values() if _lives(process)]

    def ranks(self) -> list[psutil.Process]:
        """Return its training processes, in order of rank."""
        found = {}
        for process in self.descendants():
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                parent = process.parent()
                if "RANK" in environment and parent is not None and "RANK" not in parent.environ():
                    found[int(environment["RANK"])] = process
        return [found[rank] for rank in sorted(found)]

    def launcher(self) -> psutil.Process:
        """Return the process that started the ranks."""
        parent = self.ranks()[0].parent()
        assert parent is not None
        return parent

    def wait_until(self, what: Callable[[], object], timeout: float = 90.0) -> None:
        """Wait until something is so; fails where the command ends, or time runs out, before that."""
        deadline = time.monotonic() + timeout
        while not what():
            self.descendants()
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.output}"
            assert time.monotonic() < deadline, f"waited for {timeout} s:\n{self.output}"
            time.sleep(0.02)

    def wait(self, timeout: float = 90.0) -> int:
        """Wait for the end of the command and of everything below it; returns the command's exit code."""
        deadline = time.monotonic() + timeout
        self.process.wait(timeout)
        while self.descendants():
            assert time.monotonic() < deadline, f"these are still there: {self.descendants()}\n{self.output}"
            time.sleep(0.05)
        return self.process.returncode


def run(command: list[str], timeout: float = 180.0, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; kills its whole process group when it takes longer than `timeout` seconds."""
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment(),
        cwd=cwd or ROOT,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            raise AssertionError(f"{command} took longer than {timeout} s:\n{out}\n{err}") from None
    return subprocess.CompletedProcess(command, process.returncode, out, err)
