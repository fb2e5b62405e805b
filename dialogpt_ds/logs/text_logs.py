"""train_log.txt, eval_log.txt, metrics.jsonl, sample_replies.txt: flushed by line, cut back when a run goes on from a
checkpoint."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dialogpt_ds.files import replace_text
from dialogpt_ds.logs.record import LogRecord, Reply

TRAIN_LOG, EVAL_LOG, METRICS_FILE, REPLIES = "train_log.txt", "eval_log.txt", "metrics.jsonl", "sample_replies.txt"
TRAIN_HEADER = "epoch,global_step,step,mean_loss,mean_ppl,n_token_real,n_token_total,epoch_time"
EVAL_HEADER = "epoch,global_step,step,eval_loss,eval_ppl"
"""DialoGPT's headers."""


class LineFile:
    """A text file that grows by whole lines; opening it cuts it back to what came up to a step."""

    def __init__(self, path: Path, header: str | None, step_of: Callable[[str], int], resumed_step: int) -> None:
        kept = [header] if header else []
        if path.is_file() and resumed_step:
            # What stands behind the last line end is nothing, or a line that a crash has torn.
            for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
                if line and line != header and _step_or_none(step_of, line, resumed_step):
                    kept.append(line)
        replace_text(path, "".join(f"{line}\n" for line in kept))
        self._path = path
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed in close)
        self._waiting = b""

    def write(self, line: str) -> None:
        """Append a line; it is in the file when this returns, or waits for the next one where the disk takes none
        now."""
        first_failure = not self._waiting
        self._waiting += f"{line}\n".encode()
        try:
            self._write_waiting()
        except OSError as error:
            if first_failure:
                print(
                    f"warning: {self._path} can't be written now ({error.strerror}); its lines are kept until it can",
                    file=sys.stderr,
                )

    def _write_waiting(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def close(self) -> None:
        """Close the file; lines that no disk would take are lost, and said to be."""
        try:
            self._write_waiting()
        except OSError as error:
            count = self._waiting.count(b"\n")
            print(f"warning: the last {count:,} lines of {self._path} are lost: {error.strerror}", file=sys.stderr)
        self._file.close()


def _step_or_none(step_of: Callable[[str], int], line: str, last: int) -> bool:
    """Say whether a line belongs to a step up to `last`; one that can't be read belongs to none."""
    try:
        return step_of(line) <= last
    except (ValueError, KeyError, IndexError):
        return False


def _csv_step(line: str) -> int:
    return int(line.split(",")[1])


def _json_step(line: str) -> int:
    return int(json.loads(line)["step"])


def _reply_step(line: str) -> int:
    return int(line.split()[1].rstrip(":"))


def printable(text: str) -> str:
    """Return a text as one line, with what a terminal would take for a command written out: a model may say
    anything."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


class TextLogs:
    """The four files; rank 0 only."""

    name = "the log files"

    def __init__(self, folder: Path, resumed_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.train = LineFile(folder / TRAIN_LOG, TRAIN_HEADER, _csv_step, resumed_step)
        self.evaluation = LineFile(folder / EVAL_LOG, EVAL_HEADER, _csv_step, resumed_step)
        self.metrics = LineFile(folder / METRICS_FILE, None, _json_step, resumed_step)
        self.replies = LineFile(folder / REPLIES, None, _reply_step, resumed_step)

    def take(self, record: LogRecord) -> None:
        """Write a record's lines."""
        if record.kind == "step":
            self.train_line(record.line)
        elif record.kind == "evaluation":
            self.eval_line(record.line)
        self.metrics_line(record.values)
        for reply in record.replies:
            self.reply_line(record.values["step"], reply)

    def train_line(self, values: list[int | float]) -> None:
        """Append to train_log.txt, floats in full precision."""
        self.train.write(",".join(repr(value) for value in values))

    def eval_line(self, values: list[int | float]) -> None:
        """Append to eval_log.txt."""
        self.evaluation.write(",".join(repr(value) for value in values))

    def metrics_line(self, values: dict[str, Any]) -> None:
        """Append to metrics.jsonl; a number that JSON has no word for becomes null."""
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self.metrics.write(json.dumps(plain))

    def reply_line(self, step: int, reply: Reply) -> None:
        """Append a prompt and its reply to sample_replies.txt."""
        self.replies.write(f"step {step}: {printable(reply.prompt)} -> {printable(reply.reply)}")

    def close(self) -> None:
        """Close the files."""
        for file in (self.train, self.evaluation, self.metrics, self.replies):
            file.close()
