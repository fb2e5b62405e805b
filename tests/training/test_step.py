"""The clock of a step: on a GPU it only puts marks into the queue, and reads them when the step has ended."""

import time

import pytest
import torch

from dialogpt_ds.training.step import StepClock


class Event:
    """Stands for a mark in a GPU's queue: its time is known only once the queue has come to it."""

    queue_time = 0.0
    reached = False

    def record(self) -> None:
        """Take the time that the queue will have."""
        self.time = Event.queue_time

    def elapsed_time(self, later: "Event") -> float:
        """Return milliseconds."""
        assert Event.reached, "read before the step has ended: the device would have to be waited for"
        return later.time - self.time


def work(milliseconds: float) -> str:
    """Queue some work."""
    Event.queue_time += milliseconds
    return "done"


def test_a_gpus_parts_are_read_from_its_queue_after_the_step() -> None:
    clock = StepClock(torch.device("cuda"), Event)
    assert clock.timed("forward", work, 20.0) == "done"
    clock.timed("backward", work, 40.0)
    clock.timed("forward", work, 20.0)
    clock.timed("optimizer", work, 5.0)
    Event.reached = True
    assert clock.seconds() == pytest.approx({"forward": 0.04, "backward": 0.04, "optimizer": 0.005})


def test_a_cpu_goes_by_the_wall_clock() -> None:
    clock = StepClock(torch.device("cpu"))
    clock.timed("backward", time.sleep, 0.02)
    clock.timed("backward", time.sleep, 0.02)
    seconds = clock.seconds()
    assert 0.04 <= seconds["backward"] < 1.0
    assert seconds["forward"] == seconds["optimizer"] == 0.0
