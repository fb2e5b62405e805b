"""Requests to stop, as they reach one rank: signals, a STOP file, a launcher that is gone. All ranks agree on them at a
step's end."""

import ctypes
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import psutil

from dialogpt_ds.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_PREEMPTED, EXIT_RUN_FAILED
from dialogpt_ds.launching.launcher import runner_at

STOP_FILE = "STOP"
LOOK_AT_STOP_FILE_SECONDS = 1.0
PR_SET_PDEATHSIG = 1
"""Option of Linux's prctl(2): the signal that a process gets when its parent ends."""

REASONS = ("SIGINT", "STOP file", "SIGTERM", "SIGUSR1", "SIGHUP", "launcher is gone")
"""What a run may be asked to stop by, in the order in which one is named where several came."""
DONE_REASONS = ("SIGINT", "STOP file")
"""Those that a person means for good; the others are preemption."""


def exit_code_of(reason: str) -> int:
    """Return the exit code of a stop that was carried out."""
    return EXIT_DONE if reason in DONE_REASONS else EXIT_PREEMPTED


def first_reason(counts: list[float]) -> str | None:
    """Return the first of REASONS that some rank had, from the sums over all ranks of what each has."""
    return next((reason for reason, count in zip(REASONS, counts, strict=True) if count > 0), None)


class StopRequests:
    """Listens while it is entered. A thread reads the signals, so that they arrive also while this rank waits in a
    collective."""

    def __init__(self, output_dir: Path, is_first: bool) -> None:
        self._stop_file = output_dir / STOP_FILE if is_first else None
        self._reasons: set[str] = set()
        self._handlers: dict[int, Any] = {}
        self._being_carried_out = False
        self._launcher = _launcher_of(psutil.Process())
        self._siblings: list[psutil.Process] = []
        self._ended = threading.Event()

    def __enter__(self) -> "StopRequests":
        self._siblings = _ranks_of(self._launcher)
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._reader.settimeout(LOOK_AT_STOP_FILE_SECONDS)
        for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):
            number = getattr(signal, name)
            before = signal.getsignal(number)
            if name == "SIGHUP" and before == signal.SIG_IGN:  # nohup
                continue
            self._handlers[number] = before
            signal.signal(number, _heard)
        self._fd_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="stop-requests", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._ended.set()
        signal.set_wakeup_fd(self._fd_before)
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._writer.send(b"\0")  # wakes the thread
        self._thread.join()
        self._reader.close()
        self._writer.close()

    def vector(self) -> list[float]:
        """Return 1 for each of REASONS that has come to this rank, else 0."""
        return [float(reason in self._reasons) for reason in REASONS]

    def carry_out(self) -> None:
        """From now on, more requests change nothing: all ranks have agreed to stop. Removes the STOP file."""
        self._being_carried_out = True
        if self._stop_file is not None:
            self._stop_file.unlink(missing_ok=True)

    def _listen(self) -> None:
        while not self._ended.is_set():
            try:
                for number in self._reader.recv(64):
                    self._received(number)
            except TimeoutError:
                pass
            except OSError:
                return
            if self._stop_file is not None and self._stop_file.exists():
                self._reasons.add("STOP file")
            if any(not _lives(process) for process in self._launcher):
                self._reasons.add("launcher is gone")

    def _received(self, number: int) -> None:
        if number not in self._handlers:
            return
        name = signal.Signals(number).name
        if self._being_carried_out:
            return
        if any(not _lives(process) for process in self._siblings):
            # The launcher ends the ranks because one of them died: nobody is left to agree with.
            print(
                f"rank {os.environ.get('RANK', '0')}: ended by the launcher after another rank died",
                file=sys.stderr,
                flush=True,
            )
            os._exit(EXIT_RUN_FAILED)
        if name == "SIGINT" and name in self._reasons:
            print("interrupted twice: ended at once, without a checkpoint", file=sys.stderr, flush=True)
            os._exit(EXIT_INTERRUPTED)
        self._reasons.add(name)


def _heard(number: int, frame: FrameType | None) -> None:
    """Do nothing: the thread has it from the wake-up descriptor."""


def ignore_in_child() -> None:
    """Let a process that this rank forked leave stopping to the rank, and end with it, however that ends."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # SIGTERM comes from a launcher, to everything below it, or from the rank, which then waits for this process to end.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_for_parent, name="end-for-parent", daemon=True).start()


def _end_for_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _launcher_of(process: psutil.Process) -> list[psutil.Process]:
    """Return the launcher's processes above this one: DeepSpeed's or torchrun's on this host, and DeepSpeed's runner
    above that.

    SIGTERM to the runner, or kill -9 to either, ends it alone and would leave the ranks training for nobody. Over
    several hosts the runner is elsewhere, and in its place is the ssh session in which pdsh has started the launcher
    here: it ends with the connection, and says nothing to what it started. A shell or a scheduler above them may end
    without meaning us.
    """
    found: list[psutil.Process] = []
    parent = _parent(process)
    if parent is None or not _says(parent, "deepspeed.launcher.launch", "torchrun", "torch.distributed"):
        return found
    found.append(parent)
    if _says(parent, "deepspeed.launcher.launch"):
        runner = _parent(parent)
        above = runner if runner is not None and _is_runner(runner) else _ssh_session_of(parent)
        found += [above] if above is not None else []
    return found


def _is_runner(process: psutil.Process) -> bool:
    """Return whether a process is the deepspeed command; a shell whose command only speaks of it is not."""
    try:
        return runner_at(process.cmdline()) is not None
    except psutil.Error:
        return False


def _ssh_session_of(launcher: psutil.Process) -> psutil.Process | None:
    """Return the sshd of the session that a launcher was started in, with no more than a shell between."""
    above = _parent(launcher)
    for process in (above, above and _parent(above)):
        try:
            if process is not None and process.name().startswith("sshd"):  # sshd-session since OpenSSH 9.8
                return process
        except psutil.Error:
            return None
    return None


def _parent(process: psutil.Process) -> psutil.Process | None:
    try:
        return process.parent()
    except psutil.Error:
        return None


def _says(process: psutil.Process, *words: str) -> bool:
    try:
        line = " ".join(process.cmdline()[:4])
    except psutil.Error:
        return False
    return any(word in line for word in words)


def _ranks_of(launcher: list[psutil.Process]) -> list[psutil.Process]:
    """Return the other processes that this host's launcher has started."""
    if not launcher:
        return []
    try:
        return [child for child in launcher[0].children() if child.pid != os.getpid()]
    except psutil.Error:
        return []


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
