"""Damaging shards as disks and copies do."""

from pathlib import Path

from dialogpt_ds.shards.blocks import MEMBERS
from dialogpt_ds.shards.reader import TAR_HEADER, ShardDirectory


def damage_member(directory: ShardDirectory, block: int, member: str) -> tuple[Path, int]:
    """Flip the last bit of a member's content; returns the shard's file and the offset of the member's header."""
    file = directory.folder / directory.manifest.shardlist[int(directory.index.shard[block])].url
    content = bytearray(file.read_bytes())
    position = int(directory.index.offset[block])
    for name in MEMBERS:
        size = int(content[position + 124 : position + 135], 8)
        if name == member:
            content[position + TAR_HEADER + size - 1] ^= 1
            file.write_bytes(bytes(content))
            return file, position
        position += TAR_HEADER + -(-size // TAR_HEADER) * TAR_HEADER
    raise AssertionError(member)
