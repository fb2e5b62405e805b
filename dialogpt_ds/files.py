"""Files that are either whole or absent: written beside their place, flushed to the disk, then renamed."""

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def replace_file(path: Path, durable: bool = True) -> Iterator[IO[bytes]]:
    """Open a binary file that takes the place of `path` in one step when the block ends without an error.

    Not `durable`: whole after any end of the program, but not after a power cut; for what has a checksum and can be
    made again.
    """
    # Two writers of one file that can be made again, such as a task that was given out twice, don't meet.
    unfinished = path.with_name(
        f".{path.name}.unfinished" if durable else f".{path.name}.{uuid.uuid4().hex[:8]}.unfinished"
    )
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def replace_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 in one step."""
    with replace_file(path) as file:
        file.write(text.encode("utf-8"))


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename_problem(folder: Path) -> str:
    """Return why what is written in a folder can't be made durable and get its name by a rename, by trying it; "" where
    it can.

    A mounted bucket often writes files but renames none, or no folders, and some disks take no flush of a folder.
    """
    name = uuid.uuid4().hex
    unfinished, finished = folder / f".trial-{name}", folder / f".trial-{name}-renamed"
    doing = "no folder can be made in it"
    try:
        unfinished.mkdir()
        doing = "no file can be written and flushed in it"
        with open(unfinished / "file", "wb") as file:
            file.write(b"x" * 4_096)
            file.flush()
            os.fsync(file.fileno())
        doing = "its folders can't be flushed to the disk"
        sync_folder(unfinished)
        doing = "its folders can't be renamed"
        unfinished.rename(finished)
        sync_folder(folder)
        doing = "its folders can't be renamed and deleted again"
        (finished / "file").unlink()
        finished.rmdir()
    except OSError as error:
        return f"{doing} ({error.strerror or error})"
    finally:
        for left in (unfinished, finished):
            shutil.rmtree(left, ignore_errors=True)
    return ""


def remove_folder(folder: Path, removed: Callable[[], None]) -> None:
    """Remove a folder of very many files, which takes minutes on a shared disk, and call `removed` after each file.

    Raises:
        OSError: something can't be removed.
    """
    for path, _, names in os.walk(folder):
        for name in names:
            os.unlink(os.path.join(path, name))
            removed()
    shutil.rmtree(folder)


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: IO[bytes]) -> str:
    """Python 3.10 has no hashlib.file_digest."""
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def canonical_json(value: Any) -> str:
    """Return the one JSON text of `value` that checksums are taken of: sorted keys, no spaces, UTF-8 kept."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def sha256_of_json(value: Any) -> str:
    """Return the SHA-256 of the canonical JSON text of `value`."""
    return hashlib.sha256(canonical_json(value).encode("utf-8")).hexdigest()


def appears(file: Path, seconds: float) -> bool:
    """Wait until another host's new file is seen here, on a disk that both share; returns False where it is not in
    time."""
    deadline = time.monotonic() + seconds
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        try:
            os.listdir(file.parent)  # makes an NFS client look again
        except OSError:
            return False
        time.sleep(0.2)
    return True
