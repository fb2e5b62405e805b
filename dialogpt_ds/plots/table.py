"""The table that compares training runs."""

import numpy as np

from dialogpt_ds.plots.runs import Run, Series, seconds_by_part

TABLE_COLUMNS = (
    "run",
    "steps",
    "last loss",
    "best eval ppl",
    "at step",
    "last eval ppl",
    "median tokens/s",
    "median MFU",
    "hours",
)
MISSING = "-"


def comparison_table(runs: list[Run]) -> str:
    """Return a plain text table, one line per run, with `-` for what was not logged.

    Hours are those of the logged steps, saving and evaluation included; start-up and lost work are not in them.
    """
    rows = [TABLE_COLUMNS, *(_row(run) for run in runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(TABLE_COLUMNS))]
    lines = []
    for row in rows:
        numbers = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *numbers]))
    return "\n".join(lines)


def _row(run: Run) -> tuple[str, ...]:
    perplexity = run.series["eval_ppl"].finite()
    best, best_step = MISSING, MISSING
    if len(perplexity.steps):
        place = int(np.argmin(perplexity.values))
        best, best_step = f"{perplexity.values[place]:.2f}", str(perplexity.steps[place])
    speed, mfu = (run.series[name].finite().values for name in ("tokens_per_second", "mfu"))
    seconds = seconds_by_part(run)
    return (
        run.name,
        str(run.last_step),
        _last(run.series["loss"], ".4f"),
        best,
        best_step,
        _last(run.series["eval_ppl"], ".2f"),
        f"{np.median(speed):.0f}" if len(speed) else MISSING,
        f"{np.median(mfu):.1%}" if len(mfu) else MISSING,
        f"{sum(seconds.values()) / 3600:.3f}" if seconds else MISSING,
    )


def _last(series: Series, form: str) -> str:
    return format(series.values[-1], form) if len(series.values) else MISSING
