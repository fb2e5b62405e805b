"""The figure with the curves of training runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dialogpt_ds.errors import UserError
from dialogpt_ds.files import replace_file
from dialogpt_ds.plots.runs import EVERY_STEP_PARTS, OCCASIONAL_PARTS, OTHER, Run, Series, seconds_by_part

IMAGE_SUFFIXES = (".png", ".svg")
NUM_POINTS_TO_SMOOTH = 50
"""Curves with more points than this are smoothed, with the raw values pale behind."""
NUM_POINTS_TO_DRAW = 4000
"""More points than a screen has columns only make the file larger."""

# Runs differ in three ways at once, so that they can be told apart in greyscale too: 6 colours, 4 lines and 7 markers
# repeat together only after 84 runs. The colours are Okabe and Ito's for colour-blind readers, dark and light in turn.
_COLOURS = ("#0072B2", "#E69F00", "#1B1B1B", "#CC79A7", "#009E73", "#D55E00")
_LINES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_PART_LOOKS = (
    ("#08306B", ""),
    ("#2171B5", "//"),
    ("#6BAED6", ""),
    ("#C6DBEF", "\\\\"),
    ("#737373", ""),
    ("#BDBDBD", "xx"),
    ("#9E9AC8", ".."),
    ("#DEDEDE", ""),
)
_GREY = "#555555"
_RC = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.5,
    "figure.constrained_layout.w_pad": 0.12,
    "figure.constrained_layout.h_pad": 0.12,
    "svg.fonttype": "none",  # text stays text: it can be searched and read aloud
    "svg.hashsalt": "curves",  # the same runs give the same bytes
}


def require_matplotlib() -> None:
    """Check that figures can be drawn.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"curves are drawn by matplotlib, which cannot be imported ({error}); "
            "install the extra that brings it: pip install dialogpt-ds[demo]"
        ) from error


def checked_picture(text: str, what: str) -> Path:
    """Return where a picture, named by the option `what`, is to be written.

    Raises:
        UserError: its name does not end in a kind of picture, it is a folder, or matplotlib is not installed.
    """
    output = Path(text).expanduser()
    if output.suffix.lower() not in IMAGE_SUFFIXES:
        allowed = " or ".join(IMAGE_SUFFIXES)
        raise UserError(f"{what} {text!r}: the name must end in {allowed}, which says the kind of picture to write")
    if output.is_dir():
        raise UserError(f"{what} {text!r} is a folder, the name of a file is needed, e.g. {output / 'curves.png'}")
    require_matplotlib()
    return output


def save_curves(runs: list[Run], output: Path) -> None:
    """Draw the runs into `output`, a PNG or an SVG by its suffix, in one step."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kind = output.suffix.lower().removeprefix(".")
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(14, 7.5), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(2, 3).ravel()
        draws = (_draw_loss, _draw_perplexity, _draw_learning_rate, _draw_throughput, _draw_step_time)
        for draw, panel in zip(draws, panels, strict=False):
            draw(panel, runs)
        _draw_legend(panels[-1], runs)
        with replace_file(output) as file:
            figure.savefig(file, format=kind, metadata={"Date": None} if kind == "svg" else None)


def running_mean(values: np.ndarray) -> np.ndarray:
    """Return the mean over a centred window of a fiftieth of the points, at least 5 of them, without NaN and infinity.

    Towards both ends the window shrinks and stays centred, so that a steep start is not flattened.
    """
    num = len(values)
    half = max(2, num // 100)
    is_number = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(is_number, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(is_number)])
    place = np.arange(num)
    reach = np.minimum(half, np.minimum(place, num - 1 - place))
    first, end = place - reach, place + reach + 1
    with np.errstate(invalid="ignore"):
        return (sums[end] - sums[first]) / (counts[end] - counts[first])


def _draw_loss(panel: Any, runs: list[Run]) -> None:
    _label(panel, "Loss", "loss (nats per target token)")
    drawn = [_draw_train(panel, number, run.series["loss"]) for number, run in enumerate(runs)]
    drawn += [_draw_evaluations(panel, number, run.series["eval_loss"]) for number, run in enumerate(runs)]
    _say_if_empty(panel, drawn)


def _draw_perplexity(panel: Any, runs: list[Run]) -> None:
    _label(panel, "Perplexity", "perplexity (log scale)")
    drawn = [_draw_train(panel, number, run.series["ppl"], log=True) for number, run in enumerate(runs)]
    drawn += [_draw_evaluations(panel, number, run.series["eval_ppl"]) for number, run in enumerate(runs)]
    if any(drawn):
        _use_log_axis(panel)
    _say_if_empty(panel, drawn)


def _draw_learning_rate(panel: Any, runs: list[Run]) -> None:
    _label(panel, "Learning rate", "learning rate")
    drawn = [_draw_line(panel, number, run.series["lr"].finite()) for number, run in enumerate(runs)]
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    _start_at_zero(panel, drawn)


def _draw_throughput(panel: Any, runs: list[Run]) -> None:
    _label(panel, "Throughput", "real tokens per second")
    drawn = [_draw_train(panel, number, run.series["tokens_per_second"]) for number, run in enumerate(runs)]
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    _start_at_zero(panel, drawn)


def _draw_step_time(panel: Any, runs: list[Run]) -> None:
    """Draw a bar for each run, cut into the parts that its time went to."""
    _label(panel, "Where the time went", "", "share of the training time (%)")
    parts = (*EVERY_STEP_PARTS, *OCCASIONAL_PARTS, OTHER)
    seconds = [seconds_by_part(run) for run in runs]
    is_split = [set(run_seconds) - {OTHER} != set() and sum(run_seconds.values()) > 0 for run_seconds in seconds]
    if not any(is_split):
        _say_if_empty(panel, [])
        return
    size = min(8.0, 8 * 8 / len(runs))  # the text of 8 runs fills the panel
    for place, (run, run_seconds) in enumerate(zip(runs, seconds, strict=True)):
        title = run.name if is_split[place] else f"{run.name}: not logged"
        panel.text(0, place - 0.3, _shortened(title), va="bottom", fontsize=size, parse_math=False)
        if is_split[place]:
            _draw_bar(panel, place, [run_seconds.get(part, 0.0) for part in parts], size)
    for part, (colour, hatch) in zip(parts, _PART_LOOKS, strict=True):
        if any(part in run_seconds for run_seconds in seconds):
            panel.bar(0, 0, color=colour, hatch=hatch, edgecolor="white", label=part)
    panel.set(xlim=(0, 100), ylim=(len(runs) - 0.3, -0.8), yticks=[])
    panel.grid(visible=False, axis="y")
    panel.spines["left"].set_visible(False)
    panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4, frameon=False, fontsize=8)


def _draw_bar(panel: Any, place: int, seconds: list[float], size: float) -> None:
    shares = 100 * np.array(seconds) / sum(seconds)
    starts = np.cumsum(shares) - shares
    for share, start, (colour, hatch) in zip(shares, starts, _PART_LOOKS, strict=True):
        panel.barh(place, share, 0.5, left=start, color=colour, hatch=hatch, edgecolor="white", linewidth=0.8)
        if share >= 6:  # narrower ones have no room for a number
            box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.9}
            panel.text(start + share / 2, place, f"{share:.0f}", ha="center", va="center", fontsize=size, bbox=box)


def _draw_legend(panel: Any, runs: list[Run]) -> None:
    """Fill the last panel with the runs and with what the lines and the markers mean."""
    from matplotlib.lines import Line2D

    panel.axis("off")
    handles = [Line2D([], [], markersize=6, linewidth=1.8, **_look(number)) for number in range(len(runs))]
    columns = 1 if len(runs) <= 8 else 2
    # Matplotlib hides labels that start with "_" and sets "$...$" as formulas; a folder may be called either.
    legend = panel.legend(
        handles,
        [str(number) for number in range(len(runs))],
        loc="upper left",
        title="Runs",
        alignment="left",
        title_fontproperties={"weight": "bold"},
        frameon=False,
        fontsize=min(9, 9 * 16 / len(runs)),  # 16 names fill the panel
        handlelength=4.5,
        ncols=columns,
    )
    for text, run in zip(legend.get_texts(), runs, strict=True):
        text.set_parse_math(False)
        text.set_text(_shortened(run.name, 36 // columns))
    panel.add_artist(legend)
    kinds = [
        Line2D([], [], color=_GREY, linewidth=1.8, label="line: training"),
        Line2D([], [], color=_GREY, linewidth=0.8, marker="o", markersize=6, label="markers: evaluation"),
    ]
    if any(len(run.series["loss"].steps) > NUM_POINTS_TO_SMOOTH for run in runs):
        kinds[0].set_label("line: training, running mean")
        kinds.append(Line2D([], [], color=_GREY, linewidth=0.8, alpha=0.35, label="pale: training, every logged step"))
    panel.legend(handles=kinds, loc="lower left", frameon=False, handlelength=4.5, fontsize=8)


def _draw_train(panel: Any, number: int, series: Series, log: bool = False) -> bool:
    """Draw a training metric, smoothed where it has many points; `log` takes the mean of the logarithms."""
    if len(series.steps) <= NUM_POINTS_TO_SMOOTH:
        return _draw_line(panel, number, series)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.exp(running_mean(np.log(series.values))) if log else running_mean(series.values)
    raw = _thinned(series)
    panel.plot(raw.steps, raw.values, color=_look(number)["color"], linewidth=0.6, alpha=0.3, zorder=1.5)
    return _draw_line(panel, number, Series(series.steps, values))


def _draw_line(panel: Any, number: int, series: Series) -> bool:
    points = _thinned(series)
    marker = {"marker": _look(number)["marker"], "markersize": 4} if len(points.steps) == 1 else {"marker": ""}
    panel.plot(points.steps, points.values, linewidth=1.8, **(_look(number) | marker))
    return bool(np.isfinite(points.values).any())


def _draw_evaluations(panel: Any, number: int, series: Series) -> bool:
    points = series.finite()
    every = max(1, len(points.steps) // 20)
    look = _look(number) | {"linestyle": "-", "linewidth": 0.8, "markersize": 6, "markevery": every}
    panel.plot(points.steps, points.values, zorder=3, **look)
    return len(points.steps) > 0


def _look(number: int) -> dict[str, Any]:
    """Return colour, line and marker of a run."""
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "linestyle": _LINES[number % len(_LINES)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "markeredgecolor": "white",
        "markeredgewidth": 0.6,
    }


def _thinned(series: Series) -> Series:
    stride = max(1, len(series.steps) // NUM_POINTS_TO_DRAW)
    return Series(series.steps[::stride], np.where(np.isfinite(series.values), series.values, np.nan)[::stride])


def _label(panel: Any, title: str, unit: str, below: str = "optimizer step") -> None:
    from matplotlib.ticker import MaxNLocator

    panel.set(title=title, xlabel=below, ylabel=unit)
    panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _start_at_zero(panel: Any, drawn: list[bool]) -> None:
    if any(drawn):
        panel.set_ylim(0, 1.05 * panel.get_ylim()[1])
    _say_if_empty(panel, drawn)


def _say_if_empty(panel: Any, drawn: list[bool]) -> None:
    if not any(drawn):
        panel.grid(visible=False)
        panel.set(xticks=[], yticks=[])
        panel.text(0.5, 0.5, "not logged", transform=panel.transAxes, ha="center", va="center", color=_GREY)


def _use_log_axis(panel: Any) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    panel.set_yscale("log")
    low, high = panel.get_ylim()
    plain: Callable[[float, Any], str] = lambda value, _: f"{value:,.10g}"  # noqa: E731
    # Less than a decade may hold no more than one of 1, 2 and 5.
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 10 * low else MaxNLocator(6))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(plain)


def _shortened(name: str, length: int = 48) -> str:
    """Keep the end of a long name: it is where names of runs differ."""
    return name if len(name) <= length else f"…{name[1 - length :]}"
