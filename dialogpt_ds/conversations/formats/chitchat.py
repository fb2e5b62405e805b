"""The conversations of the PyPI package chitchat-dataset (BYU PCC lab, MIT): 7,168 chats between two people."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from dialogpt_ds.conversations.conversation import Conversation, Record, Turn
from dialogpt_ds.conversations.files import Head, is_compressed
from dialogpt_ds.conversations.formats.base import Format
from dialogpt_ds.conversations.formats.jsonl import is_json_line
from dialogpt_ds.errors import UserError

# Chats by a key, each an object with messages.
_START = re.compile(r"\s*\{\s*\"[^\"]*\"\s*:\s*\{.{0,20000}?\"messages\"\s*:\s*\[\s*\[", re.DOTALL)


def packaged_file() -> Path:
    """Return the path of the package's data file, without running the package.

    Raises:
        UserError: the package is not installed.
    """
    spec = find_spec("chitchat_dataset")
    if spec is None or spec.origin is None:
        raise UserError("--format chitchat without --input needs the package: pip install chitchat-dataset")
    return Path(spec.origin).parent / "dataset.json"


@dataclass(frozen=True)
class Chitchat(Format):
    """The package's file: one JSON value over any number of lines."""

    name = "chitchat"
    summary = "the PyPI package"
    title = "chitchat-dataset"
    default_targets = "all"
    from_stdin = False
    own_input = staticmethod(packaged_file)

    @classmethod
    def recognises(cls, head: Head) -> bool:
        """A JSON file begins as the package's does, in its first characters."""
        if head.suffix != ".json" or is_compressed(head.path) or is_json_line(head.first):
            return False
        with open(head.path, encoding="utf-8", errors="replace") as file:
            return _START.match(file.read(30_000)) is not None

    def records(self, lines: Iterator[bytes], path: str) -> Iterator[Record]:
        """Yield the chats in file order; utterances that one speaker sent in a row are one turn, joined by a space.

        Raises:
            UserError: the file does not have the package's shape.
        """
        try:
            chats = json.loads(b"".join(lines).decode("utf-8"))
            for number, chat in enumerate(chats.values(), start=1):
                yield Record(number, [" ".join(utterance["text"] for utterance in turn) for turn in chat["messages"]])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not a file of the chitchat-dataset package: {error!r}") from error

    def read(self, record: Record) -> Conversation:
        """Return a chat's turns; the package says nothing of weights."""
        return Conversation([Turn(text) for text in record.content if isinstance(text, str)])
