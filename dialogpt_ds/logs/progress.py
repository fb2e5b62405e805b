"""Progress on a terminal as a bar, in a log file as plain lines."""

import os
import sys
import time
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Shows the step, loss, perplexity, real tokens per second and the time left; rank 0 only."""

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
                {"dynamic_ncols": True} if all(os.get_terminal_size(sys.stderr.fileno())) else {"ncols": 110, "nrows": 24}
            )
            self.bar = tqdm(total=num_steps, initial=done, unit="step", smoothing=0.05, **size)

    def show(self, step: int, loss: float, perplexity: float, tokens_per_second: float, rate: float) -> None:
        """Show one more step."""
        if self.bar is not None:
            self.bar.set_postfix_str(
                f"loss {loss:.4f}, ppl {perplexity:,.1f}, {tokens_per_second:,.0f} tok/s, lr {rate:.2e}", refresh=False
            )
            self.bar.update(step - self.bar.n)
            return
        now = time.monotonic()
        if not self.shown or (now - self.last_line < SECONDS_BETWEEN_LINES and step not in (self.first + 1, self.num_steps)):
            return
        self.last_line = now
        left = (now - self.started) / max(step - self.first, 1) * (self.num_steps - step)
        self.say(
            f"step {step:,}/{self.num_steps:,}  loss {loss:.4f}  ppl {perplexity:,.1f}  {tokens_per_second:,.0f} tok/s  "
            f"lr {rate:.2e}  {_clock(left)} left"
        )

    def say(self, line: str) -> None:
        """Print a line without breaking the bar."""
        if self.bar is not None:
            self.bar.write(line, file=sys.stdout)
        else:
            print(line, flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.close()


def _clock(seconds: float) -> str:
    """Return 1:02:03 or 02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"
