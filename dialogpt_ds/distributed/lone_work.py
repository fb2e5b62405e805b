"""What rank 0 does alone while the others wait: they see how it gets on, so that long work is no hang, and a hang still
is one."""

import sys
import time
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from dialogpt_ds.distributed.collectives import broadcast_from_rank0, gather_reports
from dialogpt_ds.distributed.hang_watch import HangWatch
from dialogpt_ds.distributed.world import World
from dialogpt_ds.errors import RunError

LOOK_SECONDS = 0.5
"""Between two words of rank 0, and between two looks of the others; well below the shortest --hang_timeout."""
SCREEN_SECONDS = 60.0
"""Between two lines on the screen."""
DONE = b"done"

_Result = TypeVar("_Result")
Tell = Callable[[str], None]


def first_works(
    work: Callable[[Tell], _Result], what: str, world: World, watch: HangWatch, device: torch.device
) -> _Result:
    """Return on every rank what rank 0's `work` returns. Collective: every rank must call.

    The others wait outside of any collective, which would end with its own timeout however well rank 0 gets on. A beat
    of rank 0 is one of theirs.

    Args:
        work: is given a function to say what it is doing each time that something is done, however often that is.
        what: the work in words that follow "rank 0 is" and "failed while".
        world: this process among all.
        watch: over hangs of this rank.
        device: of this rank's tensors.

    Raises:
        RunError: on every rank; the work failed.
    """
    board = _Board()
    result, failure = None, None
    if world.is_first:
        tell = _Teller(board, watch)
        try:
            result = work(tell)
        except Exception as error:  # whatever it is, the others must hear of it, or they wait for ever
            failure = str(error) if isinstance(error, RunError) else f"failed while {what}: {_words(error)}"
        finally:
            board.write(DONE)
    else:
        _wait(board, what, watch)
    failures = gather_reports(failure, device)
    if failures:
        raise RunError(failures[0])
    return broadcast_from_rank0(result)


class _Board:
    """What rank 0 says last, in the store by which the processes have met. Collective: every rank must make one."""

    def __init__(self) -> None:
        self._store: Any = None
        if torch.distributed.is_initialized():
            self._store = torch.distributed.distributed_c10d._get_default_store()
        self._key = broadcast_from_rank0(f"dialogpt_ds/lone_work/{uuid.uuid4().hex}")

    def write(self, words: bytes) -> None:
        if self._store is not None:
            self._store.set(self._key, words)

    def read(self) -> bytes:
        """Return the last words; nothing where there are none yet."""
        return self._store.get(self._key) if self._store.check([self._key]) else b""


class _Teller:
    """Rank 0's beats: to its own watch, to the others and, now and then, to the screen."""

    def __init__(self, board: _Board, watch: HangWatch) -> None:
        self._board, self._watch = board, watch
        self._told, self._shown, self._number = 0.0, time.monotonic(), 0
        self._screen = sys.stdout
        """Kept: the work may catch a library's chatter."""

    def __call__(self, doing: str) -> None:
        now = time.monotonic()
        self._number += 1
        if now - self._told >= LOOK_SECONDS:
            self._told = now
            self._watch.beat(doing)
            self._board.write(f"{self._number} {doing}".encode())
        if now - self._shown >= SCREEN_SECONDS:
            self._shown = now
            print(f"still {doing}", file=self._screen, flush=True)


def _wait(board: _Board, what: str, watch: HangWatch) -> None:
    watch.beat(f"waiting for rank 0, which is {what}")
    before, pause = b"", 0.001
    while (words := board.read()) != DONE:
        if words != before:
            before = words
            watch.beat(f"waiting for rank 0, which is {words.decode().partition(' ')[2]}")
        time.sleep(pause)
        pause = min(2 * pause, LOOK_SECONDS)  # most work is short


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
