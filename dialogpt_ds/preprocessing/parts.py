"""Parts: a run of records from one input file, and what they became, as one file that is whole or absent.

A PartTask says what a part is to be made of, an EncodedPart is its file, and a Part what is in that: a ConversationRow
for each conversation, and the examples of all.

Where parts begin depends on the input alone, so any number of processes on any number of machines makes the same ones,
and a run that was killed goes on from those that are finished.
"""

import hashlib
import json
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dialogpt_ds.conversations.conversation import Record
from dialogpt_ds.conversations.files import lines_of
from dialogpt_ds.conversations.inputs import Input
from dialogpt_ds.errors import UserError
from dialogpt_ds.files import replace_file
from dialogpt_ds.shards.blocks import Block

PART_BYTES = 2 << 20
"""Text of a part, about: a tenth of a second to some tenths of work."""
PARTS_FOLDER = "parts"
"""Folder for them, in the output folder; gone when the shards are finished."""


@dataclass(frozen=True)
class PartTask:
    """What one part is to be made of: records of one input, or a range of its bytes."""

    number: int
    """Among all parts of all inputs."""
    source: Input
    start: int = 0
    """The part has the lines that begin in the bytes from here ..."""
    stop: int = 0
    """... up to here."""
    records: Sequence[Record] | None = None
    """Its records, of inputs that can only be read from their start."""
    content_sum: str = ""
    """A checksum of those records; a range of bytes is known by its file's size and time."""

    def read(self) -> Iterator[Record]:
        """Yield the part's records; those of a range of bytes are numbered from 1."""
        if self.records is not None:
            yield from self.records
            return
        with open(self.source.path, "rb") as file:
            if self.start:
                file.seek(self.start - 1)
                file.readline()  # the line that began before
            lines = lines_of(_until(file, self.stop), self.source.path, self.start == 0)
            yield from self.source.format.records(lines, self.source.path)


def _sum_of(records: Sequence[Record]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for record in records:
        fields = [record.content] if isinstance(record.content, bytes) else record.content
        for text in fields:
            raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
            digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()


def _until(file: Any, stop: int) -> Iterator[bytes]:
    """Yield the lines that begin before byte `stop`."""
    position = file.tell()
    while position < stop:
        line = file.readline()
        if not line:
            return
        position += len(line)
        yield line


def all_tasks(inputs: Sequence[Input]) -> Iterator[PartTask]:
    """Yield the parts of all inputs in order; raises UserError where one can't be read to its end."""
    number = 0
    for source in inputs:
        for task in _tasks_of(source, number):
            yield task
            number += 1


def _tasks_of(source: Input, number: int) -> Iterator[PartTask]:
    if source.by_lines:
        size = Path(source.path).stat().st_size
        for count, start in enumerate(range(0, size, PART_BYTES)):
            yield PartTask(number + count, source, start, min(start + PART_BYTES, size))
        return
    waiting: list[Record] = []
    size = 0
    for record in source.records():
        waiting.append(record)
        size += len(record.content) if isinstance(record.content, bytes) else sum(map(len, record.content))
        if size >= PART_BYTES:
            yield PartTask(number, source, records=waiting, content_sum=_sum_of(waiting))
            waiting, size, number = [], 0, number + 1
    if waiting:
        yield PartTask(number, source, records=waiting, content_sum=_sum_of(waiting))


class Reject(NamedTuple):
    """What rejects.jsonl says of a record, but for its file."""

    line: int
    reason: str
    text: str


@dataclass(slots=True)
class ConversationRow:
    """What a part says of one conversation; of one that a rule leaves out, no more than the first fields."""

    digest: tuple[int, int]
    """A 128-bit hash of its texts."""
    split: int
    """Which split has it, by its place among the splits."""
    rule: int
    """Which rule leaves it out, by its place in RULES; 0 is none."""
    turns: int
    empty_turns: int = 0
    text_bytes: int = 0
    """UTF-8 bytes of the texts of all turns."""
    text_tokens: int = 0
    """Their tokens, each turn once, without EOS."""
    targets_in: int = 0
    """Tokens, with their EOS, of the turns that are learned: those written and those cut."""
    targets_written: int = 0
    targets_cut: int = 0
    turns_cut: int = 0
    """Turns whose ends are the targets cut."""
    examples: int = 0


COLUMN_TYPES: dict[str, type] = {
    "split": np.uint8,
    "rule": np.uint8,
    "turns": np.int32,
    "empty_turns": np.int32,
    "text_bytes": np.int64,
    "text_tokens": np.int64,
    "targets_in": np.int64,
    "targets_written": np.int64,
    "targets_cut": np.int64,
    "turns_cut": np.int32,
    "examples": np.int32,
    "digest": np.uint64,
}
"""The fields of all rows of a part, as arrays of these types."""


@dataclass(eq=False)
class Part:
    """What the records of a part became: the content of its file."""

    columns: dict[str, np.ndarray]
    """[conversations] by name; `digest` is [conversations, 2]."""
    block: Block
    """The examples of all conversations, in order; what is filtered has none."""
    rejects: list[Reject] = field(default_factory=list)
    num_lines: int = 0
    """Records that a range of bytes has, to number those of the next."""
    content_sum: str = ""

    def save(self, path: Path) -> None:
        """Write the part in one step."""
        facts = {"rejects": self.rejects, "num_lines": self.num_lines, "content_sum": self.content_sum}
        text = np.frombuffer(json.dumps(facts, ensure_ascii=False).encode("utf-8", "backslashreplace"), np.uint8)
        arrays: dict[str, Any] = self.columns | {f"block_{name}": array for name, array in vars(self.block).items()}
        with replace_file(path, durable=False) as file:
            np.savez(file, facts=text, **arrays)

    @classmethod
    def load(cls, path: Path) -> "Part":
        """Read a part back.

        Raises:
            UserError: the file is damaged.
        """
        with _arrays_of(path) as arrays:
            facts = json.loads(arrays["facts"].tobytes())
            block = Block(**{name: arrays[f"block_{name}"] for name in Block.__dataclass_fields__})
            columns = {name: arrays[name] for name in COLUMN_TYPES}
        return cls(
            columns, block, [Reject(*reject) for reject in facts["rejects"]], facts["num_lines"], facts["content_sum"]
        )


class EncodedPart(NamedTuple):
    """A part that is made: its file, and where it comes from."""

    path: Path
    source: Input
    content_sum: str
    """That of its task."""

    def load(self) -> Part:
        """Read the part.

        Raises:
            UserError: its file is damaged, or is not of what the input holds now.
        """
        part = Part.load(self.path)
        if part.content_sum != self.content_sum:
            raise UserError(
                f"{self.path} was made of other text than {self.source.path} gives now: the input has changed since. "
                f"Delete {self.path.parent} and start anew."
            )
        return part

    def read_digests(self) -> np.ndarray:
        """Return the hashes of the conversations that no rule leaves out; the others get one of their own, so that none
        equals them.

        Raises:
            UserError: the file is damaged.
        """
        with _arrays_of(self.path) as arrays:
            digests, filtered = arrays["digest"], np.flatnonzero(arrays["rule"])
        number = int(self.path.stem.rpartition("-")[2])
        digests[filtered, 0], digests[filtered, 1] = np.uint64(number), filtered.astype(np.uint64)
        return digests


@contextmanager
def _arrays_of(path: Path) -> Iterator[Any]:
    """Open a part's arrays; whatever is wrong with them while they are read is a UserError."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            yield arrays
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({error!r}); delete it and run the command again") from error


def part_path(folder: Path, number: int) -> Path:
    """Return the file of a part."""
    return folder / PARTS_FOLDER / f"part-{number:06d}.npz"
