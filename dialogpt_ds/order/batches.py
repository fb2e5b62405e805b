"""From rows to the arrays a rank trains on."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dialogpt_ds.order.mixture import GlobalBatch, MixturePosition
from dialogpt_ds.order.packing import ranges
from dialogpt_ds.order.stream import Rows, Segment

IGNORED_LABEL = -100
TARGETS_MULTIPLE = 128
"""The number of targets of a micro-batch is padded to a multiple of this, so that shapes repeat."""
TURN_GROUPS = ("turn_2", "turn_3", "turn_4_plus")
"""Groups of targets by the number of their turn in its example, from 1; a first turn is never a target."""


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Rows of one forward pass of one rank. Examples in a row never see each other: positions restart at 0."""

    input_ids: np.ndarray
    """[rows, row_length] int64; padding holds the EOS id, and is neither a target nor seen by any example."""
    position_ids: np.ndarray
    """[rows, row_length] int64, from 0 in each example and in the padding."""
    turn_ids: np.ndarray
    """[rows, row_length] int64, number of the token's turn in its example."""
    target_places: np.ndarray
    """[targets] int64, places in the flattened rows whose output predicts a target: one before the target itself."""
    labels: np.ndarray
    """[targets] int64, the target ids; IGNORED_LABEL beyond the real ones."""
    weights: np.ndarray
    """[targets] float32, each target's weight; 0 beyond the real ones."""
    turn_groups: np.ndarray
    """[targets] int64, which of TURN_GROUPS each target belongs to; 0 beyond the real ones."""
    example_starts: np.ndarray
    """[examples + 1] int32, where each example begins in the flattened rows, and their end; a row's padding counts as
    one.

    Two rows of 4 with examples of 3 and of 4 tokens: 0 3 4 8.
    """
    longest_example: int
    """Tokens of the longest of them."""

    def pin_memory(self) -> "MicroBatch":
        """Return the same in page-locked memory, from which a GPU copies while it computes; the arrays are torch
        tensors then."""
        import torch

        pinned: dict[str, Any] = {
            name: value if isinstance(value, int) else torch.from_numpy(value).pin_memory()
            for name, value in vars(self).items()
        }
        return MicroBatch(**pinned)


@dataclass(frozen=True, eq=False)
class RankStep:
    """One rank's share of one optimizer step, with what is true of the whole step."""

    micro_batches: list[MicroBatch]
    weight_sum: float
    """Over all ranks and micro-batches."""
    num_rows: int
    num_tokens: int
    num_targets: int
    num_examples: int
    epoch: int
    """Of the step's last row, from 0."""
    fractional_epoch: float
    source_epochs: tuple[float, ...]
    """Epochs done of each shard directory of a mixture."""
    position_after: MixturePosition

    def pin_memory(self) -> "RankStep":
        """Return the same with its micro-batches in page-locked memory."""
        return replace(self, micro_batches=[micro_batch.pin_memory() for micro_batch in self.micro_batches])


@dataclass(frozen=True)
class RankSlice:
    """Which rows of a global batch a rank takes.

    Micro-batch a of rank r takes `micro` rows from row (a * world_size + r) * micro on. With 2 ranks, 2 micro-batches
    of 1 row: rows 0 1 2 3 are (a0 r0) (a0 r1) (a1 r0) (a1 r1).
    """

    rank: int
    world_size: int
    micro: int
    """Rows of a micro-batch."""
    accumulation: int
    """Micro-batches of a rank in one optimizer step."""

    @property
    def global_rows(self) -> int:
        """Rows of one optimizer step over all ranks."""
        return self.micro * self.accumulation * self.world_size

    def rows(self, micro_batch: int) -> range:
        """Return the rows of the global batch that make up a micro-batch of this rank."""
        start = (micro_batch * self.world_size + self.rank) * self.micro
        return range(start, start + self.micro)


def rank_step(batch: GlobalBatch, share: RankSlice, row_length: int, padding_id: int) -> RankStep:
    """Make the arrays of one rank's share of a global batch; raises BadBlocksError."""
    rows = batch.rows
    return RankStep(
        micro_batches=[
            make_micro_batch(rows, share.rows(number), row_length, padding_id) for number in range(share.accumulation)
        ],
        weight_sum=rows.weight_sum,
        num_rows=rows.num_rows,
        num_tokens=rows.num_tokens,
        num_targets=rows.num_targets,
        num_examples=rows.num_examples,
        epoch=batch.epoch,
        fractional_epoch=batch.fractional_epoch,
        source_epochs=batch.source_epochs,
        position_after=batch.position_after,
    )


def make_micro_batch(rows: Rows, wanted: range, row_length: int, padding_id: int, num_rows: int = 0) -> MicroBatch:
    """Lay the `wanted` ones of `rows` out as arrays, with rows of padding up to `num_rows`; raises BadBlocksError.

    An empty range is not allowed; missing rows are made by `padding_rows`.
    """
    num_rows = max(len(wanted), num_rows)
    arrays = _empty(num_rows, row_length, padding_id)
    weights = np.zeros((num_rows, row_length), np.float32)
    chosen = slice(wanted.start, wanted.stop)
    segment_of, number_of = rows.segment_of[chosen], rows.number_of[chosen]
    for segment in np.unique(segment_of):
        places = np.flatnonzero(segment_of == segment)
        _lay_out(rows.segments[segment], number_of[places], places, arrays, weights)
    return _with_targets(arrays, weights)


def padding_rows(num_rows: int, row_length: int, padding_id: int) -> MicroBatch:
    """Return rows that hold nothing: for a rank whose share has ended while a collective still needs its forward
    pass."""
    return _with_targets(_empty(num_rows, row_length, padding_id), np.zeros((num_rows, row_length), np.float32))


def _empty(num_rows: int, length: int, padding_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    shape = (num_rows, length)
    return np.full(shape, padding_id, np.int64), np.tile(np.arange(length), (num_rows, 1)), np.zeros(shape, np.int64)


def _lay_out(
    segment: Segment,
    numbers: np.ndarray,
    places: np.ndarray,
    arrays: tuple[np.ndarray, np.ndarray, np.ndarray],
    weights: np.ndarray,
) -> None:
    """Copy the rows `numbers` of a window to the rows `places` of the arrays.

    Everything is flat: example e of length n goes from content[s:s + n] to the flattened rows from d on. With lengths 3
    and 2, `within` is 0 1 2 0 1, and source and destination are s and d repeated n times, plus `within`.
    """
    input_ids, position_ids, turn_ids = arrays
    length = input_ids.shape[1]
    content, packing = segment.content(), segment.window.packing
    widths = packing.starts[numbers + 1] - packing.starts[numbers]
    examples = packing.examples[ranges(packing.starts[numbers], widths)]
    sizes = content.starts[examples + 1] - content.starts[examples]
    before = np.cumsum(sizes) - sizes
    row_begins = before[np.cumsum(widths) - widths]
    source = ranges(content.starts[examples], sizes)
    place = ranges(np.repeat(places * length - row_begins, widths) + before, sizes)
    num_turns = content.turn_starts[examples + 1] - content.turn_starts[examples]
    turns = ranges(content.turn_starts[examples], num_turns)
    turn_lengths = content.turn_lengths[turns]
    input_ids.ravel()[place] = content.tokens[source]
    position_ids.ravel()[place] = ranges(np.zeros_like(sizes), sizes)
    turn_ids.ravel()[place] = np.repeat(ranges(np.zeros_like(num_turns), num_turns), turn_lengths)
    weights.ravel()[place] = np.repeat(content.turn_weights[turns], turn_lengths)
    for row, number in zip(places, numbers, strict=True):
        used = int(segment.window.row_tokens[number])
        position_ids[row, used:] = np.arange(length - used)


def _with_targets(arrays: tuple[np.ndarray, np.ndarray, np.ndarray], weights: np.ndarray) -> MicroBatch:
    input_ids, position_ids, turn_ids = arrays
    # The first turn of an example is context, so a target is never the first token of a row and place - 1 is its own
    # example.
    targets = np.flatnonzero(weights.ravel() > 0)
    padded = max(-(-len(targets) // TARGETS_MULTIPLE), 1) * TARGETS_MULTIPLE
    places = np.zeros(padded, np.int64)
    labels = np.full(padded, IGNORED_LABEL, np.int64)
    target_weights = np.zeros(padded, np.float32)
    turn_groups = np.zeros(padded, np.int64)
    places[: len(targets)] = targets - 1
    labels[: len(targets)] = input_ids.ravel()[targets]
    target_weights[: len(targets)] = weights.ravel()[targets]
    turn_groups[: len(targets)] = np.clip(turn_ids.ravel()[targets], 1, len(TURN_GROUPS)) - 1
    starts = np.append(np.flatnonzero(position_ids.ravel() == 0), position_ids.size).astype(np.int32)
    return MicroBatch(
        input_ids,
        position_ids,
        turn_ids,
        places,
        labels,
        target_weights,
        turn_groups,
        starts,
        int(np.diff(starts).max()),
    )
