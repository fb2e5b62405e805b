"""Packing examples into rows of a fixed length with almost no padding."""

import bisect
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Packing:
    """Which examples lie in which row: row r holds `examples[starts[r]:starts[r + 1]]`, in this order."""

    starts: np.ndarray
    """[rows + 1] int64."""
    examples: np.ndarray
    """[examples] int64, numbers of examples."""

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.starts) - 1

    def per_row(self, per_example: np.ndarray) -> np.ndarray:
        """Return the sum over each row's examples of an array that is indexed by example, [rows]."""
        return np.add.reduceat(per_example[self.examples], self.starts[:-1]) if self.num_rows else per_example[:0]

    def reordered(self, rows: np.ndarray) -> "Packing":
        """Return the rows `rows` of this packing, in that order; a row may stand there several times."""
        widths = np.diff(self.starts)[rows]
        return Packing(np.concatenate([[0], np.cumsum(widths)]), self.examples[ranges(self.starts[rows], widths)])


def pack(lengths: np.ndarray, row_length: int) -> Packing:
    """Pack examples into rows by first-fit-decreasing (Johnson 1973), each example exactly once.

    Lengths are small integers, so rows are made as patterns over a histogram: a row takes the longest example that is
    left, then again and again the longest that still fits, which is the bin that first-fit-decreasing fills next. The
    same pattern serves for as many rows as the counts allow. With lengths 60 60 60 30 30 30 10 and rows of 100:

        pattern 60+30+10 once (the 10 is used up), then 60+30 twice.

    Equal lengths are taken in the order in which they stand in `lengths`.

    Args:
        lengths: [examples], each from 1 to `row_length`.
        row_length: tokens of a row.
    """
    if not len(lengths):
        return Packing(np.zeros(1, np.int64), np.zeros(0, np.int64))
    assert lengths.min() >= 1 and lengths.max() <= row_length, (lengths.min(), lengths.max(), row_length)
    counts = np.bincount(lengths, minlength=row_length + 1)
    # A stable sort of 16-bit integers is a counting sort.
    by_length = np.argsort(lengths.astype(np.uint16 if row_length < 1 << 16 else np.uint32), kind="stable")
    next_of = (np.cumsum(counts) - counts).tolist()
    left = counts.tolist()
    available = np.flatnonzero(counts).tolist()
    widths: list[np.ndarray] = []
    chosen: list[np.ndarray] = []
    while available:
        pattern = _pattern(available, left, row_length)
        repeats = min(left[length] // times for length, times in pattern)
        columns = []
        for length, times in pattern:
            taken = by_length[next_of[length] : next_of[length] + repeats * times]
            columns.append(taken.reshape(repeats, times))
            next_of[length] += repeats * times
            left[length] -= repeats * times
            if not left[length]:
                del available[bisect.bisect_left(available, length)]
        rows = np.concatenate(columns, axis=1)
        widths.append(np.full(repeats, rows.shape[1]))
        chosen.append(rows.ravel())
    starts = np.concatenate([[0], np.cumsum(np.concatenate(widths))])
    return Packing(starts.astype(np.int64), np.concatenate(chosen).astype(np.int64))


def count_rows(lengths: np.ndarray, row_length: int) -> int:
    """Return how many rows `pack` makes, without saying which example lies where."""
    counts = np.bincount(lengths, minlength=row_length + 1)
    left, available, rows = counts.tolist(), np.flatnonzero(counts).tolist(), 0
    while available:
        pattern = _pattern(available, left, row_length)
        repeats = min(left[length] // times for length, times in pattern)
        rows += repeats
        for length, times in pattern:
            left[length] -= repeats * times
            if not left[length]:
                del available[bisect.bisect_left(available, length)]
    return rows


def _pattern(available: list[int], left: list[int], row_length: int) -> list[tuple[int, int]]:
    """Return the lengths of the next row with how often each stands in it, longest first."""
    pattern = []
    room = row_length
    place = len(available)
    while room:
        # The longest length that fits and is shorter than the last one taken.
        place = bisect.bisect_right(available, room, 0, place) - 1
        if place < 0:
            break
        length = available[place]
        times = min(room // length, left[length])
        pattern.append((length, times))
        room -= times * length
    return pattern


def one_per_row(num_examples: int) -> Packing:
    """Return each example in a row of its own, for comparison."""
    return Packing(np.arange(num_examples + 1), np.arange(num_examples))


def ranges(starts: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Return the numbers starts[i] to starts[i] + widths[i] - 1 of every i, one range behind the other, [widths.sum()].

    With starts 10 40 and widths 3 2: 10 11 12 40 41.
    """
    return np.repeat(starts - (np.cumsum(widths) - widths), widths) + np.arange(widths.sum())
