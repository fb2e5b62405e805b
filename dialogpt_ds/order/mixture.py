"""Several shard directories as one stream: rows of each in a fixed proportion, spread as evenly as whole rows allow."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dialogpt_ds.errors import UserError
from dialogpt_ds.order.position import OrderKey, Position, SkippedBlock
from dialogpt_ds.order.stream import Rows, RowStream, Segment
from dialogpt_ds.shards.reader import ShardDirectory


@dataclass(frozen=True)
class MixtureKey:
    """Everything that the order of a run is a function of."""

    sources: tuple[OrderKey, ...]
    """One for each shard directory, in the order of the command line."""
    weights: tuple[int, ...]
    """Rows of each out of sum(weights) rows, in lowest terms."""


@dataclass(frozen=True)
class MixturePosition:
    """The next row to be trained on, and what is left out."""

    row: int
    """Rows taken so far, from all sources."""
    sources: tuple[Position, ...]
    """The next row of each source."""
    skipped: tuple[tuple[SkippedBlock, ...], ...]
    """Of each source, blocks that could not be read."""

    @classmethod
    def start(cls, num_sources: int = 1) -> "MixturePosition":
        """Return the first row of all."""
        return cls(0, (Position(),) * num_sources, ((),) * num_sources)


@dataclass(frozen=True, eq=False)
class GlobalBatch:
    """The rows of one optimizer step over all ranks."""

    rows: Rows
    position_after: MixturePosition
    """The next row after this batch."""
    source_epochs: tuple[float, ...]
    """Epochs done of each source after this batch, counted in examples."""
    examples_seen: int
    """Of all sources and epochs, after this batch."""
    examples_per_epoch: int
    """Of all sources."""

    @property
    def epoch(self) -> int:
        """Epoch of the last row, from 0. That of a mixture ends when as many examples were seen as all its sources
        have."""
        return (self.examples_seen - 1) // self.examples_per_epoch

    @property
    def fractional_epoch(self) -> float:
        """Epochs done after this batch, counted in examples."""
        return self.examples_seen / self.examples_per_epoch


def interleave(weights: Sequence[int]) -> np.ndarray:
    """Return which source each of sum(weights) consecutive rows comes from, [sum(weights)].

    Row j of a source with weight w stands at (j + 1/2) / w of the period, and all rows are sorted by where they stand
    (the divisor method of Webster, 1832), so that any run of rows holds each source's share to within about a row. With
    weights 3 and 1 they stand at 1/6 3/6 5/6 and 1/2: sources 0 0 1 0.
    """
    sources = np.repeat(np.arange(len(weights)), weights)
    row = np.concatenate([np.arange(weight) for weight in weights])
    weight = np.repeat(np.asarray(weights, np.int64), weights)
    # Floating point keeps different fractions apart: with weights up to a million they differ by more than 1e-13.
    return sources[np.lexsort((sources, (2 * row + 1) / (2 * weight)))]


class Mixture:
    """The stream of rows of a run. A pure function of its key and position: any position can be entered at once."""

    def __init__(
        self, directories: Sequence[ShardDirectory], key: MixtureKey, skipped: Sequence[Sequence[SkippedBlock]]
    ) -> None:
        self.key = key
        self.streams = [
            RowStream(directory, source, skips, number)
            for number, (directory, source, skips) in enumerate(zip(directories, key.sources, skipped, strict=True))
        ]
        self._period = interleave(key.weights)

    @property
    def row_length(self) -> int:
        """Tokens of a row."""
        return self.key.sources[0].row_length

    def batch(self, position: MixturePosition, num_rows: int) -> GlobalBatch:
        """Return the `num_rows` rows from `position` on.

        Raises:
            BadBlocksError: blocks whose small members can't be read.
        """
        source_of = self._sources_of(position, num_rows)
        segments: list[Segment] = []
        segment_of, number_of = np.zeros(num_rows, np.int64), np.zeros(num_rows, np.int64)
        after = list(position.sources)
        for source, stream in enumerate(self.streams):
            places = np.flatnonzero(source_of == source)
            if not len(places):
                continue
            rows, after[source] = stream.rows(position.sources[source], len(places))
            segment_of[places] = rows.segment_of + len(segments)
            number_of[places] = rows.number_of
            segments += rows.segments
        seen = [stream.examples_before(place) for stream, place in zip(self.streams, after, strict=True)]
        return GlobalBatch(
            Rows(segments, segment_of, number_of),
            MixturePosition(position.row + num_rows, tuple(after), position.skipped),
            tuple(count / stream.num_examples for count, stream in zip(seen, self.streams, strict=True)),
            sum(seen),
            sum(stream.num_examples for stream in self.streams),
        )

    def skip(self, position: MixturePosition, num_rows: int) -> MixturePosition:
        """Return the position after `num_rows` rows, for less than their plan; raises BadBlocksError."""
        source_of = self._sources_of(position, num_rows)
        after = tuple(
            stream.skip(place, int((source_of == source).sum()))
            for source, (stream, place) in enumerate(zip(self.streams, position.sources, strict=True))
        )
        return MixturePosition(position.row + num_rows, after, position.skipped)

    def _sources_of(self, position: MixturePosition, num_rows: int) -> np.ndarray:
        return self._period[np.arange(position.row, position.row + num_rows) % len(self._period)]

    def check_size(self, global_rows: int, what: str) -> None:
        """Refuse a source of which one epoch has fewer rows than one global batch takes from it; raises UserError."""
        for stream, weight in zip(self.streams, self.key.weights, strict=True):
            stream.check_size(-(-global_rows * weight // len(self._period)), what)


def order_state(key: MixtureKey, position: MixturePosition) -> dict[str, Any]:
    """Return what a checkpoint keeps of the order: plain types, a few integers a source."""
    first = key.sources[0]
    sources = [
        {
            "fingerprint": source.fingerprint,
            "weight": weight,
            "epoch": place.epoch,
            "window": place.window,
            "row": place.row,
            "skipped_blocks": [[s.block, s.since.epoch, s.since.window, s.since.row] for s in skipped],
        }
        for source, weight, place, skipped in zip(
            key.sources, key.weights, position.sources, position.skipped, strict=True
        )
    ]
    return _common(first) | {"row": position.row, "sources": sources}


def _common(key: OrderKey) -> dict[str, Any]:
    return {
        "order_version": key.order_version,
        "seed": key.seed,
        "row_length": key.row_length,
        "window_blocks": key.window_blocks,
        "packed": key.packed,
    }


def order_differences(state: dict[str, Any], key: MixtureKey) -> list[str]:
    """Return in what the order of a checkpoint is another one than `key`'s, a line each; nothing where it is the
    same."""
    differences = [
        f"{name}: checkpoint {state.get(name)!r}, now {value!r}"
        for name, value in _common(key.sources[0]).items()
        if state.get(name) != value
    ]
    theirs = [(source["weight"], source["fingerprint"]) for source in state.get("sources", [])]
    mine = [(weight, source.fingerprint) for weight, source in zip(key.weights, key.sources, strict=True)]
    if theirs != mine:
        differences.append(f"data as weight:fingerprint: checkpoint {_list(theirs)}, now {_list(mine)}")
    return differences


def position_from_state(state: dict[str, Any], key: MixtureKey) -> MixturePosition:
    """Return the position in a checkpoint, if it belongs to the same order.

    Raises:
        UserError: the order is another one; names each difference and the ways out.
    """
    differences = order_differences(state, key)
    if differences:
        raise UserError(
            "the checkpoint was trained on another order of rows, so its place in it has no meaning here:\n  "
            + "\n  ".join(differences)
            + "\nGive the run the same data, weights, seed, max_seq_length and packing. Or take --changed_order "
            "restart: weights, "
            "optimizer and schedule go on, the rows begin at the first of the new order. Or start another output_dir "
            "(--init_checkpoint "
            "takes the weights along)."
        )
    return MixturePosition(
        state["row"],
        tuple(Position(source["epoch"], source["window"], source["row"]) for source in state["sources"]),
        tuple(
            tuple(SkippedBlock(block, Position(*since)) for block, *since in source["skipped_blocks"])
            for source in state["sources"]
        ),
    )


def _list(sources: Sequence[tuple[int, str]]) -> str:
    return ", ".join(f"{weight}:{fingerprint[:12]}" for weight, fingerprint in sources) or "none"
