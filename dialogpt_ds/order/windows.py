"""An epoch as windows of blocks, and a window as rows: each planned on its own, whatever came before it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import numpy as np

from dialogpt_ds.errors import RunError
from dialogpt_ds.order.packing import Packing, count_rows, one_per_row, pack, ranges
from dialogpt_ds.order.permutation import permutation
from dialogpt_ds.order.position import OrderKey, Position, SkippedBlock
from dialogpt_ds.shards.blocks import Block, Shape, join_blocks
from dialogpt_ds.shards.manifest import Index
from dialogpt_ds.shards.reader import DamagedShardError, ShardDirectory

Content = TypeVar("Content")

BLOCKS_PER_WINDOW = 64
"""About 65,000 examples are shuffled and packed together."""
SHARDS_PER_GROUP = 8
"""Blocks of this many shards are mixed, so that a bounded cache of remote shards serves a pass over them."""


def epoch_shards(num_shards: int, key: OrderKey, epoch: int) -> np.ndarray:
    """Return the shards in the order of an epoch, [shards] int64; each eight form a group."""
    return permutation(num_shards, key.fingerprint, key.seed, epoch, "shards")


def epoch_blocks(index: Index, num_shards: int, key: OrderKey, epoch: int) -> np.ndarray:
    """Return all blocks in the order of an epoch, [blocks] int64: shards permuted, their blocks mixed in groups of
    shards.

    The blocks of a shard are consecutive in the index, so a group's blocks are a few ranges.
    """
    shards = epoch_shards(num_shards, key, epoch)
    starts = np.searchsorted(index.shard, np.arange(num_shards + 1))
    groups = []
    for number, start in enumerate(range(0, num_shards, SHARDS_PER_GROUP)):
        group = np.sort(shards[start : start + SHARDS_PER_GROUP])
        blocks = ranges(starts[group], starts[group + 1] - starts[group])
        groups.append(blocks[permutation(len(blocks), key.fingerprint, key.seed, epoch, "blocks", number)])
    return np.concatenate(groups)


@dataclass(frozen=True)
class BadBlock:
    """A block that can't be read as it was written."""

    source: int
    """Number of the shard directory in the run's list."""
    block: int
    message: str
    """The reader's own: file, member, offset, checksums."""
    shape_lost: bool
    """Whether the plan of its window can't be made with it either."""


class BadBlocksError(RunError):
    """Blocks of one window that can't be read."""

    def __init__(self, blocks: Sequence[BadBlock]) -> None:
        super().__init__("\n".join(bad.message for bad in blocks))
        self.blocks = list(blocks)


@dataclass(frozen=True, eq=False)
class Window:
    """The rows of one window. Examples are numbered through its blocks."""

    blocks: np.ndarray
    """[blocks] their numbers, in the order in which examples are numbered."""
    first_examples: np.ndarray
    """[blocks + 1] number of each block's first example."""
    packing: Packing
    """The rows in training order."""
    lengths: np.ndarray
    """[examples] tokens."""
    targets: np.ndarray
    """[examples] target tokens."""
    weight_sums: np.ndarray
    """[examples] float64, sum of the target tokens' weights."""

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return self.packing.num_rows

    @cached_property
    def row_tokens(self) -> np.ndarray:
        """Tokens of each row without padding, [rows]."""
        return self.packing.per_row(self.lengths)

    @cached_property
    def row_targets(self) -> np.ndarray:
        """Target tokens of each row, [rows]."""
        return self.packing.per_row(self.targets)

    @cached_property
    def row_weight_sums(self) -> np.ndarray:
        """Sum of the target tokens' weights of each row, [rows] float64."""
        return self.packing.per_row(self.weight_sums)

    @cached_property
    def row_examples(self) -> np.ndarray:
        """Number of examples of each row, [rows]."""
        return np.diff(self.packing.starts)

    def without(self, blocks: Sequence[int], first_row: int, key: OrderKey) -> "Window":
        """Take the examples of `blocks` out of the rows from `first_row` on.

        The other examples stay in their rows. A row that has nothing left is replaced by one of the rows that have,
        drawn by the order's key, so the number of rows stays what it was; where none has, the window ends at
        `first_row`.
        """
        lost = np.zeros(len(self.lengths), bool)
        for place in np.flatnonzero(np.isin(self.blocks, blocks)):
            lost[self.first_examples[place] : self.first_examples[place + 1]] = True
        row_of = np.repeat(np.arange(self.num_rows), self.row_examples)
        kept = ~(lost[self.packing.examples] & (row_of >= first_row))
        widths = np.bincount(row_of[kept], minlength=self.num_rows)
        packing = Packing(np.concatenate([[0], np.cumsum(widths)]), self.packing.examples[kept])
        rows = np.arange(self.num_rows)
        empty = np.flatnonzero(widths == 0)
        filled = first_row + np.flatnonzero(widths[first_row:])
        if len(empty) and len(filled):
            drawn = permutation(
                len(filled), key.fingerprint, key.seed, *(int(block) for block in blocks), "substitutes"
            )
            rows[empty] = filled[drawn[np.arange(len(empty)) % len(filled)]]
        elif len(empty):
            rows = rows[:first_row]
        return replace(self, packing=packing.reordered(rows))


def plan_window(shapes: Sequence[Shape], blocks: np.ndarray, key: OrderKey, epoch: int, number: int) -> Window:
    """Permute the examples of a window, pack them into rows, and permute the rows."""
    lengths = _joined([shape.example_lengths() for shape in shapes], np.int64)
    examples = permutation(len(lengths), key.fingerprint, key.seed, epoch, number, "examples")
    packed = pack(lengths[examples], key.row_length) if key.packed else one_per_row(len(lengths))
    packed = Packing(packed.starts, examples[packed.examples])
    rows = permutation(packed.num_rows, key.fingerprint, key.seed, epoch, number, "rows")
    return Window(
        blocks=blocks,
        first_examples=np.concatenate([[0], np.cumsum([shape.num_examples for shape in shapes], dtype=np.int64)]),
        packing=packed.reordered(rows),
        lengths=lengths,
        targets=_joined([shape.example_targets() for shape in shapes], np.int64),
        weight_sums=_joined([shape.example_weight_sums() for shape in shapes], np.float64),
    )


def _joined(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype)


@dataclass(frozen=True, eq=False)
class WindowTokens:
    """The content of a window's examples, one behind the other."""

    tokens: np.ndarray
    """[tokens]."""
    starts: np.ndarray
    """[examples + 1] where each example begins."""
    turn_lengths: np.ndarray
    """[turns] tokens."""
    turn_weights: np.ndarray
    """[turns] float32, each turn's weight in the loss."""
    turn_starts: np.ndarray
    """[examples + 1] number of each example's first turn."""

    @classmethod
    def of(cls, block: Block) -> "WindowTokens":
        """Lay out a block (or several joined)."""
        return cls(
            tokens=block.tokens,
            starts=np.concatenate([[0], np.cumsum(block.example_lengths())]),
            turn_lengths=block.turn_lengths,
            turn_weights=block.turn_weights,
            turn_starts=np.concatenate([[0], np.cumsum(block.turns_per_example, dtype=np.int64)]),
        )


class EpochPlan:
    """Windows of one epoch of a shard directory, planned when asked for."""

    def __init__(
        self,
        directory: ShardDirectory,
        key: OrderKey,
        epoch: int,
        skipped: Sequence[SkippedBlock] = (),
        source: int = 0,
    ) -> None:
        self.directory = directory
        self.key = key
        self.epoch = epoch
        self.source = source
        self.blocks = epoch_blocks(directory.index, len(directory.manifest.shardlist), key, epoch)
        self.num_windows = -(-len(self.blocks) // key.window_blocks)
        self._skipped_since = {skip.block: skip.since for skip in skipped}
        examples = directory.index.examples[self.blocks].astype(np.int64)
        self._examples_before = np.concatenate([[0], np.cumsum(examples)])
        self._content: tuple[int, WindowTokens] | None = None

    def examples_before(self, window: int) -> int:
        """Return how many examples of the epoch come before a window."""
        return int(self._examples_before[min(window * self.key.window_blocks, len(self.blocks))])

    def window(self, number: int) -> Window:
        """Plan a window from the small members of its blocks; its cost does not depend on how many came before.

        A block that is skipped since before the window has no part in its plan; one skipped since a row of it keeps its
        part up to there.

        Raises:
            BadBlocksError: blocks whose small members can't be read.
        """
        end = Position(self.epoch, number + 1, 0)
        blocks = self._blocks_of(number)
        shapes = self._read_all(blocks, self.directory.shape, lambda _: True)
        window = plan_window(shapes, blocks, self.key, self.epoch, number)
        for since in sorted({self._since(block, end) for block in blocks} - {end}) if self._skipped_since else ():
            gone = sorted(int(block) for block in blocks if self._since(block, end) == since)
            window = window.without(gone, since.row, self.key)
        return window

    def count_rows(self, number: int) -> int:
        """Return the number of rows of a window for less than its plan; raises BadBlocksError."""
        start, end = Position(self.epoch, number, 0), Position(self.epoch, number + 1, 0)
        blocks = self._blocks_of(number)
        if any(start < self._since(block, end) < end for block in blocks):
            return self.window(number).num_rows
        lengths = self._read_all(blocks, lambda block: self.directory.shape(block).example_lengths(), lambda _: True)
        return (
            count_rows(_joined(lengths, np.int64), self.key.row_length) if self.key.packed else sum(map(len, lengths))
        )

    def content(self, number: int, window: Window) -> WindowTokens:
        """Return the tokens of a window's examples; those of the last window are kept.

        Raises:
            BadBlocksError: blocks that can't be read.
        """
        if self._content is None or self._content[0] != number:
            self._content = None  # before the next one is read, so that only one window's tokens are held
            blocks = self._read_all(window.blocks, self._block, self._shape_lost)
            self._content = (number, WindowTokens.of(join_blocks(blocks)))
        return self._content[1]

    def _blocks_of(self, number: int) -> np.ndarray:
        """Return the blocks of a window but those skipped since before it."""
        if self.directory.cache is not None:
            self.directory.cache.fetch_ahead(self._next_shards(number))
        blocks = self.blocks[number * self.key.window_blocks : (number + 1) * self.key.window_blocks]
        if not self._skipped_since:
            return blocks
        start, end = Position(self.epoch, number, 0), Position(self.epoch, number + 1, 0)
        return blocks[[self._since(block, end) > start for block in blocks]]

    def _next_shards(self, number: int) -> list[int]:
        """Return the shards of a window's group and of the group after it, which may be the next epoch's first."""
        num_shards = len(self.directory.manifest.shardlist)
        order = epoch_shards(num_shards, self.key, self.epoch)
        shard = self.directory.index.shard[self.blocks[number * self.key.window_blocks]]
        start = int(np.flatnonzero(order == shard)[0]) // SHARDS_PER_GROUP * SHARDS_PER_GROUP
        following = epoch_shards(num_shards, self.key, self.epoch + 1)[:SHARDS_PER_GROUP]
        return np.concatenate([order, following])[start : start + 2 * SHARDS_PER_GROUP].tolist()

    def _since(self, block: int, end: Position) -> Position:
        return min(self._skipped_since.get(int(block), end), end)

    def _block(self, block: int) -> Block:
        """Read a block; one that is skipped since a row of its window gives the numbering of the others, and no
        tokens."""
        if block not in self._skipped_since:
            return self.directory.block(block)
        shape = self.directory.shape(block)
        tokens = np.zeros(int(self.directory.index.tokens[block]), self.directory.token_dtype)
        return Block(shape.turn_lengths, shape.turn_weights, shape.turns_per_example, tokens)

    def _shape_lost(self, block: int) -> bool:
        try:
            self.directory.shape(block)
        except DamagedShardError:
            return True
        return False

    def _read_all(
        self, blocks: np.ndarray, read: Callable[[int], Content], shape_lost: Callable[[int], bool]
    ) -> list[Content]:
        """Read blocks, and report all that can't be read at once."""
        found, bad = [], []
        for block in (int(block) for block in blocks):
            try:
                found.append(read(block))
            except DamagedShardError as error:
                bad.append(BadBlock(self.source, block, str(error), shape_lost(block)))
        if bad:
            raise BadBlocksError(bad)
        return found
