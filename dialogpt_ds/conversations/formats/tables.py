"""CSV and TSV files with a header: a response and its contexts, or the lines of a script with the name of who says
them."""

import csv
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from dialogpt_ds.conversations.conversation import Conversation, Record, RejectedRecordError, Turn
from dialogpt_ds.conversations.files import Head
from dialogpt_ds.conversations.formats.base import Format, ReadingOptions
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
        """Return the columns of the contexts, oldest first: `context` is the newest, then `context/0`, `context/1`,
        ..."""
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


@dataclass(frozen=True)
class ResponseTable(Format):
    """A table with a conversation in each row."""

    table: Table

    name = "csv"
    summary = "or TSV with a header"
    title = "a table"
    missing = "has no header with response and context or name and line"
    speakers = "scripts with name and line"

    @classmethod
    def recognises(cls, head: Head) -> bool:
        """The first line is a header of either kind."""
        return table_of(head.first) is not None

    @classmethod
    def open(cls, head: Head, options: ReadingOptions) -> Format:
        """Return a table, or a script, as the header says.

        Raises:
            UserError: it says neither, or it is a script and no persona is chosen.
        """
        first = head.lines[0].decode("utf-8", errors="replace").removesuffix("\r") if head.lines else ""
        table = table_of(first)
        if table is None:
            raise UserError(
                f"{head.path}: the first line is no header that is known here: {first[:80]!r}. It needs the columns "
                "response and context (and context/0, context/1, ... for what came before it), or name and line."
            )
        if not table.is_script:
            return cls(table)
        if not options.persona:
            raise UserError(
                f"{head.path} is a script of lines with names: say with --persona NAME whose lines are learned"
            )
        return Script(table, options.persona, options.history)

    def describe(self) -> str:
        """Name the columns."""
        return f"{self.title} with the columns {', '.join(self.table.header)}"

    def records(self, lines: Iterator[bytes], path: str) -> Iterator[Record]:
        """Yield the rows behind the header; a row may go over several lines.

        Raises:
            UserError: a quote that never closes, so that all that follows would be one field.
        """
        csv.field_size_limit(MAX_FIELD)
        texts = (line.decode("utf-8", errors="surrogateescape") for line in lines)
        reader = csv.reader(texts, delimiter=self.table.delimiter, strict=True)
        before = 0
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if "unexpected end of data" in str(error):
                    raise UserError(
                        f"{path}, line {before + 1}: a quote opens in this row and never closes, so all that follows "
                        "would be one field; close it, or double it where it is text"
                    ) from error
                yield Record(before + 1, [], f"not CSV: {error}")
                before = reader.line_num
                continue
            if before:  # the first row is the header
                yield Record(before + 1, row)
            before = reader.line_num

    def read(self, record: Record) -> Conversation:
        """Read one row.

        Raises:
            RejectedRecordError: it is no CSV, has another number of fields than the header, or is no UTF-8.
        """
        fields = _checked_fields(record)
        if len(fields) != len(self.table.header):
            raise RejectedRecordError(WRONG_FIELDS)
        contexts = [fields[column] for column in self.table.contexts]
        # An example early in a conversation has fewer contexts; the oldest fields are empty then.
        first = next((number for number, text in enumerate(contexts) if text), len(contexts))
        return Conversation([Turn(text) for text in [*contexts[first:], fields[self.table.header.index("response")]]])


@dataclass(frozen=True)
class Script(ResponseTable):
    """A table with a line of a script in each row."""

    persona: str
    """Whose lines are learned."""
    history: int
    """Lines of context."""

    title = "a script"
    has_speakers = True

    def records(self, lines: Iterator[bytes], path: str) -> Iterator[Record]:
        """Yield a conversation for each line of `persona`: up to `history` lines before it, and the line.

        A row that can't be read is handed on, and breaks the history: what follows was not said to what came before it.
        """
        name, line = self.table.header.index("name"), self.table.header.index("line")
        before: deque[str] = deque(maxlen=self.history)
        for row in super().records(lines, path):
            if row.problem or len(row.content) != len(self.table.header):
                before.clear()
                yield row._replace(problem=row.problem or WRONG_FIELDS)
                continue
            assert isinstance(row.content, list)
            text = row.content[line]
            if row.content[name].strip() == self.persona:
                yield Record(row.line, [*before, text])
            before.append(text)

    def read(self, record: Record) -> Conversation:
        """Read one conversation; raises RejectedRecordError as for a table.

        What the persona said earlier was learned there, and is context here.
        """
        *context, line = _checked_fields(record)
        return Conversation([*(Turn(text) for text in context), Turn(line, role=self.persona)])


def _checked_fields(record: Record) -> list[str]:
    assert isinstance(record.content, list)
    if record.problem:
        raise RejectedRecordError(record.problem)
    try:
        "".join(record.content).encode("utf-8")
    except UnicodeEncodeError as error:
        raise RejectedRecordError("not UTF-8") from error
    return record.content
