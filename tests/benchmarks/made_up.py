"""Made-up shards for benchmarks: lengths like those of real conversations, tokens drawn at random."""

from pathlib import Path

import numpy as np

from dialogpt_ds.files import sha256_of_file
from dialogpt_ds.shards.blocks import EXAMPLES_PER_BLOCK, Block
from dialogpt_ds.shards.manifest import INDEX, Index, Manifest, ShardEntry
from dialogpt_ds.shards.reader import ShardDirectory
from dialogpt_ds.shards.writer import ShardWriter, make_manifest

VOCABULARY = 50_257
LIMIT = 128
FACTS = {
    "name": "gpt2",
    "sha256": "0" * 64,
    "eos_id": VOCABULARY - 1,
    "vocab_size": VOCABULARY,
    "max_seq_length": LIMIT,
}


def lengths_like_real_ones(count: int, seed: int) -> np.ndarray:
    """Return lengths of two-turn examples, [count, 2]: log-normal, mean of both together about 42 tokens as in
    Reddit's, at most LIMIT."""
    random = np.random.default_rng(seed)
    turns = np.ceil(random.lognormal(2.75, 0.75, (count, 2))).astype(np.int64)
    return np.clip(turns, 2, LIMIT // 2)


def made_up_block(seed: int) -> Block:
    """Return a block of two-turn examples, the second turn to be learned."""
    lengths = lengths_like_real_ones(EXAMPLES_PER_BLOCK, seed).ravel()
    return Block(
        turn_lengths=lengths.astype(np.uint16),
        turn_weights=np.tile(np.array([0, 1], np.float32), EXAMPLES_PER_BLOCK),
        turns_per_example=np.full(EXAMPLES_PER_BLOCK, 2, np.uint16),
        tokens=np.random.default_rng(seed).integers(0, VOCABULARY - 1, int(lengths.sum())).astype(np.uint16),
    )


def write_shards(folder: Path, num_blocks: int, shard_bytes: int = 256_000_000) -> ShardDirectory:
    """Write a real shard directory of made-up blocks."""
    writer = ShardWriter(folder, shard_bytes)
    for number in range(num_blocks):
        writer._write(made_up_block(number))
    make_manifest(writer, writer.finish(), FACTS, {}).write(folder)
    return ShardDirectory.open(str(folder), "benchmark")


def write_huge_index(folder: Path, real: ShardDirectory, num_examples: int, blocks_per_shard: int) -> None:
    """Write manifest and index of a corpus of `num_examples`, whose blocks repeat `real`; its tars are holes of the
    right size."""
    folder.mkdir(parents=True)
    blocks = -(-num_examples // EXAMPLES_PER_BLOCK)
    source = np.arange(blocks) % real.num_blocks
    shard = (np.arange(blocks) // blocks_per_shard).astype(np.int32)
    columns = {name: getattr(real.index, name)[source] for name in Index.__dataclass_fields__}
    Index(**(columns | {"shard": shard})).write(folder)
    entries = []
    for number in range(int(shard[-1]) + 1):
        here = shard == number
        size = int(columns["size"][here].sum())
        name = f"shard-{number:06d}.tar"
        with open(folder / name, "wb") as file:
            file.truncate(size)
        sums = [int(columns[column][here].sum()) for column in ("examples", "tokens", "targets")]
        entries.append(ShardEntry(name, size, f"{number:064x}", int(here.sum()), *sums))
    totals = {
        "shards": len(entries),
        "blocks": blocks,
        "examples": sum(entry.examples for entry in entries),
        "tokens": sum(entry.tokens for entry in entries),
        "target_tokens": sum(entry.target_tokens for entry in entries),
    }
    Manifest(
        {"name": FACTS["name"], "sha256": FACTS["sha256"]}, VOCABULARY - 1, VOCABULARY, LIMIT, {}, entries,
        sha256_of_file(folder / INDEX), totals,
    ).write(folder)  # fmt: skip
