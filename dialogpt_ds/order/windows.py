"""An epoch as windows of blocks, and a window as rows: each planned on its own, whatever came before it."""

from dataclasses import dataclass

import numpy as np

from dialogpt_ds.order.packing import Packing, one_per_row, pack
from dialogpt_ds.order.permutation import permutation
from dialogpt_ds.order.position import OrderKey
from dialogpt_ds.shards.blocks import Block, Shape, join_blocks
from dialogpt_ds.shards.manifest import Index
from dialogpt_ds.shards.reader import ShardDirectory

BLOCKS_PER_WINDOW = 64
"""About 65,000 examples are shuffled and packed together."""
SHARDS_PER_GROUP = 8
"""Blocks of this many shards are mixed, so that a bounded cache of remote shards serves a pass over them."""


def epoch_blocks(index: Index, num_shards: int, key: OrderKey, epoch: int) -> np.ndarray:
    """Return all blocks in the order of an epoch, [blocks] int64: shards permuted, their blocks mixed in groups of shards."""
    shards = permutation(num_shards, key.fingerprint, key.seed, epoch, "shards")
    groups = []
    for number, start in enumerate(range(0, num_shards, SHARDS_PER_GROUP)):
        blocks = np.flatnonzero(np.isin(index.shard, shards[start : start + SHARDS_PER_GROUP]))
        groups.append(blocks[permutation(len(blocks), key.fingerprint, key.seed, epoch, "blocks", number)])
    return np.concatenate(groups)


@dataclass(frozen=True, eq=False)
class Window:
    """The rows of one window. Examples are numbered through its blocks."""

    blocks: np.ndarray
    """[blocks] their numbers, in the order in which examples are numbered."""
    packing: Packing
    """The rows in training order."""
    row_tokens: np.ndarray
    """[rows] tokens of each row without padding."""
    row_targets: np.ndarray
    """[rows] target tokens."""
    row_weight_sums: np.ndarray
    """[rows] float64, sum of the target tokens' weights."""
    row_examples: np.ndarray
    """[rows] number of examples."""

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return self.packing.num_rows


def plan_window(shapes: list[Shape], blocks: np.ndarray, key: OrderKey, epoch: int, number: int) -> Window:
    """Permute the examples of a window, pack them into rows, and permute the rows."""
    lengths = np.concatenate([shape.example_lengths() for shape in shapes])
    examples = permutation(len(lengths), key.fingerprint, key.seed, epoch, number, "examples")
    packed = pack(lengths[examples], key.row_length) if key.packed else one_per_row(len(lengths))
    packed = Packing(packed.starts, examples[packed.examples])
    rows = permutation(packed.num_rows, key.fingerprint, key.seed, epoch, number, "rows")
    packing = packed.reordered(rows)
    return Window(
        blocks=blocks,
        packing=packing,
        row_tokens=packing.per_row(lengths),
        row_targets=packing.per_row(np.concatenate([shape.example_targets() for shape in shapes])),
        row_weight_sums=packing.per_row(np.concatenate([shape.example_weight_sums() for shape in shapes])),
        row_examples=np.diff(packing.starts),
    )


@dataclass(frozen=True, eq=False)
class WindowTokens:
    """The content of a window's examples, one behind the other."""

    tokens: np.ndarray
    """[tokens]."""
    weights: np.ndarray
    """[tokens] float32, each token's weight in the loss."""
    turns: np.ndarray
    """[tokens] number of the token's turn in its example, from 0."""
    starts: np.ndarray
    """[examples + 1] where each example begins."""

    @classmethod
    def of(cls, block: Block) -> "WindowTokens":
        """Lay out a block (or several joined)."""
        lengths = block.turn_lengths.astype(np.int64)
        first_turn = np.repeat(
            np.cumsum(block.turns_per_example, dtype=np.int64) - block.turns_per_example, block.turns_per_example
        )
        return cls(
            tokens=block.tokens,
            weights=np.repeat(block.turn_weights, lengths),
            turns=np.repeat(np.arange(len(lengths)) - first_turn, lengths),
            starts=np.concatenate([[0], np.cumsum(block.example_lengths())]),
        )


class EpochPlan:
    """Windows of one epoch of a shard directory, planned when asked for."""

    def __init__(self, directory: ShardDirectory, key: OrderKey, epoch: int) -> None:
        self.directory = directory
        self.key = key
        self.epoch = epoch
        self.blocks = epoch_blocks(directory.index, len(directory.manifest.shardlist), key, epoch)
        self.num_windows = -(-len(self.blocks) // key.window_blocks)
        examples = directory.index.examples[self.blocks].astype(np.int64)
        self._examples_before = np.concatenate([[0], np.cumsum(examples)])

    def examples_before(self, window: int) -> int:
        """Return how many examples of the epoch come before a window."""
        return int(self._examples_before[min(window * self.key.window_blocks, len(self.blocks))])

    def window(self, number: int) -> Window:
        """Plan a window from the small members of its blocks; its cost does not depend on how many came before."""
        blocks = self.blocks[number * self.key.window_blocks : (number + 1) * self.key.window_blocks]
        return plan_window([self.directory.shape(int(block)) for block in blocks], blocks, self.key, self.epoch, number)

    def content(self, window: Window) -> WindowTokens:
        """Read the tokens of a window."""
        return WindowTokens.of(join_blocks([self.directory.block(int(block)) for block in window.blocks]))
