"""How long the parts of an optimizer step take, without making the device wait for the clock."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

PARTS = ("forward", "backward", "optimizer")
Result = TypeVar("Result")


class StepClock:
    """Times the parts of one step. On a CPU by the wall clock; on a GPU by events in its queue, which are read after the step's end."""

    def __init__(self, device: torch.device, make_event: Callable[[], Any] | None = None) -> None:
        if make_event is None and device.type != "cpu":
            make_event = lambda: torch.Event(device, enable_timing=True)  # noqa: E731
        self._make_event = make_event
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._pairs: list[tuple[str, Any, Any]] = []

    def timed(self, part: str, work: Callable[..., Result], *positional: Any, **named: Any) -> Result:
        """Do some work that belongs to a part."""
        if self._make_event is None:
            started = time.perf_counter()
            result = work(*positional, **named)
            self._seconds[part] += time.perf_counter() - started
            return result
        before, after = self._make_event(), self._make_event()
        before.record()
        result = work(*positional, **named)
        after.record()
        self._pairs.append((part, before, after))
        return result

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each part; on a GPU to be called when it has come to the end of the step."""
        for part, before, after in self._pairs:
            self._seconds[part] += before.elapsed_time(after) / 1e3  # milliseconds
        self._pairs = []
        return self._seconds
