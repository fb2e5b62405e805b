"""DialoGPT's training format: `[id <TAB>] turn EOS turn ... <TAB> last turn`, each turn with a weight before it or none
with one."""

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from dialogpt_ds.conversations.conversation import Conversation, Record, RejectedRecordError, Turn
from dialogpt_ds.conversations.files import Head
from dialogpt_ds.conversations.formats.base import Format, ReadingOptions
from dialogpt_ds.errors import UserError

SEPARATOR = " EOS "
PROBED_LINES = 1_000
"""Lines at the head of a file that decide whether its turns carry weights."""
SURE_SHARE = 0.9
"""Share of those turns that must agree; between it and its opposite a person has to decide."""

# A decimal point, or a lone 0 or 1: "25 of your choice" is text. DialoGPT's own data has 0.0 and 1.0.
_WEIGHT = re.compile(r"(\d+\.\d+|[01])(?: (.*))?", re.DOTALL)


def has_weights(lines: Iterable[bytes], path: str) -> bool:
    """Decide from the head of a file whether its turns carry weights: all of them or none, never turn by turn.

    Raises:
        UserError: some turns begin with a weight and some don't, so that either reading would spoil text.
    """
    weighted = plain = 0
    example = ""
    for line in lines:
        for text in _turn_texts(_columns(line)):
            if _WEIGHT.fullmatch(text):
                weighted += 1
            else:
                plain += 1
                example = example or text[:60]
    total = weighted + plain
    if total and 1 - SURE_SHARE < weighted / total < SURE_SHARE:
        raise UserError(
            f"{path}: {weighted} of the first {total} turns begin with a weight such as 1.0, the others don't (first: "
            f"{example!r}). Say which it is: --turn_weights yes rejects the turns without, --turn_weights no takes "
            "numbers for text."
        )
    return total > 0 and weighted / total >= SURE_SHARE


@dataclass(frozen=True)
class DialogptTsv(Format):
    """DialoGPT TSV, its turns with weights or without."""

    weighted: bool = False
    """Each turn has its weight before it."""

    name = "dialogpt"
    summary = "weighted or plain TSV"
    title = "DialoGPT TSV"
    missing = "has no tab as in source<TAB>target"
    by_lines = True

    @classmethod
    def recognises(cls, head: Head) -> bool:
        """Any line has a tab."""
        return any("\t" in line for line in head.texts)

    @classmethod
    def open(cls, head: Head, options: ReadingOptions) -> "DialogptTsv":
        """Decide about the weights; raises as `has_weights` does."""
        if options.turn_weights != "auto":
            return cls(options.turn_weights == "yes")
        return cls(has_weights(itertools.islice(filter(_is_utf8, head.lines), PROBED_LINES), head.path))

    def describe(self) -> str:
        """Say whether there are weights."""
        return f"{self.title}, turns {'with weights' if self.weighted else 'without weights'}"

    def read(self, record: Record) -> Conversation:
        """Read one line.

        Raises:
            RejectedRecordError: bytes that are no UTF-8, fewer than two or more than three columns, a turn without a
                weight.
        """
        assert isinstance(record.content, bytes)
        try:
            columns = _columns(record.content)
        except UnicodeDecodeError as error:
            raise RejectedRecordError("not UTF-8") from error
        if len(columns) < 2:
            raise RejectedRecordError("no tab between source and target" if columns[0] else "empty line")
        if len(columns) > 3:
            raise RejectedRecordError("more than three columns")
        texts = _turn_texts(columns)
        return Conversation(
            [_weighted_turn(text) for text in texts] if self.weighted else [Turn(text) for text in texts]
        )


@dataclass(frozen=True)
class References(DialogptTsv):
    """DialoGPT's evaluation format, `source <TAB> reference <TAB> reference ...` without weights; a file has it where
    it is asked for."""

    name = "references"
    title = "source and references, one conversation per reference"

    def describe(self) -> str:
        """Say what it is."""
        return self.title

    def records(self, lines: Iterator[bytes], path: str) -> Iterator[Record]:
        """Yield a record `source <TAB> reference` per reference; a line without one stays as it is, so that reading it
        rejects it."""
        for number, line in enumerate(lines, start=1):
            source, *references = line.removesuffix(b"\n").removesuffix(b"\r").split(b"\t")
            if not references:
                yield Record(number, line.removesuffix(b"\n"))
            for reference in references:
                yield Record(number, source + b"\t" + reference)


def _weighted_turn(text: str) -> Turn:
    match = _WEIGHT.fullmatch(text)
    if match is None:
        raise RejectedRecordError("turn without a weight")
    return Turn(match[2] or "", float(match[1]))


def _columns(line: bytes) -> list[str]:
    return line.decode("utf-8").removesuffix("\r").split("\t")


def _turn_texts(columns: list[str]) -> list[str]:
    """Return the texts of all turns; a first column of three is the id, which says nothing of the conversation."""
    if len(columns) < 2:
        return []
    return [*columns[-2].split(SEPARATOR), columns[-1]]


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
