"""Where training is in the endless stream of rows: a few integers, the same on every rank."""

from dataclasses import dataclass

from dialogpt_ds.order.permutation import ORDER_VERSION


@dataclass(frozen=True)
class OrderKey:
    """Everything that the order of one shard directory is a function of. World size, micro-batches and loader workers
    are not in it."""

    fingerprint: str
    """Of the shard directory's manifest."""
    seed: int
    row_length: int
    """Tokens of a row."""
    window_blocks: int
    packed: bool
    order_version: int = ORDER_VERSION


@dataclass(frozen=True, order=True)
class Position:
    """The next row to be trained on. Positions compare as they follow each other."""

    epoch: int = 0
    """From 0."""
    window: int = 0
    """Window of the epoch."""
    row: int = 0
    """Row of the window."""


@dataclass(frozen=True)
class SkippedBlock:
    """A block that could not be read. All ranks leave it out from the same row on, so the order stays one and the
    same."""

    block: int
    since: Position
