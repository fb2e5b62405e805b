"""TensorBoard's event files, for those who want them."""

import math
from pathlib import Path
from typing import Any

from dialogpt_ds.errors import UserError
from dialogpt_ds.logs.metrics import STEP, metric_of
from dialogpt_ds.logs.record import LogRecord

TENSORBOARD_FOLDER = "tensorboard"


def require_tensorboard() -> None:
    """Check that event files can be written; raises UserError where the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--tensorboard writes with the package tensorboard, which can't be imported ({error}): pip install "
            f"tensorboard, or "
            'pip install "dialogpt-ds[tensorboard]"'
        ) from error


class TensorBoard:
    """Event files in `log_dir`/tensorboard, one more for each start of the run; rank 0 only."""

    name = "TensorBoard"

    def __init__(self, log_dir: Path, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What was logged after the checkpoint that the run goes on from is taken back.
        self._writer: Any = SummaryWriter(str(log_dir / TENSORBOARD_FOLDER), purge_step=resumed_step + 1)

    def take(self, record: LogRecord) -> None:
        """Add a row's numbers under Section/name, and the replies as text."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        step = record.values[STEP]
        row = []
        for name, value in record.values.items():
            metric = metric_of(name)
            if metric is not None and isinstance(value, int | float) and math.isfinite(value):
                row.append(Summary.Value(tag=f"{metric.section}/{name}", simple_value=value))
        self._writer.file_writer.add_summary(Summary(value=row), step)  # add_scalar for each takes ten times as long
        if record.replies:
            table = ["| prompt | reply |", "| --- | --- |"]
            table += [f"| {_cell(prompt)} | {_cell(reply)} |" for prompt, reply in record.replies]
            self._writer.add_text("Evaluation/replies", "\n".join(table), step)

    def close(self) -> None:
        """Write out what is still held."""
        self._writer.close()


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
