"""Whose words are whose: rank 0 speaks for the run, the lines of the others begin with their rank."""

import io
import socket
import sys
from typing import TextIO

from dialogpt_ds.distributed.world import World, spans_hosts


class RankStream(io.TextIOBase):
    """Passes whole lines on to another stream, each with a prefix."""

    def __init__(self, stream: TextIO, prefix: str) -> None:
        self._stream, self._prefix, self._held = stream, prefix, ""

    def write(self, text: str) -> int:
        """Pass on the lines that are complete now; returns the number of characters taken."""
        *lines, self._held = (self._held + text).split("\n")
        if lines:
            self._stream.write(
                "".join(f"{self._prefix}{line}\n" for line in lines)
            )  # one call, so that ranks don't tear lines apart
            self._stream.flush()
        return len(text)

    def flush(self) -> None:
        """Pass on what was passed on already; half a line waits for its other half."""
        self._stream.flush()

    def close(self) -> None:
        """Pass on half a line as if it were one; the stream below stays open."""
        if self._held:
            self.write("\n")

    def isatty(self) -> bool:
        """Return whether the stream below is a terminal."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """Return the descriptor of the stream below."""
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Encoding of the stream below."""
        return self._stream.encoding


def mark_lines_of(world: World) -> None:
    """Let what this process writes to stdout and stderr begin with its rank (and host, where there are several); not on
    rank 0."""
    if world.is_first:
        return
    prefix = f"[rank {world.rank}{f' {socket.gethostname()}' if spans_hosts(world) else ''}] "
    sys.stdout = RankStream(sys.stdout, prefix)
    sys.stderr = RankStream(sys.stderr, prefix)
