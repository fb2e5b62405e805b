"""Progress on a terminal as a bar, in a log file as plain lines."""

import os
import sys
import time
from typing import Any

from tqdm import tqdm

from dialogpt_ds.logs.record import LogRecord
from dialogpt_ds.redaction import without_secrets

SECONDS_BETWEEN_LINES = 10.0
LATER, SECONDS_BETWEEN_LATER_LINES = 600.0, 60.0
"""After so many seconds lines come less often: a week is 10,000 of them."""
BAR = "{percentage:3.0f}%|{bar:10}| {n:,}/{total:,} [{elapsed}, {rate_fmt}{postfix}]"
"""tqdm's own estimate of the time left does not know of evaluations and saves."""


class Progress:
    """Shows the step, loss, perplexity, real tokens per second and the time left; rank 0 only."""

    name = "the terminal"

    def __init__(self, num_steps: int, done: int, shown: bool) -> None:
        self.num_steps = num_steps
        self.shown = shown
        self.terminal = shown and sys.stderr.isatty()
        self.started, self.first = time.monotonic(), done
        self.last_line = 0.0
        self.bar: tqdm[Any] | None = None
        if self.terminal:
            # A terminal that doesn't know its size (a container's, often) would make tqdm hide the bar.
            size: dict[str, Any] = (
                {"dynamic_ncols": True}
                if all(os.get_terminal_size(sys.stderr.fileno()))
                else {"ncols": 110, "nrows": 24}
            )
            self.bar = tqdm(total=num_steps, initial=done, unit="step", bar_format=BAR, **size)

    def seconds_left(self, step: int) -> float:
        """Return an estimate of the time to the last step, from this process's steps so far with all that came between
        them."""
        return (time.monotonic() - self.started) / max(step - self.first, 1) * (self.num_steps - step)

    def take(self, record: LogRecord) -> None:
        """Show one more step, or say what there is to say."""
        if record.kind == "step":
            self._show(record.values)
        if record.text:
            self.say(record.text)

    def _show(self, values: dict[str, Any]) -> None:
        step = values["step"]
        figures = (
            f"loss {values['loss']:.4f}",
            f"ppl {values['ppl']:,.1f}",
            f"{clock(values['seconds_left'])} left",  # a narrow terminal cuts what comes last
            f"{values['tokens_per_second']:,.0f} tok/s",
            f"lr {values['lr']:.2e}",
        )
        if self.bar is not None:
            self.bar.set_postfix_str("  ".join(figures), refresh=False)
            self.bar.update(step - self.bar.n)
            return
        now = time.monotonic()
        between = SECONDS_BETWEEN_LINES if now - self.started < LATER else SECONDS_BETWEEN_LATER_LINES
        if not self.shown or (now - self.last_line < between and step not in (self.first + 1, self.num_steps)):
            return
        self.last_line = now
        self.say("  ".join((f"step {step:,}/{self.num_steps:,}", *figures)))

    def say(self, line: str) -> None:
        """Print a line without breaking the bar."""
        line = without_secrets(line)
        if self.bar is not None:
            self.bar.write(line, file=sys.stdout)
        else:
            print(line, flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def clock(seconds: float) -> str:
    """Return 1:02:03 or 02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"
