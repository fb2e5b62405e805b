"""A watch over hangs: where nothing has moved for too long, every rank writes down where it stands, and the run
ends."""

import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from dialogpt_ds.errors import EXIT_RUN_FAILED

STACKS_SECONDS = 5.0
"""How long a rank that has written its stacks waits for the others to write theirs, before the launcher ends them
all."""


class HangWatch:
    """Watches this rank while it is entered. Where one rank hangs, the others wait for it in a collective and time out
    with it."""

    def __init__(self, folder: Path, rank: int, timeout: float) -> None:
        self._path = folder / f"stacks-rank-{rank}.txt"
        self._rank, self._timeout = rank, timeout
        self._doing, self._since = "starting", time.monotonic()
        self._ended = threading.Event()
        self._stderr = sys.stderr
        """Kept: a library's chatter may be caught at the moment when this has to speak."""

    def __enter__(self) -> "HangWatch":
        faulthandler.register(signal.SIGUSR2, all_threads=True)  # kill -USR2 shows where a rank is, which goes on
        if self._timeout:
            self.beat("starting")
            threading.Thread(target=self._watch, name="hang-watch", daemon=True).start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._ended.set()
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(signal.SIGUSR2)

    def beat(self, doing: str) -> None:
        """Say that something has moved, and what comes now."""
        self._doing, self._since = doing, time.monotonic()
        if self._timeout and not self._ended.is_set():
            # Runs outside of Python, so it ends also a rank in which no thread of Python's gets its turn; it writes to
            # stderr.
            faulthandler.dump_traceback_later(self._timeout + 2 * STACKS_SECONDS, exit=True, file=self._stderr)

    def _watch(self) -> None:
        while not self._ended.wait(min(self._timeout / 4, 1.0)):
            waited = time.monotonic() - self._since
            if waited > self._timeout:
                self._give_up(waited)

    def _give_up(self, waited: float) -> None:
        say = (
            f"rank {self._rank} on {socket.gethostname()}, process {os.getpid()}: nothing has moved for "
            f"{waited:,.0f} s (--hang_timeout {self._timeout:g}) while {self._doing}. "
            f"Where each thread stands is in {self._path}"
        )
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(f"{say}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            file.write(_collectives())
        hint = (
            "; the rank whose main thread is not in a collective is the one that hangs. The last complete checkpoint "
            "is kept: the same command goes on from it."
        )
        print(f"run failed: {say}{hint if self._rank == 0 else ''}", file=self._stderr, flush=True)
        time.sleep(STACKS_SECONDS)
        os._exit(EXIT_RUN_FAILED)


def _collectives() -> str:
    """Return what NCCL's flight recorder knows of the collectives that have not ended; nothing where there is none."""
    try:
        from torch._C import _distributed_c10d

        record = _distributed_c10d._dump_nccl_trace_json(includeCollectives=True, onlyActive=True)  # type: ignore[attr-defined]
    except Exception:  # a build without NCCL, or another version's recorder; the report goes on without
        return ""
    return f"collectives of NCCL that have not ended: {record.decode(errors='replace')}\n"
