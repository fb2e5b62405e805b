"""What a check has found, and how it is shown."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

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
    """Return texts, each once, with the hosts that they are true of in front; a host without a name is this machine alone."""
    hosts_of: dict[str, list[str]] = {}
    for host, text in found:
        hosts_of.setdefault(text, []).append(host)
    return [f"{some(hosts)}: {text}" if any(hosts) else text for text, hosts in hosts_of.items()]
