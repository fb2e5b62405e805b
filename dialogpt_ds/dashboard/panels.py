"""What is on the dashboard, as plain data: sections of panels, a panel's metrics share a unit and so an axis."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from dialogpt_ds.logs.metrics import METRICS, REPLIES_TABLE, SECTIONS, SOURCE_EPOCHS, Section, metric_of


@dataclass(frozen=True)
class Panel:
    """Curves over the optimizer step."""

    title: str
    metrics: tuple[str, ...]
    axis: Literal["linear", "log"] = "linear"
    smoothing: float = 0.0
    """0 to 1: weight of what came before; 0 draws the values alone."""
    pattern: str = ""
    """Regular expression (RE2) of the metrics where their number is the run's; it matches `metrics`, too."""

    @property
    def unit(self) -> str:
        """Unit of all the panel's metrics, "no unit" for a number."""
        return METRICS[self.metrics[0]].unit or "no unit"

    @property
    def axis_title(self) -> str:
        """What stands beside the vertical axis."""
        return f"{self.unit}, log scale" if self.axis == "log" else self.unit


@dataclass(frozen=True)
class DashboardSection:
    """Panels under one heading."""

    name: Section
    panels: tuple[Panel, ...]
    columns: int = 3
    """Panels in a row."""
    table: str = ""
    """Key of a table that is shown after the panels; its last version of each run."""


COMPARED = {"Evaluation loss by turn": Panel("Training and evaluation loss", ("loss", "eval_loss"))}
"""Panels of metrics that have one of their own as well, by the title of the panel that they follow."""


def _panels_of(section: Section) -> Iterator[Panel]:
    """Yield what METRICS says of a section's panels, each where its first metric stands."""
    drawn = {name: metric for name, metric in METRICS.items() if metric.section == section and metric.panel}
    for title in dict.fromkeys(metric.panel for metric in drawn.values()):
        names = tuple(name for name, metric in drawn.items() if metric.panel == title)
        first = METRICS[names[0]]
        pattern = f"^(epoch|{SOURCE_EPOCHS}[0-9]+)$" if "epoch" in names else ""
        yield Panel(title, names, "log" if first.log else "linear", first.smoothing, pattern)
        if title in COMPARED:
            yield COMPARED[title]


DASHBOARD = tuple(
    DashboardSection(name, tuple(_panels_of(name)), columns=2, table=REPLIES_TABLE)
    if name == "Evaluation"
    else DashboardSection(name, tuple(_panels_of(name)))
    for name in SECTIONS
)
"""Everything on the dashboard, from its top to its bottom."""
WITHOUT_PANEL = {name: metric.why_none for name, metric in METRICS.items() if not metric.panel}
"""Metrics without a panel, and why."""
CONFIG_COLUMNS = (
    "model_name_or_path", "num_parameters", "learning_rate", "rows_per_step", "zero_stage", "precision",
    "machine.processes",
)  # fmt: skip
"""Configuration beside each run, by its path in what wandb shows as the run's config; empty where a run says nothing of
it."""
SUMMARY_COLUMNS = ("loss", "best_eval_ppl", "best_eval_step", "tokens_per_second")
"""Metrics beside each run, with their last values."""


def dashboard_text() -> str:
    """Return sections, panels and metrics with their units, to be read by a person."""
    lines: list[str] = []
    for section in DASHBOARD:
        lines += [section.name]
        for panel in section.panels:
            lines += [f"  {panel.title} [{panel.axis_title}]", *(_metric_line(name) for name in panel.metrics)]
            if panel.pattern:
                lines.append(f"    and what matches {panel.pattern}")
        if section.table:
            lines.append(f"  Table {section.table}, as the last evaluation wrote it")
    columns = [f"  {name} (config)" for name in CONFIG_COLUMNS] + [f"  {name}, last value" for name in SUMMARY_COLUMNS]
    left_out = [f"  {name}: {why}" for name, why in WITHOUT_PANEL.items()]
    return "\n".join([*lines, "Columns beside the runs", *columns, "Without a panel", *left_out])


def _metric_line(name: str) -> str:
    metric = metric_of(name)
    assert metric is not None, name
    return f"    {name} [{metric.unit or 'no unit'}]: {metric.meaning}"
