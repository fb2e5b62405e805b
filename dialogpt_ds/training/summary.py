"""What came of a run, in one table at its end: the figures, and where everything is."""

import time
from pathlib import Path

from dialogpt_ds.logs.progress import clock
from dialogpt_ds.logs.text_logs import METRICS, REPLIES, TRAIN_LOG
from dialogpt_ds.training.settings import Settings
from dialogpt_ds.training.state import ProgressState, perplexity


class RunClock:
    """How much this process has done since it started."""

    def __init__(self, state: ProgressState) -> None:
        self._started = time.monotonic()
        self._first_step, self._first_tokens = state.global_step, state.tokens_seen

    def line(self, state: ProgressState) -> str:
        """Return steps, time and speed of this process."""
        seconds = time.monotonic() - self._started
        steps, tokens = state.global_step - self._first_step, state.tokens_seen - self._first_tokens
        speed = tokens / max(seconds, 1e-9)
        return f"{clock(seconds)} for {steps:,} steps: {speed:,.0f} tokens/s, evaluations and saves included"


def end_summary(settings: Settings, state: ProgressState, time_line: str, warnings: dict[str, int], places: dict[str, Path]) -> str:
    """Return the table.

    Args:
        settings: of the run.
        state: at its end.
        time_line: from RunClock.
        warnings: name -> count of what went wrong without ending the run; those of 0 are left out.
        places: model and checkpoint: where they are.
    """
    rows = [
        (
            "done",
            f"{state.global_step:,} steps, {state.tokens_seen:,} tokens ({state.targets_seen:,} targets), {state.rows_seen:,} rows",
        ),
        ("time", time_line),
    ]
    if state.best_eval_loss is not None:
        best = perplexity(state.best_eval_loss)
        rows.append(("best", f"loss {state.best_eval_loss:.4f}, perplexity {best:,.2f} at step {state.best_step:,}"))
    found = [f"{count:,} {name}" for name, count in warnings.items() if count]
    if found:
        rows.append(("warnings", ", ".join(found)))
    logs = settings.log_dir
    files = f"{TRAIN_LOG}, {METRICS}" + (f", {REPLIES}" if settings.evaluation is not None else "")
    rows += [
        *((name, str(path)) for name, path in places.items()),
        ("logs", f"{logs} ({files})"),
        ("curves", f"python launch/plot.py {logs} --output curves.png"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
