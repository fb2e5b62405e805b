"""The endless stream of rows, cut into global batches: the same for any number of ranks."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dialogpt_ds.errors import UserError
from dialogpt_ds.order.position import OrderKey, Position
from dialogpt_ds.order.windows import EpochPlan, Window, WindowTokens
from dialogpt_ds.shards.reader import ShardDirectory


@dataclass(frozen=True, eq=False)
class Segment:
    """Consecutive rows of one window."""

    plan: EpochPlan
    number: int
    """The window's number in its epoch."""
    window: Window
    start: int
    stop: int

    def sum_of(self, per_row: np.ndarray) -> float:
        """Return the sum of a [rows] array over the segment's rows."""
        return float(per_row[self.start : self.stop].sum())


@dataclass(frozen=True, eq=False)
class GlobalBatch:
    """The rows of one optimizer step over all ranks, and what is true of them as a whole."""

    segments: list[Segment]
    position_after: Position
    """The next row after this batch."""

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return sum(segment.stop - segment.start for segment in self.segments)

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return int(sum(s.sum_of(s.window.row_tokens) for s in self.segments))

    @property
    def num_targets(self) -> int:
        """Target tokens."""
        return int(sum(s.sum_of(s.window.row_targets) for s in self.segments))

    @property
    def weight_sum(self) -> float:
        """Sum of the target tokens' weights: the denominator of the step's loss, known without communication."""
        return sum(s.sum_of(s.window.row_weight_sums) for s in self.segments)

    @property
    def num_examples(self) -> int:
        """Number of examples."""
        return int(sum(s.sum_of(s.window.row_examples) for s in self.segments))

    @property
    def epoch(self) -> int:
        """Epoch of the last row, from 0."""
        return self.segments[-1].plan.epoch

    @property
    def fractional_epoch(self) -> float:
        """Epochs done after this batch, counted in examples."""
        last = self.segments[-1]
        done = last.plan.examples_before(last.number) + int(last.window.row_examples[: last.stop].sum())
        return last.plan.epoch + done / last.plan.examples_before(last.plan.num_windows)

    def rows(self) -> Iterator[tuple[Segment, int]]:
        """Yield each row as its segment and its number in the window."""
        for segment in self.segments:
            for row in range(segment.start, segment.stop):
                yield segment, row


class RowStream:
    """Rows of a shard directory, epoch after epoch. A pure function of its key: any position can be entered at once."""

    def __init__(self, directory: ShardDirectory, key: OrderKey) -> None:
        self.directory = directory
        self.key = key
        self._plan: EpochPlan | None = None
        self._windows: dict[tuple[int, int], Window] = {}
        self._content: tuple[tuple[int, int], WindowTokens] | None = None

    def batch(self, position: Position, num_rows: int) -> GlobalBatch:
        """Return the `num_rows` rows from `position` on; they run on over windows and epochs."""
        segments = []
        while num_rows > 0:
            plan, window = self._window(position)
            stop = min(position.row + num_rows, window.num_rows)
            segments.append(Segment(plan, position.window, window, position.row, stop))
            num_rows -= stop - position.row
            position = self._advance(plan, window, position, stop)
        return GlobalBatch(segments, position)

    def check_size(self, global_rows: int, what: str) -> None:
        """Refuse a corpus with fewer rows than one global batch.

        Raises:
            UserError: names both numbers and the way out.
        """
        rows = 0
        plan = EpochPlan(self.directory, self.key, 0)
        for number in range(plan.num_windows):
            rows += plan.window(number).num_rows
            if rows >= global_rows:
                return
        raise UserError(
            f"{what} {str(self.directory.folder)!r} gives {rows:,} rows of {self.key.row_length} tokens, fewer than the "
            f"{global_rows:,} rows of one optimizer step over all ranks. Lower train_batch_size to at most {rows:,} rows in all, "
            "use fewer GPUs, or bring more data."
        )

    def content(self, segment: Segment) -> WindowTokens:
        """Return the tokens of the window that a segment lies in; the last one is kept."""
        place = (segment.plan.epoch, segment.number)
        if self._content is None or self._content[0] != place:
            self._content = (place, segment.plan.content(segment.window))
        return self._content[1]

    def _window(self, position: Position) -> tuple[EpochPlan, Window]:
        if self._plan is None or self._plan.epoch != position.epoch:
            self._plan = EpochPlan(self.directory, self.key, position.epoch)
        place = (position.epoch, position.window)
        if place not in self._windows:
            if len(self._windows) >= 2:
                self._windows.pop(next(iter(self._windows)))
            self._windows[place] = self._plan.window(position.window)
        return self._plan, self._windows[place]

    @staticmethod
    def _advance(plan: EpochPlan, window: Window, position: Position, stop: int) -> Position:
        """Return the position after row `stop` - 1; a place has one name, so the end of a window is the start of the next."""
        if stop < window.num_rows:
            return Position(position.epoch, position.window, stop)
        if position.window + 1 < plan.num_windows:
            return Position(position.epoch, position.window + 1, 0)
        return Position(position.epoch + 1, 0, 0)
