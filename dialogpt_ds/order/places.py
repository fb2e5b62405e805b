"""Where the examples of a row lie in the shards, for a person who wants to look at them."""

from collections.abc import Iterable
from dataclasses import dataclass

from dialogpt_ds.order.stream import Rows

SHOWN_EXAMPLES = 8


@dataclass(frozen=True)
class Place:
    """An example in a shard directory."""

    directory: str
    """As it was given: a path or a remote address."""
    shard: str
    """The shard's file name."""
    block: int
    example: int
    """Number in the block, from 0."""

    @property
    def name(self) -> str:
        """BLOCK:EXAMPLE, as `inspect_shards.py --at` takes it."""
        return f"{self.block}:{self.example}"


def examples_in(rows: Rows, row: int) -> list[Place]:
    """Return the places of the examples of a row (its number among `rows`), in the order they stand in."""
    segment, number = rows.segments[int(rows.segment_of[row])], int(rows.number_of[row])
    window, directory = segment.window, segment.plan.directory
    places = []
    for example in window.packing.examples[window.packing.starts[number] : window.packing.starts[number + 1]]:
        # With blocks of 3 and 2 examples, first_examples is 0 3 5: example 4 is number 1 of the second block.
        which = int((window.first_examples <= example).sum()) - 1
        block = int(window.blocks[which])
        shard = directory.manifest.shardlist[int(directory.index.shard[block])].url
        places.append(Place(directory.name, shard, block, int(example - window.first_examples[which])))
    return places


def listed(places: Iterable[Place]) -> str:
    """Return places in a few words: directory, then for each shard its examples as BLOCK:EXAMPLE."""
    by_shard: dict[str, list[str]] = {}
    for place in places:
        by_shard.setdefault(f"{place.directory.rstrip('/')}/{place.shard}", []).append(place.name)
    return "; ".join(
        f"{shard} examples {' '.join(names[:SHOWN_EXAMPLES])}"
        + (f" and {len(names) - SHOWN_EXAMPLES} more" if len(names) > SHOWN_EXAMPLES else "")
        for shard, names in by_shard.items()
    )
