"""Made-up shard directories whose tokens tell which example they are, and the rows that a stream makes of them."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np

from dialogpt_ds.order.batches import RankSlice, rank_step
from dialogpt_ds.order.mixture import GlobalBatch, Mixture, MixtureKey, MixturePosition
from dialogpt_ds.order.position import OrderKey, SkippedBlock
from dialogpt_ds.shards.blocks import make_block
from dialogpt_ds.shards.manifest import TOKENIZER, Index
from dialogpt_ds.shards.reader import ShardDirectory
from dialogpt_ds.shards.writer import ShardWriter, make_manifest

EOS = 0
ROW = 32
"""Tokens of a row."""

Row = tuple[int, ...]


def directory_of(
    folder: Path, num_examples: int, examples_per_block: int, shard_bytes: int, seed: int = 0, first_id: int = 1
) -> ShardDirectory:
    """Write examples of three turns; every token of example number n but its EOS is `first_id` + n."""
    random = np.random.default_rng(seed)
    writer = ShardWriter(folder, shard_bytes)
    for start in range(0, num_examples, examples_per_block):
        examples = []
        for number in range(start, min(start + examples_per_block, num_examples)):
            turns = [
                ([first_id + number] * int(random.integers(1, 6)) + [EOS], float(random.choice([0.0, 0.5, 1.0])))
                for _ in range(3)
            ]
            examples.append([(turns[0][0], 0.0), turns[1], (turns[2][0], 1.0)])
        writer._write(make_block(examples, np.dtype(np.uint16), ROW))
    index: Index = writer.finish()
    facts = {"name": "made up", "sha256": "0", "eos_id": EOS, "vocab_size": 60_000, "max_seq_length": ROW}
    make_manifest(writer, index, facts, {}).write(folder)
    return ShardDirectory.open(str(folder), "test")


def key_of(
    directories: list[ShardDirectory],
    weights: tuple[int, ...] = (1,),
    seed: int = 1,
    window: int = 4,
    packed: bool = True,
) -> MixtureKey:
    """Return the key of an order with small windows."""
    return MixtureKey(tuple(OrderKey(d.manifest.fingerprint, seed, ROW, window, packed) for d in directories), weights)


def mixture_of(
    directories: list[ShardDirectory],
    key: MixtureKey | None = None,
    skipped: tuple[tuple[SkippedBlock, ...], ...] | None = None,
) -> Mixture:
    """Return a fresh stream, as a resumed process makes it."""
    return Mixture(directories, key or key_of(directories), skipped or ((),) * len(directories))


def contents(batch: GlobalBatch) -> list[Row]:
    """Return each row of a batch as its tokens."""
    step = rank_step(batch, RankSlice(0, 1, batch.rows.num_rows, 1), ROW, EOS)
    return [tuple(row) for row in step.micro_batches[0].input_ids.tolist()]


def first_rows(stream: Mixture, count: int, position: MixturePosition | None = None) -> list[Row]:
    """Return the `count` rows from a position on."""
    return contents(stream.batch(position or MixturePosition.start(len(stream.streams)), count))


def epoch_rows(stream: Mixture, epochs: int = 1) -> list[Row]:
    """Return all rows of the first epochs of a stream of one source."""
    rows, position = [], MixturePosition.start()
    while position.sources[0].epoch < epochs:
        batch = stream.batch(position, 1)
        rows += contents(batch)
        position = batch.position_after
    return rows


def examples_in(rows: list[Row]) -> Counter[int]:
    """Return in how many rows each example lies, by its id."""
    return Counter(token for row in rows for token in set(row) - {EOS})


def ids_of_block(directory: ShardDirectory, block: int) -> set[int]:
    """Return the ids of a block's examples."""
    return set(directory.block(block).tokens.tolist()) - {EOS}


def in_small_blocks(source: Path, folder: Path, examples_per_block: int, shard_bytes: int) -> ShardDirectory:
    """Write the examples of a shard directory anew, in so many blocks that an epoch of them has several windows."""
    whole = ShardDirectory.open(str(source), "test")
    writer = ShardWriter(folder, shard_bytes)
    for number in range(whole.num_blocks):
        block = whole.block(number)
        for start in range(0, block.num_examples, examples_per_block):
            writer._write(block.examples(start, min(start + examples_per_block, block.num_examples)))
    facts = whole.manifest.tokenizer | {
        "eos_id": whole.manifest.eos_id,
        "vocab_size": whole.manifest.vocab_size,
        "max_seq_length": whole.manifest.max_seq_length,
    }
    make_manifest(writer, writer.finish(), facts, {}).write(folder)
    shutil.copytree(source / TOKENIZER, folder / TOKENIZER)
    return ShardDirectory.open(str(folder), "test")
