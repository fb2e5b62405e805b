"""Plain chat logs: `NAME: text` per line; a blank line ends a conversation."""

import re
from collections.abc import Iterable, Iterator

from dialogpt_ds.conversations.conversation import Conversation, Record, RejectedRecordError, Turn, decoded

# A colon and a space: "http://..." and "12:30" are text.
_SPOKEN = re.compile(r"([^:\t]{1,64}):(?: +(.*)|)", re.DOTALL)


def is_spoken(line: str) -> bool:
    """Return whether a line begins with who says it."""
    return _SPOKEN.fullmatch(line) is not None


def records(lines: Iterable[bytes]) -> Iterator[Record]:
    """Yield conversations: runs of lines between blank ones."""
    start = 0
    waiting: list[bytes] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            if not waiting:
                start = number
            waiting.append(line.removesuffix(b"\r"))
        elif waiting:
            yield Record(start, b"\n".join(waiting))
            waiting = []
    if waiting:
        yield Record(start, b"\n".join(waiting))


def read_record(record: Record) -> Conversation:
    """Read one conversation; what one speaker says in a row is one turn, joined by a space, as are lines without a name.

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
