"""A conversation: turns in the order they were said, and what a record that can't be read becomes."""

from dataclasses import dataclass, field
from typing import NamedTuple


class Turn(NamedTuple):
    """What one speaker said in one go."""

    text: str
    """The text as it came, Unicode kept."""
    weight: float | None = None
    """Weight in the loss, >= 0; None where the input says nothing."""
    role: str | None = None
    """Who spoke, where the input says so."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in the order they were said."""

    turns: list[Turn] = field(default_factory=list)


class RejectedRecordError(Exception):
    """A record that can't be read as a conversation; its message is the reason it is counted under."""


class Record(NamedTuple):
    """One conversation as the input has it, not yet read."""

    line: int
    """Number of its first line (from 1), or its place in a file that is no line format."""
    content: bytes | list[str]
    """The bytes of its lines without the last line end, or fields that a parser has already taken apart."""
    problem: str | None = None
    """Why the parser could not take it apart."""


def text_of(record: Record, limit: int = 200) -> str:
    """Return what a person sees of a record in rejects.jsonl, cut to `limit` characters."""
    whole = record.content
    text = whole.decode("utf-8", errors="backslashreplace") if isinstance(whole, bytes) else "\t".join(whole)
    text = text.encode("utf-8", errors="backslashreplace").decode(
        "utf-8"
    )  # what a parser has let through as surrogates
    return text if len(text) <= limit else text[: limit - 1] + "…"


def decoded(content: bytes) -> str:
    """Decode UTF-8; raises RejectedRecordError."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RejectedRecordError("not UTF-8") from error
