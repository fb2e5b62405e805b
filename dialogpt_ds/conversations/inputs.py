"""Inputs: what format they have, decided before any is read, and their records in order."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from dialogpt_ds.conversations.conversation import Conversation, Record
from dialogpt_ds.conversations.files import find_files, head_of, is_compressed, lines_of, open_bytes, plain_suffix
from dialogpt_ds.conversations.formats import chat_log, chitchat, dialogpt_tsv, jsonl, tables
from dialogpt_ds.conversations.targets import Targets
from dialogpt_ds.errors import UserError

FormatName = Literal["auto", "dialogpt", "jsonl", "csv", "chat", "chitchat"]
TurnWeights = Literal["auto", "yes", "no"]
LINE_FORMATS = ("dialogpt", "references", "jsonl")
"""Formats in which each line is a record, whatever stands before it."""


@dataclass(frozen=True)
class Input:
    """One input file with everything that was decided about it as a whole."""

    path: str
    """Of the file; "-" is standard input."""
    format: Literal["dialogpt", "references", "jsonl", "csv", "chat", "chitchat"]
    weighted: bool = False
    """DialoGPT TSV only: each turn has its weight before it."""
    table: tables.Table | None = None
    """CSV only: what its header says."""
    persona: str = ""
    """Whose turns are learned."""
    history: int = 0
    """CSV scripts only: lines of context."""
    normalize: bool = False
    """Runs of white space become one space, as in DialoGPT's evaluation."""

    @property
    def default_targets(self) -> Targets:
        """Which turns are learned where the input says nothing."""
        return {"chitchat": "all", "chat": "all", "jsonl": "assistant"}.get(self.format, "last")  # type: ignore[return-value]

    @property
    def by_lines(self) -> bool:
        """Whether a part of the file can be read without what stands before it."""
        return self.format in LINE_FORMATS and not is_compressed(self.path) and self.path != "-"

    def describe(self) -> str:
        """Say what was decided, for the person who started the run."""
        kind = {
            "chitchat": "chitchat-dataset",
            "references": "source and references, one conversation per reference",
            "jsonl": "JSON Lines",
            "chat": "chat log, NAME: text",
            "dialogpt": f"DialoGPT TSV, turns {'with weights' if self.weighted else 'without weights'}",
        }.get(self.format)
        if self.table is not None:
            columns = ", ".join(self.table.header)
            kind = f"{'a script' if self.table.is_script else 'a table'} with the columns {columns}"
        learned = f", {self.persona}'s turns are learned" if self.persona else ""
        return f"{'standard input' if self.path == '-' else self.path}: {kind}{learned}"

    def records(self) -> Iterator[Record]:
        """Yield the file's records in order; raises UserError where it can't be read to its end."""
        if self.format == "chitchat":
            yield from chitchat.records(Path(self.path))
            return
        with open_bytes(self.path) as file:
            lines = lines_of(file, self.path)
            if self.format == "csv":
                assert self.table is not None
                rows = tables.records(lines, self.table, self.path)
                yield from tables.script_records(rows, self.table, self.persona, self.history) if self.table.is_script else rows
            elif self.format == "chat":
                yield from chat_log.records(line.removesuffix(b"\n") for line in lines)
            else:
                yield from self.line_records(lines)

    def line_records(self, lines: Iterator[bytes], first: int = 1) -> Iterator[Record]:
        """Yield the records of lines of a line format; the first has the number `first`."""
        for number, line in enumerate(lines, start=first):
            record = Record(number, line.removesuffix(b"\n"))
            if self.format == "references":
                yield from dialogpt_tsv.reference_records(record)
            else:
                yield record

    def read(self, record: Record) -> Conversation:
        """Read one record; raises RejectedRecordError."""
        if self.format == "chitchat":
            conversation = chitchat.read_record(record)
        elif self.format == "jsonl":
            conversation = jsonl.read_record(record)
        elif self.format == "chat":
            conversation = chat_log.read_record(record)
        elif self.table is not None:
            conversation = tables.read_record(record, self.table, self.persona)
        else:
            conversation = dialogpt_tsv.read_record(record, self.weighted)
        if self.normalize:
            return Conversation([turn._replace(text=" ".join(turn.text.split())) for turn in conversation.turns])
        return conversation


def open_inputs(
    paths: list[str], format_name: FormatName, turn_weights: TurnWeights, persona: str = "", history: int = 7
) -> list[Input]:
    """Decide about every input before any is read.

    Raises:
        UserError: no input, a missing or unreadable file, an undecidable one, a persona that nobody speaks for.
    """
    if not paths:
        if format_name == "chitchat":
            return [_with_persona(Input(str(chitchat.packaged_file()), "chitchat"), persona, history)]
        raise UserError("--input is missing: give one or more files (only --format chitchat has an input of its own)")
    opened = [_open_one(path, format_name, turn_weights) for path in find_files(paths)]
    return [_with_persona(source, persona, history) for source in opened]


def _with_persona(source: Input, persona: str, history: int) -> Input:
    if source.table is not None and source.table.is_script:
        if not persona:
            raise UserError(f"{source.path} is a script of lines with names: say with --persona NAME whose lines are learned")
        return replace(source, persona=persona, history=history)
    if persona and source.format not in ("jsonl", "chat"):
        raise UserError(f"--persona {persona!r}: {source.describe()} does not say who speaks")
    return replace(source, persona=persona)


def _open_one(path: str, format_name: FormatName, turn_weights: TurnWeights) -> Input:
    head = head_of(path)
    lines = head.split(b"\n")
    lines = lines[:-1] if head.endswith(b"\n") else lines
    kind = _kind_of(path, lines) if format_name == "auto" else format_name
    if kind == "dialogpt":
        if turn_weights != "auto":
            return Input(path, "dialogpt", weighted=turn_weights == "yes")
        readable = list(itertools.islice(filter(_is_utf8, lines), dialogpt_tsv.PROBED_LINES))
        return Input(path, "dialogpt", weighted=dialogpt_tsv.has_weights(readable, path))
    if kind == "csv":
        table = tables.table_of(_text(lines[0]) if lines else "")
        if table is None:
            raise UserError(
                f"{path}: the first line is no header that is known here: {_text(lines[0])[:80] if lines else ''!r}. It needs the columns "
                "response and context (and context/0, context/1, ... for what came before it), or name and line."
            )
        return Input(path, "csv", table=table)
    if kind == "chitchat" and path == "-":
        raise UserError("--format chitchat can't be read from standard input; name the file")
    return Input(path, kind)  # type: ignore[arg-type]


def _kind_of(path: str, lines: list[bytes]) -> str:
    """Tell the format from the head of a file; its name only helps where the content allows it.

    Raises:
        UserError: nothing fits.
    """
    written = [_text(line) for line in lines if line.strip()]
    first = written[0] if written else ""
    if plain_suffix(path) == ".json" and not is_compressed(path) and not _is_json_line(first):
        if chitchat.looks_like(Path(path)):
            return "chitchat"
        raise UserError(
            f"{path} is one JSON value over many lines, and no file of chitchat-dataset. Make it JSON Lines, one conversation a line; "
            f"of a list: jq -c '.[]' {path} > {Path(path).stem}.jsonl"
        )
    if first.startswith("{") and (_is_json_line(first) or plain_suffix(path) in (".jsonl", ".ndjson")):
        return "jsonl"
    if tables.table_of(first) is not None:
        return "csv"
    if any("\t" in line for line in written):
        return "dialogpt"
    spoken = sum(chat_log.is_spoken(line) for line in written)
    if written and chat_log.is_spoken(first) and spoken >= 0.5 * len(written):
        return "chat"
    raise UserError(
        f"{path}: its format is not told by its first {len(written):,} lines (first: {first[:60]!r}). It is no JSON Lines, has no header "
        "with response and context or name and line, no tab as in source<TAB>target, and no NAME: text. Name the --format, or convert it."
    )


def _is_json_line(line: str) -> bool:
    try:
        return jsonl.is_conversation(json.loads(line))
    except (ValueError, RecursionError):
        return False


def open_evaluation(path: str, normalize: bool) -> Input:
    """Return a DialoGPT TSV to evaluate on: the training format where its turns have weights, else a source and its references.

    Raises:
        UserError: it is missing, unreadable or undecidable.
    """
    (name,) = find_files([path])
    source = _open_one(name, "dialogpt", "auto")
    return replace(source, format="dialogpt" if source.weighted else "references", normalize=normalize)


def _text(line: bytes) -> str:
    return line.decode("utf-8", errors="replace").removesuffix("\r")


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
