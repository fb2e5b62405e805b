"""The endless stream of rows of one shard directory, cut into batches: the same for any number of ranks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dialogpt_ds.errors import RunError, UserError
from dialogpt_ds.order.position import OrderKey, Position, SkippedBlock
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

    def content(self) -> WindowTokens:
        """Return the tokens of the window that the segment lies in; raises BadBlocksError."""
        return self.plan.content(self.number, self.window)


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows that follow each other in training, and what is true of them as a whole."""

    segments: list[Segment]
    segment_of: np.ndarray
    """[rows] which of `segments` each row lies in."""
    number_of: np.ndarray
    """[rows] each row's number in its window."""

    @classmethod
    def of(cls, segments: list[Segment]) -> "Rows":
        """Take the rows of segments, one segment behind the other."""
        sizes = [segment.stop - segment.start for segment in segments]
        numbers = [np.arange(segment.start, segment.stop) for segment in segments]
        return cls(segments, np.repeat(np.arange(len(segments)), sizes), np.concatenate(numbers))

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.number_of)

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

    def __iter__(self) -> Iterator[tuple[Segment, int]]:
        """Yield each row as its segment and its number in the window."""
        for segment, number in zip(self.segment_of, self.number_of, strict=True):
            yield self.segments[segment], int(number)


class RowStream:
    """Rows of a shard directory, epoch after epoch. A pure function of its key and what is skipped: any position can be
    entered at once."""

    def __init__(
        self, directory: ShardDirectory, key: OrderKey, skipped: Sequence[SkippedBlock] = (), source: int = 0
    ) -> None:
        self.directory = directory
        self.key = key
        self.skipped = list(skipped)
        self.source = source
        self._plan: EpochPlan | None = None
        self._windows: dict[tuple[int, int], Window] = {}
        self._counts: dict[tuple[int, int], int] = {}

    @property
    def num_examples(self) -> int:
        """Examples of an epoch."""
        return self.directory.manifest.totals["examples"]

    def rows(self, position: Position, num_rows: int) -> tuple[Rows, Position]:
        """Return the `num_rows` rows from `position` on, and the position after them; rows run on over windows and
        epochs.

        Raises:
            BadBlocksError: blocks whose small members can't be read.
            RunError: nothing is left of the directory.
        """
        segments = []
        started = position.epoch
        while num_rows > 0:
            plan, window = self._window(position)
            stop = min(position.row + num_rows, window.num_rows)
            if stop > position.row:
                segments.append(Segment(plan, position.window, window, position.row, stop))
                num_rows -= stop - position.row
                started = position.epoch
            elif position.epoch > started + 1:
                raise RunError(self._nothing_left())
            position = self._advance(plan, window.num_rows, position, max(stop, position.row))
        return Rows.of(segments), position

    def skip(self, position: Position, num_rows: int) -> Position:
        """Return the position after `num_rows` rows, for less than their plan; raises as `rows` does."""
        started = position.epoch
        while num_rows > 0:
            plan, rows = self._epoch(position.epoch), self._count(position)
            taken = min(num_rows, max(rows - position.row, 0))
            num_rows -= taken
            if taken:
                started = position.epoch
            elif position.epoch > started + 1:
                raise RunError(self._nothing_left())
            position = self._advance(plan, rows, position, position.row + taken)
        return position

    def whole_window(self, epoch: int, number: int) -> Rows:
        """Return all rows of a window; raises BadBlocksError."""
        plan, window = self._window(Position(epoch, number))
        return Rows.of([Segment(plan, number, window, 0, window.num_rows)])

    def window_rows(self, epoch: int, window: int) -> int:
        """Return the number of rows of a window; raises BadBlocksError."""
        return self._count(Position(epoch, window))

    def num_windows(self) -> int:
        """Return the number of windows of an epoch."""
        return -(-self.directory.num_blocks // self.key.window_blocks)

    def examples_before(self, position: Position) -> int:
        """Return how many examples come before a position, counted over epochs.

        Examples of skipped blocks count as passed with their window, so that an epoch keeps its length. Raises
        BadBlocksError.
        """
        plan = self._epoch(position.epoch)
        before = plan.examples_before(position.window)
        if position.row:
            window = self._window(position)[1]
            share = (int(window.row_examples[: position.row].sum()), int(window.row_examples.sum()))
            before += share[0] * (plan.examples_before(position.window + 1) - before) // max(share[1], 1)
        return position.epoch * self.num_examples + before

    def check_size(self, num_rows: int, what: str) -> None:
        """Refuse a directory of which one epoch has fewer rows than one optimizer step takes from it.

        Raises:
            UserError: names both numbers and the way out.
        """
        if self.directory.manifest.totals["tokens"] >= num_rows * self.key.row_length:
            return  # rows can't be fuller than full
        rows = 0
        for number in range(self.num_windows()):
            rows += self.window_rows(0, number)
            if rows >= num_rows:
                return
        raise UserError(
            f"{what} {self.directory.name!r} gives {rows:,} rows of {self.key.row_length} tokens, fewer than the "
            f"{num_rows:,} rows that one optimizer step over all ranks takes from it. Lower train_batch_size so that "
            f"it takes at most "
            f"{rows:,}, use fewer GPUs, or bring more data."
        )

    def _epoch(self, epoch: int) -> EpochPlan:
        if self._plan is None or self._plan.epoch != epoch:
            self._plan = EpochPlan(self.directory, self.key, epoch, self.skipped, self.source)
        return self._plan

    def _window(self, position: Position) -> tuple[EpochPlan, Window]:
        plan = self._epoch(position.epoch)
        place = (position.epoch, position.window)
        if place not in self._windows:
            if len(self._windows) >= 2:
                self._windows.pop(next(iter(self._windows)))
            self._windows[place] = plan.window(position.window)
        return plan, self._windows[place]

    def _count(self, position: Position) -> int:
        """Return the number of rows of the window at a position, kept for the last few."""
        place = (position.epoch, position.window)
        if place in self._windows:
            return self._windows[place].num_rows
        if place not in self._counts:
            if len(self._counts) >= 8:
                self._counts.pop(next(iter(self._counts)))
            self._counts[place] = self._epoch(position.epoch).count_rows(position.window)
        return self._counts[place]

    def _nothing_left(self) -> str:
        return f"{self.directory.name}: no block of it can be read any more"

    @staticmethod
    def _advance(plan: EpochPlan, num_rows: int, position: Position, stop: int) -> Position:
        """Return the position after row `stop` - 1; a place has one name, so the end of a window is the start of the
        next."""
        if stop < num_rows:
            return Position(position.epoch, position.window, stop)
        if position.window + 1 < plan.num_windows:
            return Position(position.epoch, position.window + 1, 0)
        return Position(position.epoch + 1, 0, 0)
