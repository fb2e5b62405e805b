"""The two hosts of the session, and the tables of what happened on them, printed at the end."""

from collections.abc import Callable, Iterator

import pytest

from tests.hosts.two_hosts import TwoHosts, two_hosts_or_skip

ROWS: list[tuple[str, str]] = []
LOSSES: dict[str, tuple[list[float], list[float]]] = {}
SHOWN_STEPS = (1, 2, 3, 4, 6, 8, 12, 20, 40, 60)

Record = Callable[[str, str], None]
RecordLosses = Callable[[str, list[float], list[float]], None]


@pytest.fixture(scope="session")
def both_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    """The two hosts; skips the test, with the reason, where they can't be made."""
    yield from two_hosts_or_skip(tmp_path_factory.mktemp("hosts"))


@pytest.fixture
def hosts(both_hosts: TwoHosts) -> Iterator[TwoHosts]:
    """The two hosts with nothing running on them and the network whole, before the test and after it."""
    yield both_hosts
    both_hosts.tidy()


@pytest.fixture
def record() -> Record:
    """Add a line to the table: what was done, and what happened."""
    return lambda done, happened: ROWS.append((done, happened))


@pytest.fixture
def record_losses() -> RecordLosses:
    """Add two columns to the table of losses: of a run on one host, and of the same on two."""

    def add(name: str, one: list[float], two: list[float]) -> None:
        LOSSES[name] = (one, two)

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the tables."""
    if LOSSES:
        terminalreporter.section("losses of two processes: on one host, on two hosts")
        print_losses(terminalreporter)
    if ROWS:
        terminalreporter.section("two hosts")
        width = max(len(done) for done, _ in ROWS)
        for done, happened in ROWS:
            terminalreporter.write_line(f"{done:<{width}}  {happened}")


def print_losses(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the losses side by side, three runs in a row, and below each the largest difference of all its steps."""
    names = list(LOSSES)
    for first in range(0, len(names), 3):
        pairs = {name: LOSSES[name] for name in names[first : first + 3]}
        terminalreporter.write_line("step  " + "  ".join(f"{name:^22}" for name in pairs))
        for step in SHOWN_STEPS:
            if step <= min(len(column) for pair in pairs.values() for column in pair):
                columns = [f"{one[step - 1]:>10.7f}  {two[step - 1]:<10.7f}" for one, two in pairs.values()]
                terminalreporter.write_line(f"{step:>4}  " + "  ".join(columns))
        apart = [max(abs(a - b) for a, b in zip(one, two, strict=False)) for one, two in pairs.values()]
        terminalreporter.write_line("apart " + "  ".join(f"{format(x, 'g'):^22}" for x in apart))
