"""The clock of a step: on a GPU it only puts marks into the queue, and reads them when the step has ended."""

import time

import pytest
import torch

from dialogpt_ds.distributed.world import World
from dialogpt_ds.training.gauges import GAUGES, largest, told_by_this_rank
from dialogpt_ds.training.step_clock import StepClock


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


def test_the_largest_gauge_of_all_ranks_comes_out_of_a_sum() -> None:
    device = torch.device("cpu")
    told = [told_by_this_rank(World(rank, 3, rank), device, seconds_data=float(rank + 1)) for rank in range(3)]
    sums = [sum(column) for column in zip(*told, strict=True)]
    assert len(sums) == 3 * len(GAUGES)
    found = largest(sums)
    assert found["seconds_data"] == 3.0
    assert found["gpu_memory_gib"] is None
    assert 0.01 < (found["host_memory_gib"] or 0) <= (found["peak_memory_gib"] or 0) + 0.1


def test_a_gpus_memory_is_asked_for_once_and_told_in_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = {"allocated_bytes.all.peak": 3 * 2**30, "allocated_bytes.all.current": 2**30, "reserved_bytes.all.current": 4 * 2**30,
             "num_alloc_retries": 2}  # fmt: skip
    asked: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: (asked.append(device), stats)[1])
    found = largest(told_by_this_rank(World(0, 1, 0), torch.device("cuda", 0), 0.5))
    assert len(asked) == 1, "each look takes a tenth of a millisecond"
    assert (found["gpu_memory_gib"], found["gpu_reserved_gib"], found["gpu_alloc_retries"]) == (1.0, 4.0, 2.0)
    assert found["peak_memory_gib"] == 3.0
