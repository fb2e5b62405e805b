"""Files of a remote shard directory: their addresses, and bringing one here through webdataset's gopen."""

import os
import re
import shlex
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from webdataset.gopen import gopen

from dialogpt_ds.errors import RunError

ATTEMPTS = 6
PAUSE_SECONDS = 2.0
"""Before the second attempt, and twice as long before each further one: about a minute in all."""
CHUNK = 1 << 20
CURL = "curl --connect-timeout 30 --retry 5 --retry-delay 2 -f -s -L"

CURL_CODES = {
    6: "curl doesn't find the host",
    7: "curl can't connect",
    18: "the transfer was cut short",
    22: "the server answered with an error, such as 404",
    28: "curl timed out",
    35: "TLS failed",
    60: "the server's certificate is not trusted",
}
"""From curl's manual, EXIT CODES."""
FINAL_CODES = (22,)
"""What no further attempt changes; curl itself has tried again where the server said to."""


class FetchError(RunError):
    """A remote file that can't be brought here."""


def is_remote(path: str) -> bool:
    """Return whether a path names a place that is read through gopen: SCHEME://..., or pipe:COMMAND with {} for a
    file's name."""
    return path.startswith("pipe:") or ("://" in path and not path.startswith("file://"))


def address(directory: str, name: str) -> str:
    """Return the address of the file `name` in a remote directory; what follows a `?`, such as a signature, stays at
    its end."""
    if directory.startswith("pipe:"):
        return directory.replace("{}", shlex.quote(name))
    path, mark, query = directory.partition("?")
    return f"{path.rstrip('/')}/{name}{mark}{query}"


def fetch(directory: str, name: str, target: Path, check: Callable[[Path], str | None]) -> None:
    """Bring a file here: complete and checked, or not at all. What an interrupted attempt has left is gone on with.

    Args:
        directory: the remote directory.
        name: the file's name in it.
        target: where it is put, by a rename. The caller holds a lock on it.
        check: says what is wrong with the file, or None.

    Raises:
        FetchError: it is not there, could not be brought in a minute of attempts, or is another file.
        RunError: it is this machine's fault: no space, no right to write, no curl.
    """
    part = target.with_name(target.name + ".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    url = address(directory, name)
    for attempt in range(ATTEMPTS):
        last = attempt == ATTEMPTS - 1
        try:
            _append(url, part)
        except (OSError, ValueError) as error:
            if getattr(error, "errno", None) is not None:  # gopen's own errors have no number
                raise RunError(f"{url} can't be put into {part.parent}: {error}") from error
            if last or _exit_code(error) in FINAL_CODES:
                raise FetchError(f"{url} can't be fetched: {_reason(error)}") from error
            time.sleep(PAUSE_SECONDS * 2**attempt)
            continue
        wrong = check(part)
        if wrong is None:
            part.replace(target)
            return
        part.unlink()
        if last or attempt:  # the first time, what was gone on with may have been the remains of something else
            raise FetchError(f"{url} is not what it should be: {wrong}")


def _append(url: str, part: Path) -> None:
    """Read `url` to its end into `part`, from where `part` ends if the place can be read from there; raises OSError."""
    have = part.stat().st_size if part.exists() else 0
    rest = _from_byte(url, have) if have else None
    if rest is not None:
        try:
            return _copy(rest, part, "ab")
        except OSError as error:
            if error.errno is not None:
                raise
            # the server reads from the start only, or the file was complete already: bring it anew
    _copy(_whole(url), part, "wb")


def _copy(url: str, part: Path, mode: str) -> None:
    # Closing a pipe of gopen raises OSError where the command failed, so a file cut short is never taken for whole.
    with gopen(url) as source, open(part, mode) as file:
        # A pipe's own read gives nothing of a last piece that came before the command failed; its stream does.
        shutil.copyfileobj(getattr(source, "stream", source), file, CHUNK)
        file.flush()
        os.fsync(file.fileno())


def _whole(url: str) -> str:
    """Return what gopen opens; it has no handler of its own for s3."""
    return f"pipe:aws s3 cp --only-show-errors {shlex.quote(url)} -" if url.startswith("s3://") else url


def _from_byte(url: str, start: int) -> str | None:
    """Return what gopen opens to read from a byte on; None where that can't be asked for."""
    if url.startswith(("http://", "https://")):
        return f"pipe:{CURL} -C {start} {shlex.quote(url)}"
    if url.startswith("gs://"):
        return f"pipe:gsutil cat -r {start}- {shlex.quote(url)}"
    return None


def _reason(error: Exception) -> str:
    """Say why a command of gopen failed, without its arguments: they may hold a token."""
    number = _exit_code(error)
    if number is None:
        return str(error)
    meaning = CURL_CODES.get(number) if "curl" in str(error) else None
    return f"{meaning or 'the command that reads it failed'} (exit code {number})"


def _exit_code(error: Exception) -> int | None:
    code = re.search(r"exit (\d+) \(read\)", str(error))
    return int(code[1]) if code else None


def read_small(directory: str, name: str) -> bytes:
    """Return the content of a small remote file; raises FetchError."""
    url = address(directory, name)
    try:
        with gopen(_whole(url)) as source:
            content: Any = source.read()
        return bytes(content)
    except (OSError, ValueError) as error:
        raise FetchError(f"{url} can't be fetched: {_reason(error)}") from error
