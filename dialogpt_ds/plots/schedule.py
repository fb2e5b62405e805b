"""A picture of the learning rate over a run that is still to come."""

from pathlib import Path

import numpy as np

from dialogpt_ds.config.schedule import Schedule
from dialogpt_ds.errors import UserError

POINTS = 2_000
"""Steps that are drawn of a long run; the peak is always among them."""


def save_schedule(schedule: Schedule, output: Path) -> tuple[float, int]:
    """Draw a schedule; returns its highest rate, and the step of it.

    Args:
        schedule: of the run.
        output: picture to write; an earlier one is replaced.

    Raises:
        UserError: it can't be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    highest, at = schedule.peak()
    num_steps = schedule.num_steps
    steps = np.unique(np.append(np.linspace(1, num_steps, min(POINTS, num_steps)).round().astype(np.int64), at))
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    panel.plot(steps, [schedule.rate(int(step)) for step in steps], color="#2E5EAA")
    panel.plot([at], [highest], "o", color="#2E5EAA")
    panel.annotate(
        f"{highest:.3e} at step {at:,}", (at, highest), textcoords="offset points", xytext=(8, 4), fontsize=9
    )
    panel.set(title=str(schedule), xlabel="update (steps that are skipped don't count)", ylabel="learning rate")
    panel.set_ylim(0, highest * 1.12)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    panel.grid(color="#E3E3E3")
    panel.spines[["top", "right"]].set_visible(False)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output)
    except OSError as error:
        raise UserError(
            f"--plot_schedule {output}: can't be written ({error.strerror or error}); choose another place"
        ) from error
    return highest, at
