"""What is recorded at one moment of a run, and the places that take it."""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

Kind = Literal["step", "evaluation", "save"]


class Reply(NamedTuple):
    """What the model answered to a sample prompt."""

    prompt: str
    reply: str


@dataclass(frozen=True)
class LogRecord:
    """One dictionary, built once, that goes to every sink."""

    kind: Kind
    values: dict[str, Any]
    """Names of logs.metrics and `step`."""
    line: list[int | float] = field(default_factory=list)
    """Of train_log.txt or eval_log.txt."""
    text: str = ""
    """What a person is told, where it is more than the progress of steps."""
    replies: list[Reply] = field(default_factory=list)
    """To the sample prompts, with an evaluation."""


class Sink(Protocol):
    """A place that takes records. What it raises is reported once, and it gets no more."""

    name: str

    def take(self, record: LogRecord) -> None:
        """Take one record; must not wait for anything outside of this machine."""

    def close(self) -> None:
        """Finish what was taken."""
