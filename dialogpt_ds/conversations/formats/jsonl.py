"""JSON Lines: one conversation per line, in the shapes that people's files have.

- `{"messages": [{"role": "user", "content": "..."}, ...]}`, as chat APIs have it; `conversations`, `from` and `value`,
  as ShareGPT has
- `{"turns": ["...", "..."]}`, or a list of objects with `text`
- `{"Context": "a EOS b", "Response": "c"}`, as GODEL has it; Context may be a list
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dialogpt_ds.conversations.conversation import Conversation, Record, RejectedRecordError, Turn, decoded
from dialogpt_ds.conversations.files import Head, is_compressed
from dialogpt_ds.conversations.formats.base import Format
from dialogpt_ds.conversations.formats.dialogpt_tsv import SEPARATOR
from dialogpt_ds.errors import UserError

LISTS = ("messages", "conversations", "conversation", "turns", "dialog", "dialogue")
ROLES = ("role", "from", "speaker", "name")
TEXTS = ("content", "value", "text")
CONTEXTS, RESPONSES = ("Context", "context"), ("Response", "response")


@dataclass(frozen=True)
class JsonLines(Format):
    """JSON Lines of any of these shapes, line by line."""

    name = "jsonl"
    summary = "JSON Lines"
    title = "JSON Lines"
    missing = "is no JSON Lines"
    speakers = "JSON Lines with roles"
    default_targets = "assistant"
    by_lines = True
    has_speakers = True

    @classmethod
    def recognises(cls, head: Head) -> bool:
        """The first line is a conversation, or the file is called so.

        Raises:
            UserError: it is called JSON, and is no conversation per line.
        """
        is_conversation = is_json_line(head.first)
        if head.suffix == ".json" and not is_compressed(head.path) and not is_conversation:
            raise UserError(
                f"{head.path} is one JSON value over many lines, and no file of chitchat-dataset. Make it JSON Lines, "
                f"one conversation a line; of a list: jq -c '.[]' {head.path} > {Path(head.path).stem}.jsonl"
            )
        return head.first.startswith("{") and (is_conversation or head.suffix in (".jsonl", ".ndjson"))

    def read(self, record: Record) -> Conversation:
        """Read one line.

        Raises:
            RejectedRecordError: no UTF-8, no JSON, no conversation in it, or a turn without text.
        """
        assert isinstance(record.content, bytes)
        text = decoded(record.content)
        if not text.strip():
            raise RejectedRecordError("empty line")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RejectedRecordError("not JSON") from error
        if not _is_conversation(value):
            raise RejectedRecordError(f"none of the keys {', '.join((*LISTS[:2], 'turns', 'Context and Response'))}")
        listed = _first(value, LISTS)
        turns = _pair(value) if listed is None else _turns(listed)
        for turn in turns:
            if not turn.text.isascii() and any("\ud800" <= character <= "\udfff" for character in turn.text):
                raise RejectedRecordError("half of a surrogate pair in it")
        return Conversation(turns)


def is_json_line(line: str) -> bool:
    """Return whether a line is JSON of one of the shapes."""
    try:
        return _is_conversation(json.loads(line))
    except (ValueError, RecursionError):
        return False


def _is_conversation(value: Any) -> bool:
    return isinstance(value, dict) and (_first(value, LISTS) is not None or _first(value, RESPONSES) is not None)


def _pair(value: dict[str, Any]) -> list[Turn]:
    """Read Context and Response."""
    context, response = _first(value, CONTEXTS), _first(value, RESPONSES)
    if isinstance(context, str):
        context = context.split(SEPARATOR) if context else []
    elif context is None:
        context = []
    if (
        not isinstance(response, str)
        or not isinstance(context, list)
        or not all(isinstance(text, str) for text in context)
    ):
        raise RejectedRecordError("Context or Response is not text")
    return [Turn(text) for text in [*context, response]]


def _turns(listed: Any) -> list[Turn]:
    if not isinstance(listed, list):
        raise RejectedRecordError("the turns are not a list")
    return [_turn(item) for item in listed]


def _turn(item: Any) -> Turn:
    if isinstance(item, str):
        return Turn(item)
    if not isinstance(item, dict):
        raise RejectedRecordError("a turn is neither text nor an object")
    text = _first(item, TEXTS)
    if isinstance(text, list):  # parts, as chat APIs have them
        parts: list[Any] = [part.get("text") if isinstance(part, dict) else part for part in text]
        text = "".join(parts) if all(isinstance(part, str) for part in parts) else None
    if not isinstance(text, str):
        raise RejectedRecordError("a turn without text")
    weight, role = item.get("weight"), _first(item, ROLES)
    if weight is not None and not _is_weight(weight):
        raise RejectedRecordError("a weight that is no number from 0 on")
    return Turn(text, None if weight is None else float(weight), role if isinstance(role, str) else None)


def _is_weight(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and math.isfinite(float(value)) and value >= 0
    except OverflowError:
        return False


def _first(value: dict[str, Any], names: tuple[str, ...]) -> Any:
    """Return the value of the first key that is there."""
    return next((value[name] for name in names if name in value), None)
