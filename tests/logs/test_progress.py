"""Progress: a bar on a real terminal, plain lines elsewhere."""

import os
import pty
import subprocess
import sys
import time

import pytest

from dialogpt_ds.logs.progress import Progress, clock
from dialogpt_ds.logs.record import LogRecord
from tests.conftest import ROOT

SCRIPT = """
from dialogpt_ds.logs.progress import Progress
from dialogpt_ds.logs.record import LogRecord
progress = Progress(3, 0, shown=True)
for step in (1, 2, 3):
    values = dict(step=step, loss=2.0, ppl=7.389, tokens_per_second=1234.5, lr=1e-3, seconds_left=61.0)
    progress.take(LogRecord("step", values))
    progress.say(f"said {step}")
progress.close()
"""


@pytest.mark.parametrize("size", [(0, 0), (40, 150)])
def test_a_terminal_shows_a_bar_even_when_it_does_not_know_its_size(size: tuple[int, int]) -> None:
    import fcntl
    import struct
    import termios

    mine, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    with subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=theirs, stderr=theirs, cwd=ROOT) as process:
        os.close(theirs)
        seen = b""
        try:
            while part := os.read(mine, 4096):
                seen += part
        except OSError:
            pass  # Linux reports the end of a pseudo-terminal as an error
        assert process.wait(timeout=30) == 0
    os.close(mine)
    text = seen.decode()
    assert "3/3" in text
    assert "loss 2.0000  ppl 7.4  01:01 left  1,2" in text
    assert "said 2" in text


def step(number: int, left: float = 0.0) -> LogRecord:
    """Return the record of a step."""
    return LogRecord(
        "step",
        {"step": number, "loss": 2.0, "ppl": 7.389, "tokens_per_second": 1234.5, "lr": 1e-3, "seconds_left": left},
    )


def test_a_log_file_gets_plain_lines_with_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(100, 10, shown=True)
    for number in range(11, 101):
        progress.take(step(number, left=3_723.0))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["11/100", "100/100"], (
        "the first, the last, and one every ten seconds"
    )
    assert lines[0] == "step 11/100  loss 2.0000  ppl 7.4  1:02:03 left  1,234 tok/s  lr 1.00e-03"


def test_lines_come_less_often_after_ten_minutes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1_000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress(100_000, 0, shown=True)
    for number in range(1, 1_801):
        now[0] += 1.0
        progress.take(step(number))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 59 + 20, "the first, then one in 10 s up to 600 s, then one in 60 s up to 1,800 s"


def test_the_time_left_counts_what_came_between_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress(100, 50, shown=False)
    now[0] = 30.0  # 10 steps, and an evaluation
    assert progress.seconds_left(60) == 120.0


def test_a_clock() -> None:
    assert (clock(59.6), clock(3_723)) == ("01:00", "1:02:03")
