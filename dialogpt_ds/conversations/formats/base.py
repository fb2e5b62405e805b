"""What every format is: an object that knows its files by their head and reads their records.

A new format is a subclass of Format in a file of its own, and its entry in FORMATS. `name`, `summary`, `title`,
`recognises` and `read` are needed, the rest has defaults. `chat_log.py` is a format whose conversations are several
lines, `jsonl.py` one in which each line is a conversation.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

from dialogpt_ds.conversations.conversation import Conversation, Record
from dialogpt_ds.conversations.files import Head
from dialogpt_ds.conversations.targets import Targets

TurnWeights = Literal["auto", "yes", "no"]


class ReadingOptions(NamedTuple):
    """What a person says about all inputs; a format takes what concerns it."""

    turn_weights: TurnWeights = "auto"
    """Whether the turns of a DialoGPT TSV begin with a weight."""
    persona: str = ""
    """Whose turns are learned."""
    history: int = 7
    """Lines of context before each line of a script's persona."""


@dataclass(frozen=True)
class Format(ABC):
    """A format, opened for one input: its fields hold what was decided about that input, and go into report.json."""

    name: ClassVar[str]
    """Its choice of --format."""
    summary: ClassVar[str]
    """What it is, in the help of --format."""
    title: ClassVar[str]
    """What a person is told that a file is; `describe` may say more."""
    missing: ClassVar[str] = ""
    """What is said behind "It" of a file that has no known format, as "has no NAME: text"; empty: nothing."""
    default_targets: ClassVar[Targets] = "last"
    """Which turns are learned where the input says nothing."""
    by_lines: ClassVar[bool] = False
    """Whether each line is a record, whatever stands before it, so that processes can share a file; else one process
    reads the records in order, and others encode them."""
    from_stdin: ClassVar[bool] = True
    """Whether standard input can have it."""
    has_speakers: ClassVar[bool] = False
    """Whether its turns say who speaks, so that a persona can be chosen."""
    speakers: ClassVar[str] = ""
    """Which of its files do so, in the help of --persona."""
    own_input: ClassVar[Callable[[], Path] | None] = None
    """Returns the file that is read without --input."""

    @classmethod
    @abstractmethod
    def recognises(cls, head: Head) -> bool:
        """Return whether a file has this format, given that no format before it in FORMATS recognises it.

        It is asked about any file, an empty one and standard input too; `head.texts` are the lines that are not blank.

        Raises:
            UserError: it nearly does, and can be made so.
        """

    @classmethod
    def open(cls, head: Head, options: ReadingOptions) -> "Format":
        """Decide from the head of a file how it is to be read.

        Raises:
            UserError: it can't be decided, or the options don't suffice.
        """
        return cls()

    def describe(self) -> str:
        """Say what was decided, for the person who started the run."""
        return self.title

    def records(self, lines: Iterator[bytes], path: str) -> Iterator[Record]:
        r"""Yield the records of lines, in their order; as it stands here, a record for each line.

        Nothing that somebody says is dropped: what belongs to no conversation is a record that `read` rejects, and what
        follows it begins a new one, since it was not said to what came before.

        Args:
            lines: with their ends, "\n" or "\r\n".
            path: for errors.

        Raises:
            UserError: what is wrong with the file as a whole.
        """
        for number, line in enumerate(lines, start=1):
            yield Record(number, line.removesuffix(b"\n"))

    @abstractmethod
    def read(self, record: Record) -> Conversation:
        """Read one record; raises RejectedRecordError."""
