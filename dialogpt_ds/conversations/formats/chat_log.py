"""Plain chat logs: `NAME: text` per line; a blank line ends a conversation."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from dialogpt_ds.conversations.conversation import Conversation, Record, RejectedRecordError, Turn, decoded
from dialogpt_ds.conversations.files import Head
from dialogpt_ds.conversations.formats.base import Format

# A colon and a space: "http://..." and "12:30" are text.
_SPOKEN = re.compile(r"([^:\t]{1,64}):(?: +(.*)|)", re.DOTALL)


@dataclass(frozen=True)
class ChatLog(Format):
    """A chat log."""

    name = "chat"
    summary = "NAME: text"
    title = "chat log, NAME: text"
    missing = "has no NAME: text"
    speakers = "chat logs"
    default_targets = "all"
    has_speakers = True

    @classmethod
    def recognises(cls, head: Head) -> bool:
        """Half of the lines, the first among them, begin with who says them."""
        spoken = sum(_SPOKEN.fullmatch(line) is not None for line in head.texts)
        return _SPOKEN.fullmatch(head.first) is not None and spoken >= 0.5 * len(head.texts)

    def records(self, lines: Iterator[bytes], path: str) -> Iterator[Record]:
        """Yield conversations: runs of lines between blank ones."""
        start = 0
        waiting: list[bytes] = []
        for number, line in enumerate(lines, start=1):
            if line.strip():
                if not waiting:
                    start = number
                waiting.append(line.removesuffix(b"\n").removesuffix(b"\r"))
            elif waiting:
                yield Record(start, b"\n".join(waiting))
                waiting = []
        if waiting:
            yield Record(start, b"\n".join(waiting))

    def read(self, record: Record) -> Conversation:
        """Read one conversation; what one speaker says in a row is one turn, joined by a space, as are lines without a
        name.

        Raises:
            RejectedRecordError: no UTF-8, or nobody is named before the first line.
        """
        assert isinstance(record.content, bytes)
        spoken: list[tuple[str, list[str]]] = []
        for line in decoded(record.content).split("\n"):
            match = _SPOKEN.fullmatch(line)
            if match is None:
                if not spoken:
                    raise RejectedRecordError("no name before the first line")
                spoken[-1][1].append(line.strip())
            elif spoken and spoken[-1][0] == match[1].strip():
                spoken[-1][1].append(match[2] or "")
            else:
                spoken.append((match[1].strip(), [match[2] or ""]))
        return Conversation([Turn(" ".join(part for part in parts if part), role=name) for name, parts in spoken])
