"""Checks that may crash or hang: each in a thread of its own, with a time limit."""

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

_Result = TypeVar("_Result")


class LateError(Exception):
    """A task has not ended in its time."""


class Task(Generic[_Result]):
    """Work that begins at once. A thread that never ends does not keep the program from ending."""

    def __init__(self, work: Callable[[], _Result]) -> None:
        self._work = work
        self._result: list[_Result] = []
        self._error: BaseException | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            self._result.append(self._work())
        except BaseException as error:  # told to whoever asks for the result
            self._error = error
        self._ended.set()

    def result(self, seconds: float) -> _Result:
        """Return what the work returned, or raise what it raised; raises LateError after so many seconds."""
        if not self._ended.wait(max(seconds, 0.0)):
            raise LateError
        if self._error is not None:
            raise self._error
        return self._result[0]


class Clock:
    """The time that a command has in all."""

    def __init__(self, seconds: float) -> None:
        self._started, self._seconds = time.monotonic(), seconds

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def share(self, seconds: float) -> float:
        """Return a limit for the next piece of work: so many seconds, or what is left; never less than half a
        second."""
        return max(min(seconds, self._seconds - self.spent), 0.5)
