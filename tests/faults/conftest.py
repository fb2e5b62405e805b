"""The table of what was done to runs and what happened, printed at the end."""

from collections.abc import Callable

import pytest

ROWS: list[tuple[str, str]] = []

Record = Callable[[str, str], None]


@pytest.fixture
def record() -> Record:
    """Add a line to the table: what was done, and what happened."""
    return lambda done, happened: ROWS.append((done, happened))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table."""
    if not ROWS:
        return
    terminalreporter.section("faults")
    width = max(len(done) for done, _ in ROWS)
    for done, happened in ROWS:
        terminalreporter.write_line(f"{done:<{width}}  {happened}")
