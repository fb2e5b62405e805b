"""The doctor's report: a line for each finding as it comes, and the counts."""

import sys
from collections.abc import Callable, Iterable
from typing import TextIO, TypeVar

from dialogpt_ds.doctor.finding import Finding, Level, warning
from dialogpt_ds.doctor.tasks import Clock, LateError, Task
from dialogpt_ds.redaction import without_secrets

_Result = TypeVar("_Result")


class Report:
    """Prints findings, each once, and counts them."""

    def __init__(self, clock: Clock, stream: TextIO | None = None) -> None:
        self.clock = clock
        self._stream = stream or sys.stdout
        self._colour = self._stream.isatty()
        self._seen: set[str] = set()
        self._counts: dict[Level, int] = {"ok": 0, "warning": 0, "problem": 0}

    @property
    def num_problems(self) -> int:
        """Problems so far."""
        return self._counts["problem"]

    def add(self, findings: Iterable[Finding]) -> None:
        """Print findings; one that two checks have come to is said once."""
        for finding in findings:
            if finding.level != "ok" and finding.text in self._seen:
                continue
            self._seen.add(finding.text)
            self._counts[finding.level] += 1
            self.say(str(without_secrets("\n".join(finding.lines(self._colour)))))

    def say(self, line: str) -> None:
        """Print a line that is no finding."""
        print(line, file=self._stream, flush=True)

    def check(self, name: str, work: Callable[[], Iterable[Finding]], seconds: float = 10.0) -> None:
        """Run a check and print what it finds; one that crashes or takes too long is a warning."""
        found = self.result(name, Task(work), seconds)
        self.add(found or ())

    def result(self, name: str, task: Task[_Result], seconds: float) -> _Result | None:
        """Return the result of a task; None, and a warning, where it crashes or takes too long."""
        limit = self.clock.share(seconds)
        try:
            return task.result(limit)
        except LateError:
            self.add([warning(name, f"this check was not done after {limit:g} s, and is left out")])
            return None
        except Exception as error:
            text = f"this check could not be made: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            self.add([warning(name, text)])
            return None

    def closing_line(self) -> str:
        """Return the counts, and what they mean."""
        counts, spent = self._counts, self.clock.spent
        many = {level: f"{number} {level}{'s' * (number != 1)}" for level, number in counts.items()}
        meaning = "training would fail" if counts["problem"] else "nothing found that would keep it from training"
        return f"doctor: {counts['ok']} ok, {many['warning']}, {many['problem']} in {spent:.0f} s: {meaning}"
