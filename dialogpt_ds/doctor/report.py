"""The doctor's report: what checks have found, a line for each as it comes, and the counts."""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, TextIO, TypeVar

from dialogpt_ds.doctor.tasks import Clock, LateError, Task
from dialogpt_ds.launching.machine_checks import Trouble
from dialogpt_ds.redaction import without_secrets

_Result = TypeVar("_Result")
Level = Literal["ok", "warning", "problem"]
COLOURS: dict[Level, str] = {"ok": "32", "warning": "33", "problem": "1;31"}
"""SGR codes of ECMA-48: green, yellow, bold red."""
LEVEL_WIDTH, CHECK_WIDTH = 8, 12
HOSTS_SHOWN = 4
"""More hosts than these with the same finding are counted."""


@dataclass(frozen=True)
class Finding:
    """A line of the report."""

    level: Level
    check: str
    text: str
    """What was found; further lines are shown below it."""
    way_out: str = ""
    """What to do, where the text does not say it."""

    def lines(self, colour: bool) -> list[str]:
        """Return the finding as it is printed."""
        level = f"{self.level:<{LEVEL_WIDTH}}"
        if colour:
            level = f"\x1b[{COLOURS[self.level]}m{level}\x1b[0m"
        first, *rest = self.text.splitlines() or [""]
        if self.way_out:
            rest.append(f"way out: {self.way_out}")
        indent = " " * (LEVEL_WIDTH + CHECK_WIDTH + 2)
        return [f"{level} {self.check:<{CHECK_WIDTH}} {first}", *(indent + line for line in rest)]


def ok(check: str, text: str) -> Finding:
    """Return a line for what is as it should be."""
    return Finding("ok", check, text)


def warning(check: str, text: str, way_out: str = "") -> Finding:
    """Return a line for what may go wrong, or be slow."""
    return Finding("warning", check, text, way_out)


def problem(check: str, text: str, way_out: str = "") -> Finding:
    """Return a line for what would make training fail."""
    return Finding("problem", check, text, way_out)


def some(names: Iterable[str]) -> str:
    """Return names in a row; of many the first few, and how many more there are."""
    names = list(names)
    shown = ", ".join(names[:HOSTS_SHOWN])
    more = len(names) - HOSTS_SHOWN
    return f"{shown} and {more:,} more" if more > 0 else shown


def by_host(found: Iterable[tuple[str, str]]) -> list[str]:
    """Return texts, each once, with the hosts that they are true of in front; a host without a name is this machine
    alone."""
    hosts_of: dict[str, list[str]] = {}
    for host, text in found:
        hosts_of.setdefault(text, []).append(host)
    return [_with_hosts(hosts, text) for text, hosts in hosts_of.items()]


def of_machines(check: str, found: Iterable[tuple[str, Trouble]]) -> list[Finding]:
    """Return machines' troubles as lines, each once with its hosts in front; problems first."""
    hosts_of: dict[Trouble, list[str]] = {}
    for host, trouble in found:
        hosts_of.setdefault(trouble, []).append(host)
    lines = [
        Finding("problem" if trouble.fatal else "warning", check, _with_hosts(hosts, trouble.text), trouble.way_out)
        for trouble, hosts in hosts_of.items()
    ]
    return sorted(lines, key=lambda line: line.level != "problem")


def _with_hosts(hosts: list[str], text: str) -> str:
    return f"{some(hosts)}: {text}" if any(hosts) else text


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
