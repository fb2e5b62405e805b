"""The bytes of input files: plain or compressed, many by a pattern, or from standard input."""

import bz2
import codecs
import glob
import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from backports import zstd

from dialogpt_ds.errors import UserError

STDIN = "-"
HEAD_BYTES = 1 << 20
"""What is looked at to tell the format of a file, of standard input too."""
_OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": zstd.open}
_READ_ERRORS = (EOFError, OSError, lzma.LZMAError, zlib.error, zstd.ZstdError)


def find_files(patterns: list[str]) -> list[str]:
    """Return the files that paths and patterns (`*`, `?`, `[...]`, `**`) name, those of a pattern in the order of their
    names.

    Raises:
        UserError: a file is missing, a folder is named, or a pattern names nothing.
    """
    found: list[str] = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if pattern == STDIN or path.is_file():
            found.append(pattern if pattern == STDIN else str(path))
        elif path.is_dir():
            raise UserError(f"--input {pattern!r} is a folder; name its files, as in {str(path / '*.tsv')!r}")
        elif not glob.has_magic(pattern):
            raise UserError(f"--input {pattern!r} is missing")
        else:
            files = sorted(name for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
            if not files:
                raise UserError(f"--input {pattern!r}: no file is called so")
            found += files
    twice = sorted({name for name in found if found.count(name) > 1})
    if twice:
        raise UserError(f"--input names {twice[0]!r} twice; each conversation would count twice")
    return found


def is_compressed(path: str) -> bool:
    """Return whether a file is compressed, by its name."""
    return Path(path).suffix in _OPENERS


def open_bytes(path: str) -> IO[bytes]:
    """Open a file, or standard input, for reading bytes, decompressed."""
    if path == STDIN:
        return _standard_input()
    return _OPENERS.get(Path(path).suffix, open)(path, "rb")  # type: ignore[operator]


def head_of(path: str) -> bytes:
    """Return the first bytes of a file, at most HEAD_BYTES, cut behind a line end where there is one.

    Raises:
        UserError: it can't be read.
    """
    try:
        if path == STDIN:
            head = _standard_input().head
        else:
            with open_bytes(path) as file:
                head = file.read(HEAD_BYTES)
    except _READ_ERRORS as error:
        raise _broken_off(path, error) from error
    head = head.removeprefix(codecs.BOM_UTF8)
    return head if len(head) < HEAD_BYTES - 3 else head[: head.rfind(b"\n") + 1] or head


@dataclass(frozen=True)
class Head:
    """The first lines of a file, from which its format is told."""

    path: str
    lines: list[bytes]
    """As they are, without their line ends."""

    @classmethod
    def of(cls, path: str) -> "Head":
        """Read it; raises UserError."""
        start = head_of(path)
        lines = start.split(b"\n")
        return cls(path, lines[:-1] if start.endswith(b"\n") else lines)

    @cached_property
    def texts(self) -> list[str]:
        """The lines that are not blank, with a sign in the place of what is no UTF-8."""
        return [line.decode("utf-8", errors="replace").removesuffix("\r") for line in self.lines if line.strip()]

    @property
    def first(self) -> str:
        """The first of these, or nothing."""
        return self.texts[0] if self.texts else ""

    @property
    def suffix(self) -> str:
        """The suffix of the file's name in front of that of the compression: `.jsonl` of `a.jsonl.gz`."""
        return Path(self.path).with_suffix("").suffix if is_compressed(self.path) else Path(self.path).suffix


def lines_of(file: Iterable[bytes], path: str, is_start: bool = True) -> Iterator[bytes]:
    """Yield lines with their line end; only b"\\n" ends a line, so Unicode's other separators stay in the text.

    A byte order mark at the start of a file is no text.

    Raises:
        UserError: the file breaks off.
    """
    try:
        for line in file:
            yield line.removeprefix(codecs.BOM_UTF8) if is_start else line
            is_start = False
    except _READ_ERRORS as error:
        raise _broken_off(path, error) from error


def _broken_off(path: str, error: Exception) -> UserError:
    return UserError(f"{path} can't be read to its end ({error}): is the download or the copy complete?")


class _Headed(io.RawIOBase):
    """A stream of which the head was read already."""

    def __init__(self, source: IO[bytes]) -> None:
        self.source = source
        self.head = source.read(HEAD_BYTES)
        self.given = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        if self.given < len(self.head):
            piece = self.head[self.given : self.given + len(buffer)]
            self.given += len(piece)
        else:
            piece = self.source.read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)


class _Stdin(io.BufferedReader):
    def __init__(self) -> None:
        self.headed = _Headed(sys.stdin.buffer)
        super().__init__(self.headed, 1 << 16)

    @property
    def head(self) -> bytes:
        return self.headed.head


_stdin: _Stdin | None = None


def _standard_input() -> _Stdin:
    global _stdin
    if _stdin is None:
        _stdin = _Stdin()
    return _stdin
