"""The conversations of the PyPI package chitchat-dataset (BYU PCC lab, MIT): 7,168 chats between two people."""

import json
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from dialogpt_ds.conversations.conversation import Conversation, Record, Turn
from dialogpt_ds.errors import UserError


def packaged_file() -> Path:
    """Return the path of the package's data file, without running the package.

    Raises:
        UserError: the package is not installed.
    """
    spec = find_spec("chitchat_dataset")
    if spec is None or spec.origin is None:
        raise UserError("--format chitchat without --input needs the package: pip install chitchat-dataset")
    return Path(spec.origin).parent / "dataset.json"


def looks_like(path: Path) -> bool:
    """Return whether a JSON file has the package's shape, from its first characters: chats by a key, each an object with messages."""
    with open(path, encoding="utf-8", errors="replace") as file:
        return (
            re.match(r"\s*\{\s*\"[^\"]*\"\s*:\s*\{.{0,20000}?\"messages\"\s*:\s*\[\s*\[", file.read(30_000), re.DOTALL) is not None
        )


def records(path: Path) -> Iterator[Record]:
    """Yield the chats in file order; utterances that one speaker sent in a row are one turn, joined by a space.

    Raises:
        UserError: the file does not have the package's shape.
    """
    try:
        with open(path, encoding="utf-8") as file:
            chats = json.load(file)
        for number, chat in enumerate(chats.values(), start=1):
            yield Record(number, [" ".join(utterance["text"] for utterance in turn) for turn in chat["messages"]])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a file of the chitchat-dataset package: {error!r}") from error


def read_record(record: Record) -> Conversation:
    """Return a chat's turns; the package says nothing of weights."""
    return Conversation([Turn(text) for text in record.content if isinstance(text, str)])
