"""A rank's loader on a machine that seems to have a GPU, whose worker process is killed: python killed_loader.py SHARDS
half|between

half: in the middle of a message to the rank, as by the kernel for want of memory; between: while it has said nothing.
Prints what the loader says of it.
"""

import multiprocessing.connection
import os
import signal
import sys
from typing import Any

import psutil
import torch

from dialogpt_ds.order.batches import RankSlice
from dialogpt_ds.order.mixture import MixturePosition
from dialogpt_ds.shards.reader import ShardDirectory
from dialogpt_ds.training.data import Failure, step_batches
from tests.helpers.streams import EOS, key_of

LARGE = 20_000
"""Bytes from which a message is a batch."""
BATCHES = 3


def pretend_to_have_a_gpu() -> None:
    """Let torch's loader start all that it starts beside an accelerator; memory stays as it is."""
    torch.accelerator.is_available = lambda *_, **__: True  # type: ignore[assignment]
    torch.accelerator.current_accelerator = lambda *_, **__: torch.device("cpu")  # type: ignore[assignment]
    torch.accelerator.current_device_index = lambda: 0  # type: ignore[assignment]
    torch.accelerator.set_device_index = lambda _: None  # type: ignore[assignment]
    torch.Tensor.pin_memory = lambda self: self  # type: ignore[assignment, method-assign]


def die_in_the_middle_of_a_message() -> None:
    """Let a worker write half of its third batch, and end as by kill -9."""
    rank, sent, real = os.getpid(), [0], multiprocessing.connection.Connection._send  # type: ignore[attr-defined]

    def send(self: Any, buffer: Any, write: Any = os.write) -> None:
        if os.getpid() != rank and len(buffer) > LARGE:
            sent[0] += 1
            if sent[0] == BATCHES:
                os.write(self._handle, bytes(buffer)[: len(buffer) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
        real(self, buffer, write)

    multiprocessing.connection.Connection._send = send  # type: ignore[attr-defined]


def main() -> None:
    """Take batches until the loader says that there are none."""
    pretend_to_have_a_gpu()
    half = sys.argv[2] == "half"
    if half:
        die_in_the_middle_of_a_message()
    directory = ShardDirectory.open(sys.argv[1], "test")
    steps = step_batches([directory], key_of([directory]), RankSlice(0, 1, 64, 1), MixturePosition.start(), EOS, 1)
    for number, step in enumerate(steps, start=1):
        if isinstance(step, Failure):
            print(f"after {number - 1} batches: {step.message}")
            return
        if number == BATCHES and not half:
            for child in psutil.Process().children():
                child.kill()


if __name__ == "__main__":
    main()
