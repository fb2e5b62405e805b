"""A command that trains, run so that a signal becomes a stop which its ranks agree on: launch/stoppable.py.

SIGTERM (docker stop, an eviction from Kubernetes) to the deepspeed command ends that command alone, at once; the ranks
would save and end by themselves, but in a container the end of the first process kills all others. So this process is
the first one. It
starts as few things as it can: no torch, nothing that could fail before the command runs.
"""

import argparse
import contextlib
import ctypes
import os
import signal
import sys
import time
from pathlib import Path

import psutil

from dialogpt_ds.commandline import run_command
from dialogpt_ds.errors import EXIT_DONE, EXIT_PREEMPTED, EXIT_RUN_FAILED, UserError

PASSED_ON = {
    signal.SIGTERM: signal.SIGUSR1,
    signal.SIGHUP: signal.SIGUSR1,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGINT: signal.SIGINT,
}
"""What one rank gets for what comes here. SIGINT is a person's, who means it for good: the run ends with 0, not with
75."""
STOP_SECONDS = 25.0
"""Kubernetes kills the container after 30 s (terminationGracePeriodSeconds); what is left must be killed, and the code
told, before."""
SECONDS_FOR_THE_REST = 10.0
"""How long a command may go on after its ranks have stopped, before it is ended. A launcher takes a second or two."""
SECONDS_FOR_THE_KILLED = 3.0
"""How long killed processes are waited for: one that waits for a device's driver does not end."""
LOOK_AT_PROCESSES_SECONDS = 0.5
PR_SET_CHILD_SUBREAPER = 36
"""Option of Linux's prctl(2): orphans below this process become its children, as they do under the first process."""


class Stoppable:
    """A command in a process group of its own, and what becomes of it, and of everything that it starts."""

    def __init__(self, command: list[str], grace_seconds: float = STOP_SECONDS) -> None:
        self._command = command
        self._grace_seconds = grace_seconds
        self._ignored = {number for number in PASSED_ON if signal.getsignal(number) == signal.SIG_IGN}  # nohup
        self._returned: int | None = None
        self._asked: signal.Signals | None = None
        self._rank: psutil.Process | None = None
        self._rank_hides_code = False
        self._group_was_ended = False
        self._went_on = False
        self._strays_were_ended = False
        self._deadline: float | None = None
        self._killed_at: float | None = None
        self._ranks_gone_at: float | None = None

    def run(self) -> int:
        """Run the command to its end, and wait until nothing that it started is left; returns the exit code.

        Raises:
            UserError: the command can't be started.
        """
        become_subreaper()
        # Blocked and waited for: no handler that could interrupt anything, and none is lost before the command runs.
        awaited = {*PASSED_ON, signal.SIGCHLD} - self._ignored
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {*awaited, signal.SIGTTOU})
        try:
            self._group = self._start(before)
            hand_terminal(os.getpgrp(), self._group)
            while not self._is_over():
                received = signal.sigtimedwait(awaited, LOOK_AT_PROCESSES_SECONDS)
                if received is not None and received.si_signo != signal.SIGCHLD:
                    self._received(signal.Signals(received.si_signo))
            hand_terminal(self._group, os.getpgrp())
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return self._exit_code()

    def _start(self, mask: set[int | signal.Signals]) -> int:
        try:
            return os.posix_spawnp(
                self._command[0],
                self._command,
                os.environ,
                setpgroup=0,
                setsigmask=mask,
                setsigdef={signal.SIGPIPE, signal.SIGXFSZ},  # which Python ignores for itself
            )
        except OSError as error:
            reason = error.strerror or error
            raise UserError(
                f"command {self._command[0]}: cannot be started ({reason}); name a program on PATH, or its path"
            ) from error

    def _is_over(self) -> bool:
        """Look at what has ended and what is late; returns whether the command and all that it started is gone."""
        self._reap()
        if self._returned is None and self._asked is None:
            return False
        left = psutil.Process().children(recursive=True)
        if self._returned is not None:
            if not left:
                return True
            self._end_strays(left)
        if self._rank is not None:
            self._end_what_goes_on(left)
        if self._killed_at is not None:
            return time.monotonic() > self._killed_at + SECONDS_FOR_THE_KILLED
        if self._deadline is not None and time.monotonic() > self._deadline:
            self._kill(left)
        return False

    def _reap(self) -> None:
        """Take in whatever has ended: the command, and the orphans that came to this process."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                if pid == self._group:
                    self._returned = os.waitstatus_to_exitcode(status)

    def _received(self, number: signal.Signals) -> None:
        """Ask one rank at the first signal, end the command's group at the second; more change nothing."""
        if self._asked is not None:
            self._end_group(f"{number.name} once more")
            return
        self._asked = number
        self._deadline = time.monotonic() + self._grace_seconds
        rank = ready_rank(psutil.Process())
        if rank is None:
            self._end_group(f"{number.name} while nothing trains")
            return
        self._rank = rank
        self._rank_hides_code = "TORCHELASTIC_RUN_ID" in environment_of(rank)
        say(
            f"{number.name}: a training process ({rank.pid}) is asked to stop; what is left in "
            f"{self._grace_seconds:g} s is killed"
        )
        with contextlib.suppress(psutil.Error):
            rank.send_signal(PASSED_ON[number])

    def _end_group(self, why: str) -> None:
        if self._group_was_ended:
            return
        self._group_was_ended = True
        say(f"{why}: SIGTERM to the command and its process group")
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._group, signal.SIGTERM)

    def _end_strays(self, left: list[psutil.Process]) -> None:
        """End what the command has left behind; ranks notice by themselves that their launcher is gone, and save."""
        if self._strays_were_ended:
            return
        self._strays_were_ended = True
        if self._deadline is None:
            self._deadline = time.monotonic() + self._grace_seconds
        for process in left:
            if not belongs_to_rank(process):
                with contextlib.suppress(psutil.Error):
                    process.terminate()

    def _end_what_goes_on(self, left: list[psutil.Process]) -> None:
        """End a command that goes on after its ranks have stopped: an ssh server, the next line of a script."""
        if any(process == self._rank or belongs_to_rank(process) for process in left):
            return
        now = time.monotonic()
        self._ranks_gone_at = self._ranks_gone_at or now
        if self._returned is None and not self._group_was_ended and now - self._ranks_gone_at > SECONDS_FOR_THE_REST:
            self._went_on = True
            self._end_group("the ranks have stopped and the command goes on")

    def _kill(self, left: list[psutil.Process]) -> None:
        self._killed_at = time.monotonic()
        say(f"{self._grace_seconds:g} s are over: SIGKILL to {len(left)} processes")
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()

    def _exit_code(self) -> int:
        if self._returned is None:
            return 128 + signal.SIGKILL
        if self._rank is not None and self._asked is not None:
            stopped = EXIT_DONE if PASSED_ON[self._asked] == signal.SIGINT else EXIT_PREEMPTED
            # torchrun ends with 1 whatever its ranks ended with, so that their 75 can't be seen from here. Of the two
            # mistakes that are possible, starting a failed run again costs the steps since the last checkpoint, and it
            # says then why it fails; calling a preempted run failed costs the run.
            if self._went_on or (
                self._rank_hides_code and self._returned == EXIT_RUN_FAILED and not self._group_was_ended
            ):
                return stopped
        return self._returned if self._returned >= 0 else 128 - self._returned


def ready_rank(root: psutil.Process) -> psutil.Process | None:
    """Return one training process below `root` that listens for SIGUSR1, or None; all ranks hear of it from that one.

    The other Python processes of a run (launchers, loaders, compilers) don't catch it. A program in Go, as wandb's,
    catches every signal, and would do nothing with it. RANK is no sign: a plain `python launch/train.py` has none, and
    in some clusters everything in a container has one.
    """
    # Parents come before their children, which for a moment after a fork still have the handler.
    for process in root.children(recursive=True):
        with contextlib.suppress(psutil.Error, OSError):
            if Path(process.exe()).name.startswith("python") and catches(process.pid, signal.SIGUSR1):
                return process
    return None


def catches(pid: int, number: signal.Signals) -> bool:
    """Return whether a process has a handler of a signal, by the mask in /proc/PID/status: bit 0 is signal 1."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def belongs_to_rank(process: psutil.Process) -> bool:
    """Return whether a process is a rank that some launcher started, or one below it; RANK alone may be the container's
    own."""
    return "LOCAL_RANK" in environment_of(process)


def environment_of(process: psutil.Process) -> dict[str, str]:
    """Return the environment that a process was started with; nothing of one that is gone or another user's."""
    try:
        return process.environ()
    except psutil.Error:
        return {}


def become_subreaper() -> None:
    """Have orphans below this process become its children, so that none is forgotten."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def hand_terminal(owner: int, group: int) -> None:
    """Hand the terminal, where there is one, from one process group to another: Ctrl-C and typing are the command's."""
    with contextlib.suppress(OSError):
        if os.tcgetpgrp(0) == owner:
            os.tcsetpgrp(0, group)
            # It may have asked for input in the background, and been stopped for it.
            os.killpg(group, signal.SIGCONT)


def say(text: str) -> None:
    """Print a line about the run, beside its own."""
    print(f"stoppable: {text}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the command line's command and return its exit code."""
    parser = argparse.ArgumentParser(
        description="Run a training command (deepspeed, torchrun, python) so that SIGTERM to this process ends the "
        "run with a "
        "checkpoint and exit code 75, Ctrl-C with a checkpoint and 0; a second signal ends it at once. Made to be the "
        "first "
        "process of a container.",
        usage="%(prog)s [--grace_seconds N] COMMAND ...",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--grace_seconds",
        type=float,
        default=STOP_SECONDS,
        help="seconds from the signal until everything is killed; a step and a save must fit. A few less than the "
        "container is "
        "given (docker stop: 10 without --stop-timeout; Kubernetes: terminationGracePeriodSeconds, 30); default "
        "%(default)g",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the command and its arguments")
    arguments = parser.parse_args(argv)
    if not arguments.command:
        parser.error("no command; for example: launch/stoppable.py deepspeed --num_gpus 8 launch/train.py ...")
    return run_command(lambda: Stoppable(arguments.command, arguments.grace_seconds).run())
