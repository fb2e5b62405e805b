"""Reading what wandb wrote: the records of a run's `run-ID.wandb` file, and what they say in plain Python.

The file is a log of LevelDB's format (https://github.com/google/leveldb/blob/main/doc/log_format.md) with two
differences: 7 bytes (":W&B", a magic number, a version) come before the first block and count as part of it, and the
checksum is a plain CRC-32.
"""

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import ArtifactRecord, MetricRecord, Record, RunRecord

BLOCK = 32 * 1024
FILE_HEADER = struct.Struct("<4sHB")
IDENT, MAGIC, VERSION = b":W&B", 0xBEE1, 0
CHUNK_HEADER = struct.Struct("<IHB")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


class DamagedLogError(ValueError):
    """A .wandb file that is not what wandb writes."""


def log_file(folder: Path) -> Path:
    """Return the one .wandb file of a run's folder."""
    (path,) = folder.glob("*.wandb")
    return path


def read_records(path: Path, killed: bool = False) -> list[Record]:
    """Return all records of a .wandb file; raises DamagedLogError where a checksum, a length or the order of the chunks
    is wrong.

    With `killed`, as after a kill of the process that wrote it, the file may break off in its last record, which is
    left out.
    """
    return [Record.FromString(payload) for payload in _payloads(path.read_bytes(), killed)]


def _payloads(content: bytes, killed: bool) -> Iterator[bytes]:
    if content[: FILE_HEADER.size] != FILE_HEADER.pack(IDENT, MAGIC, VERSION):
        raise DamagedLogError(f"starts with {content[: FILE_HEADER.size]!r}")
    parts: list[bytes] = []
    for kind, payload in _chunks(content, killed):
        if (kind in (FULL, FIRST)) == bool(parts):
            raise DamagedLogError(f"a chunk of type {kind} after {len(parts)} chunks of a record")
        parts.append(payload)
        if kind in (FULL, LAST):
            yield b"".join(parts)
            parts = []
    if parts and not killed:
        raise DamagedLogError("the last record has no end")


def _chunks(content: bytes, killed: bool) -> Iterator[tuple[int, bytes]]:
    """Yield (type, payload) of each chunk. A header never crosses a block: 32,763 of 32,768 bytes used leave 5 that are
    skipped."""
    place = FILE_HEADER.size
    while place < len(content):
        room = BLOCK - place % BLOCK
        if room < CHUNK_HEADER.size:
            place += room
            continue
        start = place + CHUNK_HEADER.size
        if start > len(content):
            break
        checksum, length, kind = CHUNK_HEADER.unpack_from(content, place)
        if kind not in (FULL, FIRST, MIDDLE, LAST) or length > room - CHUNK_HEADER.size:
            raise DamagedLogError(f"no chunk at byte {place}: type {kind}, {length} bytes")
        place = start + length
        if place > len(content):
            break
        if zlib.crc32(content[start - 1 : place]) != checksum:
            raise DamagedLogError(f"wrong checksum before byte {place}")
        yield kind, content[start:place]
    else:
        return
    if not killed:
        raise DamagedLogError(f"breaks off in a chunk at byte {len(content)}")


def _of(records: list[Record], kind: str) -> Iterator[Any]:
    """Yield the messages of one kind, in order."""
    return (getattr(record, kind) for record in records if record.WhichOneof("record_type") == kind)


def kinds(records: list[Record]) -> list[str]:
    """Return what each record is: run, history, config, summary, metric, artifact, files, stats, telemetry, exit,
    ..."""
    return [record.WhichOneof("record_type") for record in records]


def run_record(records: list[Record]) -> RunRecord:
    """Return the run's own record: run_id, project, display_name, tags, resumed, git, host, ..."""
    return next(_of(records, "run"))


def history(records: list[Record]) -> list[dict[str, Any]]:
    """Return the rows of run.log, `_step`, `_runtime` and `_timestamp` included."""
    return [_items(row.item) for row in _of(records, "history")]


def config(records: list[Record]) -> dict[str, Any]:
    """Return the config after all updates, without wandb's own `_wandb`."""
    merged: dict[str, Any] = {}
    for update in [*(run.config for run in _of(records, "run")), *_of(records, "config")]:
        merged |= _items(update.update)
        for item in update.remove:
            merged.pop(_path(item)[0], None)
    merged.pop("_wandb", None)
    return merged


def summary(records: list[Record]) -> dict[str, Any]:
    """Return the summary after all updates; wandb-core writes what it derives from the history as updates, too."""
    merged: dict[str, Any] = {}
    for update in _of(records, "summary"):
        merged |= _items(update.update)
        for item in update.remove:
            merged.pop(_path(item)[0], None)
    return merged


def metrics(records: list[Record]) -> dict[str, MetricRecord]:
    """Return define_metric's records by name or glob; `step_metric`, `summary` and `goal` are fields."""
    return {metric.name or metric.glob_name: metric for metric in _of(records, "metric")}


def artifacts(records: list[Record]) -> list[ArtifactRecord]:
    """Return the artifacts that were logged: name, type, manifest, aliases; a table has one of type `run_table`."""
    logged = [request.log_artifact.artifact for request in _of(records, "request") if request.HasField("log_artifact")]
    return [*_of(records, "artifact"), *logged]


def tables(records: list[Record]) -> dict[str, dict[str, Any]]:
    """Return what history says of each logged table, the latest by key: path below `files`, ncols, nrows, sha256."""
    rows = [item for row in history(records) for item in row.items()]
    return {key: value for key, value in rows if isinstance(value, dict) and value.get("_type") == "table-file"}


def stats(records: list[Record]) -> list[dict[str, Any]]:
    """Return the samples of the system's metrics."""
    return [_items(sample.item) for sample in _of(records, "stats")]


def output(records: list[Record]) -> str:
    """Return what console capture took."""
    return "".join(record.line for record in _of(records, "output_raw"))


def exit_code(records: list[Record]) -> int | None:
    """Return the exit code, or None where the run was never finished."""
    return next((record.exit_code for record in _of(records, "exit")), None)


def _items(items: Any) -> dict[str, Any]:
    """Return items as a dictionary; what has a path of keys lies in dictionaries of its own, {"a": {"b": 1}} for a,
    b."""
    found: dict[str, Any] = {}
    for item in items:
        *outer, last = _path(item)
        place = found
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = json.loads(item.value_json)
    return found


def _path(item: Any) -> list[str]:
    return [item.key] if item.key else list(item.nested_key)
