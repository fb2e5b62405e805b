"""A real pseudo-terminal with a command in it, and what a person in front of it would see."""

import fcntl
import os
import select
import signal
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

import pyte

LOOK_SECONDS = 0.05
"""How often the reader looks whether it should end."""


class Terminal:
    """A command that has a terminal of its own until the block ends; its whole process group is killed then.

    The command leads a session whose controlling terminal this is, so `send("\\x03")` interrupts it as Ctrl+C does.
    """

    def __init__(
        self,
        command: Sequence[str],
        rows: int = 40,
        columns: int = 120,
        environment: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
    ) -> None:
        """Start `command`; `environment` is the whole of it, TERM=xterm-256color put in unless it has one."""
        self.output = b""
        """Everything that came, escape sequences included."""
        self._screen = _Screen(columns, rows, self)
        self._stream = pyte.ByteStream(self._screen)
        self._changed = threading.Condition()
        self._ended = False
        self._closing = False
        self._quiet = 0
        self._master, slave = os.openpty()
        self.resize(rows, columns)
        try:
            self.process = subprocess.Popen(
                command,
                stdin=slave,
                stdout=slave,
                stderr=slave,
                cwd=cwd,
                env={"TERM": "xterm-256color"} | dict(os.environ if environment is None else environment),
                start_new_session=True,
                preexec_fn=_take_terminal,
            )
        except BaseException:
            os.close(self._master)
            raise
        finally:
            os.close(slave)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def screen_text(self) -> str:
        """Return what is on the screen now, without the blanks at the ends of lines and below the last."""
        with self._changed:
            return "\n".join(line.rstrip() for line in self._screen.display).rstrip()

    def all_text(self) -> str:
        """Return what has scrolled out at the top and what is on the screen."""
        with self._changed:
            width = range(self._screen.columns)
            scrolled = ["".join(line[column].data for column in width).rstrip() for line in self._screen.history.top]
            return "\n".join([*scrolled, *(line.rstrip() for line in self._screen.display)]).rstrip()

    def send(self, keys: str) -> None:
        """Type `keys`: "q", "\\r", "\\x03" for Ctrl+C, "\\x1b[A" for the upward arrow, ..."""
        self._write(keys.encode())

    def resize(self, rows: int, columns: int) -> None:
        """Give the terminal another size, which the command is told of by SIGWINCH."""
        with self._changed:
            self._screen.resize(rows, columns)
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def wait_for(self, text: str, timeout: float = 30) -> str:
        """Return the screen as soon as `text` is on it, blanks at its end aside; raises AssertionError with the screen
        otherwise."""
        end = time.monotonic() + timeout
        while True:
            with self._changed:
                over, late = self._over(), time.monotonic() >= end
                screen = self.screen_text()
                if text.rstrip(" ") in screen:
                    return screen
                if over or late:
                    break
                self._changed.wait(LOOK_SECONDS)
        state = f"ended with {self.process.returncode}" if over else f"still runs after {timeout} s"
        raise AssertionError(f"no {text!r} on the screen, and the command {state}:\n{screen}")

    def wait(self, timeout: float = 30) -> int:
        """Return the exit code once the command has ended and its output is on the screen; raises TimeoutExpired."""
        code = self.process.wait(timeout)
        with self._changed:
            self._quiet = 0
            self._changed.wait_for(self._over, timeout)
        return code

    def close(self) -> None:
        """Kill what is left of the command's process group, and take the terminal away."""
        if self._closing:
            return
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._closing = True
        self._reader.join()
        os.close(self._master)

    def _over(self) -> bool:
        """Whether the command ended and nothing more will come: its terminal is closed, or the reader twice found
        nothing to read.

        A process of another session that outlives the command, such as wandb-core, may keep the terminal open.
        """
        return self.process.poll() is not None and (self._ended or self._quiet >= 2)

    def _read(self) -> None:
        while not self._closing:
            ready, _, _ = select.select([self._master], [], [], LOOK_SECONDS)
            part = self._part() if ready else None
            with self._changed:
                self._quiet = 0 if ready else self._quiet + 1
                if part:
                    self.output += part
                    self._stream.feed(
                        part.replace(b"\x1b[<", b"\x1b[>")
                    )  # both are for keyboards; pyte passes over this one only
                self._ended = part == b""
                self._changed.notify_all()
                if self._ended:
                    return

    def _part(self) -> bytes:
        try:
            return os.read(self._master, 65_536)
        except OSError:  # what Linux says at the end of a pseudo-terminal
            return b""

    def _write(self, content: bytes) -> None:
        with suppress(OSError):  # the command ended
            os.write(self._master, content)


class _Screen(pyte.HistoryScreen):
    """A screen that answers what a program asks its terminal, such as where the cursor is."""

    def __init__(self, columns: int, rows: int, terminal: Terminal) -> None:
        super().__init__(columns, rows, history=100_000)
        self._terminal = terminal

    def write_process_input(self, data: str) -> None:
        self._terminal._write(data.encode())


def _take_terminal() -> None:
    """Make standard input the controlling terminal of the session that was just begun."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
