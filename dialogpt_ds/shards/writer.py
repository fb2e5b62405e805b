"""Writing blocks into tar shards: the same examples give the same bytes."""

import os
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
from webdataset import TarWriter

from dialogpt_ds.files import sha256_of_file
from dialogpt_ds.shards.blocks import EXAMPLES_PER_BLOCK, MEMBERS, Block, join_blocks
from dialogpt_ds.shards.manifest import INDEX, Index, Manifest, ShardEntry


class ShardWriter:
    """Collects examples into blocks and blocks into shards of at most `shard_bytes`."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.folder = folder
        self.shard_bytes = shard_bytes
        self.waiting: list[Block] = []
        self.num_waiting = 0
        self.shards: list[ShardEntry] = []
        self.rows: dict[str, list[Any]] = {name: [] for name in Index.__dataclass_fields__}
        self.file: IO[bytes] | None = None
        self.tar: TarWriter | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, block: Block) -> None:
        """Take examples in order; whole blocks of EXAMPLES_PER_BLOCK are written at once."""
        if not block.num_examples:
            return
        self.waiting.append(block)
        self.num_waiting += block.num_examples
        if self.num_waiting < EXAMPLES_PER_BLOCK:
            return
        joined = join_blocks(self.waiting)
        whole = self.num_waiting - self.num_waiting % EXAMPLES_PER_BLOCK
        for start in range(0, whole, EXAMPLES_PER_BLOCK):
            self._write(joined.examples(start, start + EXAMPLES_PER_BLOCK))
        self.waiting = [joined.examples(whole, self.num_waiting)]
        self.num_waiting -= whole

    def finish(self) -> Index:
        """Write what is left, close the last shard and write the index."""
        if self.num_waiting:
            self._write(join_blocks(self.waiting))
            self.waiting, self.num_waiting = [], 0
        self._close_shard()
        dtypes = {"shard": np.int32, "examples": np.int32, "weight_sum": np.float64, "crc32": np.uint32}
        index = Index(**{name: np.array(rows, dtypes.get(name, np.int64)) for name, rows in self.rows.items()})
        index.write(self.folder)
        return index

    def _write(self, block: Block) -> None:
        members = block.to_members()
        # A member takes a header of 512 bytes and its content, padded to 512.
        size = sum(512 + -(-len(content) // 512) * 512 for content in members.values())
        if self.tar is not None and self.tar.tarstream.offset + size > self.shard_bytes:
            self._close_shard()
        if self.tar is None:
            self._open_shard()
        assert self.tar is not None
        offset = self.tar.tarstream.offset
        self.tar.write({"__key__": f"{len(self.rows['shard']):08d}", **members})
        assert self.tar.tarstream.offset == offset + size, (self.tar.tarstream.offset, offset, size)
        row = {
            "shard": len(self.shards),
            "offset": offset,
            "size": size,
            "examples": block.num_examples,
            "tokens": len(block.tokens),
            "targets": int(block.example_targets().sum()),
            "weight_sum": float(block.example_weight_sums().sum()),
            "crc32": [zlib.crc32(members[name]) for name in MEMBERS],
        }
        for name, value in row.items():
            self.rows[name].append(value)

    def _open_shard(self) -> None:
        self.file = open(self.folder / shard_name(len(self.shards)), "wb")  # noqa: SIM115 (closed in _close_shard)
        # A fixed owner and no time: two runs over the same input differ in no byte.
        self.tar = TarWriter(self.file, encoder=False, user="root", group="root", mode=0o444, mtime=0)

    def _close_shard(self) -> None:
        if self.file is None or self.tar is None:
            return
        self.tar.close()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        path = self.folder / shard_name(len(self.shards))
        first = sum(shard.nsamples for shard in self.shards)
        blocks = len(self.rows["shard"]) - first
        examples, tokens, targets = (sum(self.rows[name][first:]) for name in ("examples", "tokens", "targets"))
        self.shards.append(
            ShardEntry(path.name, path.stat().st_size, sha256_of_file(path), blocks, examples, tokens, targets)
        )
        self.file = self.tar = None


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{number:06d}.tar"


def make_manifest(writer: ShardWriter, index: Index, tokenizer: dict[str, Any], options: dict[str, Any]) -> Manifest:
    """Describe what a finished writer has written; `tokenizer` is name, sha256, eos_id, vocab_size, max_seq_length."""
    return Manifest(
        tokenizer={"name": tokenizer["name"], "sha256": tokenizer["sha256"]},
        eos_id=tokenizer["eos_id"],
        vocab_size=tokenizer["vocab_size"],
        max_seq_length=tokenizer["max_seq_length"],
        options=options,
        shardlist=writer.shards,
        index_sha256=sha256_of_file(writer.folder / INDEX),
        totals={
            "shards": len(writer.shards),
            "blocks": len(index.shard),
            "examples": int(index.examples.sum()),
            "tokens": int(index.tokens.sum()),
            "target_tokens": int(index.targets.sum()),
        },
    )
