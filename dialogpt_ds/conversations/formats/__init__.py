"""Formats of conversations, a file each."""

from typing import TYPE_CHECKING, Literal

from dialogpt_ds.conversations.formats.base import Format
from dialogpt_ds.conversations.formats.chat_log import ChatLog
from dialogpt_ds.conversations.formats.chitchat import Chitchat
from dialogpt_ds.conversations.formats.dialogpt_tsv import DialogptTsv
from dialogpt_ds.conversations.formats.jsonl import JsonLines
from dialogpt_ds.conversations.formats.tables import ResponseTable

FORMATS: dict[str, type[Format]] = {
    kind.name: kind
    for kind in (
        Chitchat,
        JsonLines,
        ResponseTable,
        DialogptTsv,
        ChatLog,
    )
}
"""By the name for --format. A file has the first of them that recognises it, so the stricter stand first: DialogptTsv
takes every file with a tab in its head, and JsonLines refuses every other .json."""
if TYPE_CHECKING:
    FormatName = str
else:
    FormatName = Literal[("auto", *FORMATS)]
    """The choices of --format."""
