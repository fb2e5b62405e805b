"""What every format is: an object that knows its files by their head and reads their records.

A new format is a class like these in a file of its own, and its entry in FORMATS.
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
    """What a file of no known format lacks of it, in the error for that; empty: it is not worth a word."""
    default_targets: ClassVar[Targets] = "last"
    """Which turns are learned where the input says nothing."""
    by_lines: ClassVar[bool] = False
    """Whether each line is a record, whatever stands before it, so that processes can share a file."""
    from_stdin: ClassVar[bool] = True
    """Whether standard input can have it."""
    has_speakers: ClassVar[bool] = False
    """Whether its turns say who speaks, so that a persona can be chosen."""
    own_input: ClassVar[Callable[[], Path] | None] = None
    """Returns the file that is read without --input."""

    @classmethod
    @abstractmethod
    def recognises(cls, head: Head) -> bool:
        """Return whether a file has this format, given that no format before it in FORMATS recognises it.

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
        """Yield the records of lines with their line ends; `path` is for errors. As it stands here: a record for each
        line.

        Raises:
            UserError: what is wrong with the file as a whole.
        """
        for number, line in enumerate(lines, start=1):
            yield Record(number, line.removesuffix(b"\n"))

    @abstractmethod
    def read(self, record: Record) -> Conversation:
        """Read one record; raises RejectedRecordError."""
