"""What is on the dashboard, as plain data: sections of panels, a panel's metrics share a unit and so an axis."""

from dataclasses import dataclass
from typing import Literal

from dialogpt_ds.logs.metrics import METRICS, REPLIES_TABLE, SECTIONS, SOURCE_EPOCHS, Section, metric_of
from dialogpt_ds.order.batches import TURN_GROUPS

NOISY = 0.9
"""Smoothing for what jumps from step to step: the weight of what came before in an exponential mean; the raw curve stays behind it."""


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


def _by_turn(metric: str) -> tuple[str, ...]:
    return tuple(f"{metric}_{group}" for group in TURN_GROUPS)


_PANELS: dict[Section, tuple[Panel, ...]] = {
    "Training": (
        Panel("Loss", ("loss",), smoothing=NOISY),
        Panel("Perplexity", ("ppl",), axis="log", smoothing=NOISY),
        Panel("Loss by turn", _by_turn("loss"), smoothing=NOISY),
        Panel("Learning rate", ("lr",)),
    ),
    "Throughput": (
        Panel("Tokens per second", ("tokens_per_second", "target_tokens_per_second"), smoothing=NOISY),
        Panel("Share of the devices' peak (MFU)", ("mfu",), smoothing=NOISY),
        Panel("Share of the step spent waiting for data", ("data_wait_share",), smoothing=NOISY),
        Panel(
            "Seconds of a step and its parts",
            ("seconds_per_step", "seconds_data", "seconds_forward", "seconds_backward", "seconds_optimizer"),
            smoothing=NOISY,
        ),
        Panel("Memory", ("gpu_memory_gib", "gpu_reserved_gib", "peak_memory_gib", "host_memory_gib")),
        Panel("Full memory", ("gpu_alloc_retries",)),
        Panel("Time left", ("seconds_left",)),
    ),
    "Stability": (
        Panel("Gradient norm before clipping", ("grad_norm",), axis="log", smoothing=NOISY),
        Panel("Loss scale (fp16)", ("loss_scale",), axis="log"),
        Panel("Skipped steps and loss spikes so far", ("skipped_steps", "loss_spikes")),
        Panel("Seconds of a checkpoint", ("seconds_save",)),
        Panel("Share of the time spent saving", ("save_share",)),
        Panel("Checkpoints that could not be written", ("failed_saves",)),
    ),
    "Data": (
        Panel("Epochs, and those of each source of a mixture", ("epoch",), pattern=f"^(epoch|{SOURCE_EPOCHS}[0-9]+)$"),
        Panel("Tokens trained on", ("tokens_seen", "targets_seen")),
        Panel("Rows trained on", ("rows_seen",)),
        Panel("Padding", ("padding_share",), smoothing=NOISY),
        Panel("Unreadable blocks that were left out", ("skipped_blocks",)),
        Panel("Examples in unreadable blocks", ("skipped_examples",)),
    ),
    "Evaluation": (
        Panel("Evaluation loss", ("eval_loss", "best_eval_loss")),
        Panel("Evaluation perplexity", ("eval_ppl", "best_eval_ppl"), axis="log"),
        Panel("Evaluation loss by turn", _by_turn("eval_loss")),
        Panel("Training and evaluation loss", ("loss", "eval_loss")),
        Panel("Seconds of evaluation and sample replies", ("seconds_evaluation", "seconds_replies")),
    ),
}
DASHBOARD = tuple(
    DashboardSection(name, _PANELS[name], columns=2, table=REPLIES_TABLE)
    if name == "Evaluation"
    else DashboardSection(name, _PANELS[name])
    for name in SECTIONS
)
"""Everything on the dashboard, from its top to its bottom."""
WITHOUT_PANEL = {
    "best_eval_step": "a step and no curve: a column beside the runs",
    "eval_targets": "the same at every evaluation of a data set",
}
"""Metrics without a panel, and why."""
CONFIG_COLUMNS = (
    *("model_name_or_path", "num_parameters", "learning_rate", "rows_per_step", "zero_stage", "precision", "machine.processes"),
)
"""Configuration beside each run, by its path in what wandb shows as the run's config; empty where a run says nothing of it."""
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
