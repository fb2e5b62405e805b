"""CSV and TSV files with a header: a response and its contexts, or the lines of a script with the name of who says them."""

import csv
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dialogpt_ds.conversations.conversation import Conversation, Record, RejectedRecordError, Turn
from dialogpt_ds.errors import UserError

_CONTEXT = re.compile(r"context(?:/(\d+))?")
MAX_FIELD = 1 << 24
"""Characters of a field; csv's own limit of 131,072 is shorter than some conversations."""

WRONG_FIELDS = "another number of fields than the header"


@dataclass(frozen=True)
class Table:
    """What a header says."""

    delimiter: str
    header: tuple[str, ...]

    @property
    def is_script(self) -> bool:
        """Whether each row is a line that somebody says."""
        return {"name", "line"} <= set(self.header)

    @property
    def contexts(self) -> list[int]:
        """Return the columns of the contexts, oldest first: `context` is the newest, then `context/0`, `context/1`, ..."""
        found = []
        for column, name in enumerate(self.header):
            match = _CONTEXT.fullmatch(name)
            if match:
                found.append((-1 if match[1] is None else int(match[1]), column))
        return [column for _, column in sorted(found, reverse=True)]


def table_of(first_line: str) -> Table | None:
    """Return what the first line of a file says if it is a header that this module knows."""
    for delimiter in (",", "\t", ";"):
        try:
            fields = next(csv.reader([first_line.removeprefix("\ufeff")], delimiter=delimiter, strict=True), [])
        except csv.Error:
            continue
        table = Table(delimiter, tuple(name.strip().lower() for name in fields))
        if table.is_script or ("response" in table.header and table.contexts):
            return table
    return None


def records(file: Iterator[bytes], table: Table, path: str) -> Iterator[Record]:
    """Yield the rows behind the header; a row may go over several lines.

    Raises:
        UserError: a quote that never closes, so that all that follows would be one field.
    """
    csv.field_size_limit(MAX_FIELD)
    lines = (line.decode("utf-8", errors="surrogateescape") for line in file)
    reader = csv.reader(lines, delimiter=table.delimiter, strict=True)
    before = 0
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                raise UserError(
                    f"{path}, line {before + 1}: a quote opens in this row and never closes, so all that follows would be one field; "
                    "close it, or double it where it is text"
                ) from error
            yield Record(before + 1, [], f"not CSV: {error}")
            before = reader.line_num
            continue
        if before:  # the first row is the header
            yield Record(before + 1, row)
        before = reader.line_num


def script_records(rows: Iterator[Record], table: Table, persona: str, history: int) -> Iterator[Record]:
    """Yield a conversation for each line of `persona`: up to `history` lines before it, and the line.

    A row that can't be read is handed on, and breaks the history: what follows was not said to what came before it.
    """
    name, line = table.header.index("name"), table.header.index("line")
    before: deque[str] = deque(maxlen=history)
    for row in rows:
        if row.problem or len(row.content) != len(table.header):
            before.clear()
            yield row._replace(problem=row.problem or WRONG_FIELDS)
            continue
        assert isinstance(row.content, list)
        text = row.content[line]
        if row.content[name].strip() == persona:
            yield Record(row.line, [*before, text])
        before.append(text)


def read_record(record: Record, table: Table, persona: str) -> Conversation:
    """Read one row, or one conversation of a script.

    Raises:
        RejectedRecordError: it is no CSV, has another number of fields than the header, or is no UTF-8.
    """
    assert isinstance(record.content, list)
    if record.problem:
        raise RejectedRecordError(record.problem)
    _check_text(record.content)
    if table.is_script:
        # What the persona said earlier was learned there, and is context here.
        return Conversation([*(Turn(text) for text in record.content[:-1]), Turn(record.content[-1], role=persona)])
    if len(record.content) != len(table.header):
        raise RejectedRecordError(WRONG_FIELDS)
    contexts = [record.content[column] for column in table.contexts]
    # An example early in a conversation has fewer contexts; the oldest fields are empty then.
    first = next((number for number, text in enumerate(contexts) if text), len(contexts))
    return Conversation([Turn(text) for text in [*contexts[first:], record.content[table.header.index("response")]]])


def _check_text(fields: Sequence[str]) -> None:
    try:
        "".join(fields).encode("utf-8")
    except UnicodeEncodeError as error:
        raise RejectedRecordError("not UTF-8") from error
