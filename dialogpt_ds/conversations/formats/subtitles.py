"""Subtitles in SubRip's form: `number`, `00:00:01,000 --> 00:00:03,500`, lines of text, a blank line; a pause ends a conversation."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from dialogpt_ds.conversations.conversation import Conversation, Record, RejectedRecordError, Turn, decoded
from dialogpt_ds.conversations.files import Head
from dialogpt_ds.conversations.formats.base import Format

PAUSE_SECONDS = 5.0
"""Between two subtitles of one conversation at most."""
_TIMES = re.compile(rb"\s*(\d+):(\d\d):(\d\d)[,.](\d{3}) --> (\d+):(\d\d):(\d\d)[,.](\d{3})\s*")
_MARKUP = re.compile(r"</?[a-z][^>]*>|\{\\[^}]*\}")


@dataclass(frozen=True)
class Subtitles(Format):
    """Subtitles of a film; who speaks is not said, so each is a turn."""

    name = "srt"
    summary = "subtitles"
    title = "subtitles"
    missing = "no subtitle times"
    default_targets = "all"

    @classmethod
    def recognises(cls, head: Head) -> bool:
        """A number, and times."""
        return head.first.strip().isdecimal() and len(head.texts) > 1 and _TIMES.fullmatch(head.texts[1].encode()) is not None

    def records(self, lines: Iterator[bytes], path: str) -> Iterator[Record]:
        """Yield conversations, a line per subtitle; its number is that of its first times."""
        start, end = 0, 0.0
        said: list[list[bytes]] = []
        for number, line in enumerate(lines, start=1):
            times = _TIMES.fullmatch(line)
            if times is None:
                if said and line.strip() and not line.strip().isdigit():
                    said[-1].append(line.strip())
                continue
            if said and _seconds(times.groups()[:4]) - end > PAUSE_SECONDS:
                yield Record(start, b"\n".join(b" ".join(parts) for parts in said))
                said = []
            if not said:
                start = number
            said.append([])
            end = _seconds(times.groups()[4:])
        if said:
            yield Record(start, b"\n".join(b" ".join(parts) for parts in said))

    def read(self, record: Record) -> Conversation:
        """Read one conversation.

        Raises:
            RejectedRecordError: no UTF-8, or nobody says anything.
        """
        assert isinstance(record.content, bytes)
        texts = [_MARKUP.sub("", text).strip() for text in decoded(record.content).split("\n")]
        if not any(texts):
            raise RejectedRecordError("no text")
        return Conversation([Turn(text) for text in texts if text])


def _seconds(parts: tuple[bytes, ...]) -> float:
    hours, minutes, seconds, thousandths = map(int, parts)
    return hours * 3600 + minutes * 60 + seconds + thousandths / 1000
