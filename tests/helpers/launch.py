"""Starting the product as a user does, in a clean environment, with an end in bounded time."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from dialogpt_ds.training.world import free_port
from tests.conftest import ROOT

TRAIN = str(ROOT / "launch" / "train.py")
TRAIN_FP16_ON_CPU = str(ROOT / "tests" / "helpers" / "train_fp16_on_cpu.py")
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


def run(command: list[str], timeout: float = 180.0, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; kills its whole process group when it takes longer than `timeout` seconds."""
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
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
