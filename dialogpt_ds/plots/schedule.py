"""A picture of the learning rate over a run that is still to come."""

from pathlib import Path
from typing import Any

import numpy as np

from dialogpt_ds.config.schedule import ScheduleName, peak, rate
from dialogpt_ds.errors import UserError

POINTS = 2_000
"""Steps that are drawn of a long run; the peak is always among them."""


def save_schedule(name: ScheduleName, settings: dict[str, Any], output: Path) -> tuple[float, int]:
    """Draw a schedule; returns its highest rate, and the step of it.

    Args:
        name: of the schedule.
        settings: as schedule.rate takes them.
        output: picture to write; an earlier one is replaced.

    Raises:
        UserError: it can't be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    highest, at = peak(name, **settings)
    num_steps = int(settings["num_steps"])
    steps = np.unique(np.append(np.linspace(1, num_steps, min(POINTS, num_steps)).round().astype(np.int64), at))
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    panel.plot(steps, [rate(name, int(step), **settings) for step in steps], color="#2E5EAA")
    panel.plot([at], [highest], "o", color="#2E5EAA")
    panel.annotate(f"{highest:.3e} at step {at:,}", (at, highest), textcoords="offset points", xytext=(8, 4), fontsize=9)
    warmup = f", warm-up {settings['warmup_proportion']:.0%}" if name == "BERT" else f", warm-up {settings['warmup_steps']:,} steps"
    panel.set(
        title=f"{name}, learning_rate {settings['learning_rate']:g}{'' if name == 'None' else warmup}",
        xlabel="update (steps that are left out don't count)", ylabel="learning rate",
    )  # fmt: skip
    panel.set_ylim(0, highest * 1.12)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    panel.grid(color="#E3E3E3")
    panel.spines[["top", "right"]].set_visible(False)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output)
    except OSError as error:
        raise UserError(f"--plot_schedule {output}: can't be written ({error.strerror or error}); choose another place") from error
    return highest, at
