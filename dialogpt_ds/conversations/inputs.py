"""Inputs: what format they have, decided before any is read, and their records in order."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from dialogpt_ds.conversations.conversation import Conversation, Record
from dialogpt_ds.conversations.files import STDIN, Head, find_files, is_compressed, lines_of, open_bytes
from dialogpt_ds.conversations.formats import FORMATS, FormatName
from dialogpt_ds.conversations.formats.base import Format, ReadingOptions, TurnWeights
from dialogpt_ds.conversations.formats.dialogpt_tsv import DialogptTsv, References
from dialogpt_ds.errors import UserError


@dataclass(frozen=True)
class Input:
    """One input file with everything that was decided about it as a whole."""

    path: str
    """Of the file; "-" is standard input."""
    format: Format
    """Its format, with what it has decided."""
    persona: str = ""
    """Whose turns are learned."""
    normalize: bool = False
    """Runs of white space become one space, as in DialoGPT's evaluation."""

    @property
    def by_lines(self) -> bool:
        """Whether a part of the file can be read without what stands before it."""
        return self.format.by_lines and not is_compressed(self.path) and self.path != STDIN

    def describe(self) -> str:
        """Say what was decided, for the person who started the run."""
        learned = f", {self.persona}'s turns are learned" if self.persona else ""
        return f"{'standard input' if self.path == STDIN else self.path}: {self.format.describe()}{learned}"

    def facts(self) -> dict[str, Any]:
        """Return what decides on the conversations of the input, for report.json.

        What the first formats decided stands there whatever the format is: finished shards are known again by it.
        """
        first = {"weighted": False, "table": None, "persona": "", "history": 0, "normalize": self.normalize}
        return {"path": self.path, "format": self.format.name, **first, **asdict(self.format), "persona": self.persona}

    def records(self) -> Iterator[Record]:
        """Yield the file's records in order; raises UserError where it can't be read to its end."""
        with open_bytes(self.path) as file:
            yield from self.format.records(lines_of(file, self.path), self.path)

    def read(self, record: Record) -> Conversation:
        """Read one record; raises RejectedRecordError."""
        conversation = self.format.read(record)
        if self.normalize:
            return Conversation([turn._replace(text=" ".join(turn.text.split())) for turn in conversation.turns])
        return conversation


def open_inputs(
    paths: list[str], format_name: FormatName, turn_weights: TurnWeights, persona: str = "", history: int = 7
) -> list[Input]:
    """Decide about every input before any is read.

    Raises:
        UserError: no input, a missing or unreadable file, an undecidable one, a persona where the format does
            not say who speaks.
    """
    chosen = FORMATS.get(format_name)
    if not paths and chosen is not None and chosen.own_input is not None:
        paths = [str(chosen.own_input())]
    elif not paths:
        own = " or ".join(name for name, kind in FORMATS.items() if kind.own_input is not None)
        raise UserError(f"--input is missing: give one or more files (only --format {own} has an input of its own)")
    options = ReadingOptions(turn_weights, persona, history)
    return [_open_one(path, chosen, options) for path in find_files(paths)]


def _open_one(path: str, chosen: type[Format] | None, options: ReadingOptions) -> Input:
    """Open a file in the format that was chosen, or in that which its head shows."""
    head = Head.of(path)
    kind = chosen or _recognised(head)
    if path == STDIN and not kind.from_stdin:
        raise UserError(f"--format {kind.name} can't be read from standard input; name the file")
    source = Input(path, kind.open(head, options))
    if options.persona and not source.format.has_speakers:
        raise UserError(f"--persona {options.persona!r}: {source.describe()} does not say who speaks")
    return replace(source, persona=options.persona)


def _recognised(head: Head) -> type[Format]:
    """Tell the format from the head of a file; its name only helps where the content allows it.

    Raises:
        UserError: nothing fits.
    """
    for kind in FORMATS.values():
        if kind.recognises(head):
            return kind
    *missing, last = (kind.missing for kind in FORMATS.values() if kind.missing)
    raise UserError(
        f"{head.path}: its format is not told by its first {len(head.texts):,} lines (first: {head.first[:60]!r}). It "
        f"{', '.join(missing)}, and {last}. Name the --format, or convert it."
    )


def open_evaluation(path: str, normalize: bool) -> Input:
    """Return a DialoGPT TSV to evaluate on: the training format where its turns have weights, else a source and its
    references.

    Raises:
        UserError: it is missing, unreadable or undecidable.
    """
    (name,) = find_files([path])
    training = DialogptTsv.open(Head.of(name), ReadingOptions())
    return Input(name, training if training.weighted else References(), normalize=normalize)
