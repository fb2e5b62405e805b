"""Progress: a bar on a real terminal, plain lines elsewhere."""

import os
import pty
import subprocess
import sys

import pytest

from dialogpt_ds.logs.progress import Progress, _clock
from tests.conftest import ROOT

SCRIPT = """
from dialogpt_ds.logs.progress import Progress
progress = Progress(3, 0, shown=True)
for step in (1, 2, 3):
    progress.show(step, loss=2.0, perplexity=7.389, tokens_per_second=1234.5, rate=1e-3)
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
    assert "loss 2.0000, ppl 7.4, 1,2" in text
    assert "said 2" in text


def test_a_log_file_gets_plain_lines_with_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(100, 10, shown=True)
    for step in range(11, 101):
        progress.show(step, 2.0, 7.389, 1234.5, 1e-3)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["11/100", "100/100"], "the first, the last, and one every ten seconds"
    assert "loss 2.0000  ppl 7.4  1,234 tok/s  lr 1.00e-03" in lines[0]
    assert lines[1].endswith("00:00 left")


def test_a_clock() -> None:
    assert (_clock(59.6), _clock(3_723)) == ("01:00", "1:02:03")
