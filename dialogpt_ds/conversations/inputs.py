"""Input files: what format they have, and their records in order."""

import bz2
import gzip
import itertools
import lzma
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Literal

from dialogpt_ds.conversations import chitchat, dialogpt_tsv
from dialogpt_ds.conversations.conversation import Conversation, Record
from dialogpt_ds.errors import UserError

FormatName = Literal["auto", "dialogpt", "chitchat"]
TurnWeights = Literal["auto", "yes", "no"]


@dataclass(frozen=True)
class Input:
    """One input file with everything that was decided about it as a whole."""

    path: Path
    format: Literal["dialogpt", "references", "chitchat"]
    weighted: bool
    """DialoGPT TSV only: each turn has its weight before it."""
    normalize: bool = False
    """Runs of white space become one space, as in DialoGPT's evaluation."""

    @property
    def default_targets(self) -> Literal["all", "last"]:
        """Which turns are learned where the input says nothing."""
        return "all" if self.format == "chitchat" else "last"

    def describe(self) -> str:
        """Say what was decided, for the person who started the run."""
        if self.format == "chitchat":
            return f"{self.path}: chitchat-dataset"
        if self.format == "references":
            return f"{self.path}: source and references, one conversation per reference"
        return f"{self.path}: DialoGPT TSV, turns {'with weights' if self.weighted else 'without weights'}"

    def records(self) -> Iterator[Record]:
        """Yield the file's records in order."""
        if self.format == "chitchat":
            yield from chitchat.records(self.path)
        else:
            with open_input(self.path) as file:
                for number, line in enumerate(_lines(file, self.path), start=1):
                    if self.format == "references":
                        yield from dialogpt_tsv.reference_records(Record(number, line))
                    else:
                        yield Record(number, line)

    def read(self, record: Record) -> Conversation:
        """Read one record; raises RejectedRecordError."""
        chats = self.format == "chitchat"
        conversation = chitchat.read_record(record) if chats else dialogpt_tsv.read_record(record, self.weighted)
        if self.normalize:
            return Conversation([turn._replace(text=" ".join(turn.text.split())) for turn in conversation.turns])
        return conversation


def open_inputs(paths: list[str], format_name: FormatName, turn_weights: TurnWeights) -> list[Input]:
    """Decide about every input file before any is read.

    Raises:
        UserError: no input, a missing or unreadable file, an undecidable one.
    """
    if not paths:
        if format_name == "chitchat":
            return [Input(chitchat.packaged_file(), "chitchat", weighted=False)]
        raise UserError("--input is missing: give one or more files (only --format chitchat has an input of its own)")
    return [_open_one(Path(path).expanduser(), format_name, turn_weights) for path in paths]


def _open_one(path: Path, format_name: FormatName, turn_weights: TurnWeights) -> Input:
    if not path.is_file():
        raise UserError(f"--input {str(path)!r} is {'a folder' if path.is_dir() else 'missing'}; a file is needed")
    if format_name == "chitchat" or (format_name == "auto" and path.suffix == ".json"):
        return Input(path, "chitchat", weighted=False)
    if turn_weights != "auto":
        return Input(path, "dialogpt", weighted=turn_weights == "yes")
    with open_input(path) as file:
        head = list(itertools.islice(_lines(file, path), dialogpt_tsv.PROBED_LINES))
    readable = [line for line in head if _is_utf8(line)]
    if format_name == "auto" and not any(b"\t" in line for line in head):
        raise UserError(
            f"{path}: none of the first {len(head)} lines has a tab, so it is no DialoGPT TSV (source<TAB>target). "
            "Name another --format, or convert it."
        )
    return Input(path, "dialogpt", weighted=dialogpt_tsv.has_weights(readable, str(path)))


def open_evaluation(path: str, normalize: bool) -> Input:
    """Return a DialoGPT TSV to evaluate on: the training format where its turns have weights, else a source and its references.

    Raises:
        UserError: it is missing, unreadable or undecidable.
    """
    source = _open_one(Path(path).expanduser(), "dialogpt", "auto")
    return replace(source, format="dialogpt" if source.weighted else "references", normalize=normalize)


def open_input(path: Path) -> IO[bytes]:
    """Open a plain, .gz, .bz2 or .xz file for reading bytes."""
    openers = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers.get(path.suffix, open)(path, "rb")  # type: ignore[operator]


def _lines(file: IO[bytes], path: Path) -> Iterator[bytes]:
    """Yield lines without their line end; only b"\\n" ends a line, so Unicode's other separators stay in the text."""
    try:
        for line in file:
            yield line.removesuffix(b"\n")
    except (EOFError, OSError, lzma.LZMAError) as error:
        raise UserError(f"{path} can't be read to its end ({error}): is the download or the copy complete?") from error


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
