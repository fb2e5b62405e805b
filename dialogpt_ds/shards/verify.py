"""Verifying a shard directory: every file, every member, every count, all problems at once."""

import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dialogpt_ds.files import sha256_of_file
from dialogpt_ds.shards.blocks import MEMBERS, Block, array_from_npy
from dialogpt_ds.shards.manifest import ShardEntry
from dialogpt_ds.shards.reader import DamagedShardError, ShardDirectory, members_of


def missing_or_cut(directory: ShardDirectory) -> Iterator[str]:
    """Yield what a look at the files' sizes tells."""
    for entry in directory.manifest.shardlist:
        problem = entry.problem_in(directory.folder)
        if problem is not None:
            yield f"shard {directory.folder / entry.url} {problem}"


def all_problems(directory: ShardDirectory) -> Iterator[str]:
    """Yield everything that is wrong with the shards: which one, which member, at what offset."""
    yield from missing_or_cut(directory)
    first = 0
    for entry in directory.manifest.shardlist:
        blocks = range(first, first + entry.nsamples)
        first += entry.nsamples
        if (directory.folder / entry.url).is_file():
            yield from _problems_of_shard(directory, directory.folder / entry.url, entry, blocks)
    totals = directory.manifest.totals
    for name, column in (("examples", "examples"), ("tokens", "tokens"), ("target_tokens", "targets")):
        found = int(getattr(directory.index, column).sum())
        if found != totals[name]:
            yield f"{directory.name}: the index has {found:,} {name}, the manifest says {totals[name]:,}"


def _problems_of_shard(directory: ShardDirectory, file: Path, entry: ShardEntry, blocks: range) -> Iterator[str]:
    problems = 0
    with open(file, "rb") as opened:
        shard = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) if file.stat().st_size else b""
        for block in blocks:
            problem = _problem_of_block(directory, memoryview(shard), block)
            if problem is not None:
                problems += 1
                yield problem
    found = sha256_of_file(file)
    if found != entry.sha256 and not problems:
        yield (
            f"shard {file}: sha256 {found}, the manifest says {entry.sha256}; its blocks are whole, something between "
            "them was altered"
        )


def _problem_of_block(directory: ShardDirectory, shard: memoryview, number: int) -> str | None:
    index, place = directory.index, directory.place_of(number)
    try:
        members = members_of(shard, int(index.offset[number]), index.crc32[number], MEMBERS, place)
        tokens, lengths, weights, turns = (array_from_npy(members[name]) for name in MEMBERS)
    except (DamagedShardError, ValueError) as error:
        return str(error)
    if (
        int(turns.sum()) != len(lengths)
        or int(lengths.sum(dtype=np.int64)) != len(tokens)
        or len(lengths) != len(weights)
    ):
        return f"{place}: its members don't belong together"
    block = Block(lengths, weights, turns, tokens)
    found = {
        "examples": block.num_examples,
        "tokens": len(tokens),
        "targets": int(block.example_targets().sum()),
        "weight_sum": float(block.example_weight_sums().sum()),
    }
    for name, value in found.items():
        if value != getattr(index, name)[number]:
            return f"{place}: it has {value:,} {name}, the index says {getattr(index, name)[number]:,}"
    return None
