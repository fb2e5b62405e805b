"""Remote shards on this node's disk: one download a node, checked, bounded in size, shared by all ranks and runs."""

import os
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from filelock import FileLock

from dialogpt_ds.errors import RunError
from dialogpt_ds.files import replace_file, replace_text, sha256_of_file
from dialogpt_ds.shards.manifest import INDEX, MANIFEST, TOKENIZER, Manifest, ShardEntry
from dialogpt_ds.shards.remote import FetchError, fetch, read_small

LOST = ".lost"
"""Suffix of a note that a shard is not to be had, so that not every block of it is asked for again."""
LOST_SECONDS = 600.0
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
"""What transformers writes of a fast tokenizer; a remote folder can't be listed."""


@dataclass(frozen=True)
class CacheSettings:
    """Where remote shards are kept, and how much of them."""

    folder: Path
    max_bytes: int


class CacheUnreachableError(FetchError):
    """The remote place as a whole can't be reached: no reason to call a shard damaged."""


class LostShardError(FetchError):
    """The remote place can be reached, but a shard is not there or is not what the manifest says."""


class ShardCache:
    """The shards of one remote directory on this node. Locks on files keep the processes of a node out of each other's
    way."""

    def __init__(self, url: str, manifest: Manifest, settings: CacheSettings) -> None:
        self.url = url
        self.manifest = manifest
        self.settings = settings
        self.folder = settings.folder / manifest.fingerprint[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._ahead: _Ahead | None = None

    def open_directory(self) -> None:
        """Bring the index and the tokenizer's files here, and ask again for shards that were not to be had.

        Raises:
            FetchError: there is no index, or it is not the manifest's.
        """
        with self._lock("directory"):
            replace_text(self.folder / MANIFEST, self.manifest.to_text())
            if not (self.folder / INDEX).is_file():
                expected = self.manifest.index_sha256
                fetch(self.url, INDEX, self.folder / INDEX, lambda file: _other_sum(sha256_of_file(file), expected))
            for name in TOKENIZER_FILES:
                file = self.folder / TOKENIZER / name
                if not file.is_file():
                    try:
                        content = read_small(self.url, f"{TOKENIZER}/{name}")
                    except FetchError:
                        break  # found by its name then, and checked against the manifest like any other
                    file.parent.mkdir(exist_ok=True)
                    with replace_file(file) as copy:
                        copy.write(content)
            self._forget_lost()

    def _forget_lost(self) -> None:
        """At the start of a run somebody may have mended what was lost."""
        for note in self.folder.glob(f"*{LOST}"):
            note.unlink(missing_ok=True)

    def open(self, shard: int) -> IO[bytes]:
        """Open the local copy of a shard, brought here if need be.

        Raises:
            LostShardError: it is gone or altered.
            CacheUnreachableError: so is everything else of the directory.
        """
        entry = self.manifest.shardlist[shard]
        path = self.folder / entry.url
        while True:
            with suppress(FileNotFoundError):  # another process may need its room between bringing and opening
                file = open(path, "rb")  # noqa: SIM115 (the caller closes it)
                os.utime(path)  # when it was used last
                return file
            with self._lock(entry.url):
                if not path.is_file():
                    self._bring(entry, path)

    def fetch_ahead(self, shards: Iterable[int]) -> None:
        """Bring shards in the background; those asked for before and not begun are forgotten."""
        if self._ahead is None or self._ahead.process != os.getpid():  # a thread does not live on in a forked process
            self._ahead = _Ahead(lambda shard: self.open(shard).close())
        self._ahead.ask(shard for shard in shards if not (self.folder / self.manifest.shardlist[shard].url).is_file())

    def _bring(self, entry: ShardEntry, path: Path) -> None:
        note = path.with_name(path.name + LOST)
        if note.is_file() and time.time() - note.stat().st_mtime < LOST_SECONDS:
            raise LostShardError(note.read_text(encoding="utf-8"))
        self._make_room(entry.filesize)
        try:
            fetch(self.url, entry.url, path, lambda file: what_differs(file, entry))
        except FetchError as error:
            try:
                read_small(self.url, MANIFEST)
            except FetchError:
                raise CacheUnreachableError(f"{error}; nor can {self.url} be reached at all") from error
            replace_text(note, str(error))
            raise LostShardError(str(error)) from error
        note.unlink(missing_ok=True)
        self._make_room(0)  # others may have come at the same time

    def _make_room(self, size: int) -> None:
        """Delete the shards that were used longest ago until `size` more bytes fit. Open ones stay readable to who has
        them open."""
        with self._lock("cache", self.settings.folder):
            files = [(file.stat(), file) for file in self.settings.folder.glob("*/*.tar")]
            total = sum(stat.st_size for stat, _ in files)
            for stat, file in sorted(files, key=lambda item: item[0].st_mtime):
                if total + size <= self.settings.max_bytes:
                    break
                file.unlink(missing_ok=True)
                total -= stat.st_size

    def _lock(self, name: str, folder: Path | None = None) -> FileLock:
        locks = (folder or self.folder) / "locks"
        locks.mkdir(exist_ok=True)
        return FileLock(locks / f"{name}.lock")


def what_differs(file: Path, entry: ShardEntry) -> str | None:
    """Compare a file with what the manifest says of it."""
    size = file.stat().st_size
    if size != entry.filesize:
        return f"it has {size:,} bytes, the manifest says {entry.filesize:,}"
    return _other_sum(sha256_of_file(file), entry.sha256)


def _other_sum(found: str, expected: str) -> str | None:
    return None if found == expected else f"its sha256 is {found}, the manifest says {expected}"


class _Ahead:
    """A thread that brings shards before they are needed."""

    def __init__(self, bring: Callable[[int], None]) -> None:
        self.process = os.getpid()
        self._bring = bring
        self._wanted: list[int] = []
        self._wake = threading.Condition()
        threading.Thread(target=self._run, name="shards ahead", daemon=True).start()

    def ask(self, shards: Iterable[int]) -> None:
        with self._wake:
            self._wanted = list(shards)
            self._wake.notify()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._wanted:
                    self._wake.wait()
                shard = self._wanted.pop(0)
            with suppress(RunError, OSError):  # who needs the shard meets the same error, and reports it
                self._bring(shard)
