"""Reading blocks at random from the tars, by the offsets of the index, memory-mapped and checked."""

import mmap
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dialogpt_ds.errors import RunError, UserError
from dialogpt_ds.shards.blocks import MEMBERS, SMALL_MEMBERS, Block, Shape, array_from_npy
from dialogpt_ds.shards.manifest import Index, Manifest, read_index, read_manifest

OPEN_SHARDS = 64
"""Shards that stay mapped at once; a window draws from a few."""
HEADER = 512
"""Bytes of a tar header; content is padded to a multiple of it."""


class DamagedShardError(RunError):
    """A block that can't be read back as it was written."""


class ShardDirectory:
    """A finished shard directory, opened for random access. Nothing is unpacked or copied."""

    def __init__(self, folder: Path, manifest: Manifest, index: Index) -> None:
        self.folder = folder
        self.manifest = manifest
        self.index = index
        self._maps: OrderedDict[int, mmap.mmap] = OrderedDict()

    @classmethod
    def open(cls, path: str, what: str) -> "ShardDirectory":
        """Open the shard directory `path`, named by the option `what`.

        Raises:
            UserError: it is missing, unfinished or damaged as far as a look at file sizes can tell.
        """
        if "://" in path:
            raise UserError(f"{what} {path!r} is remote: this version reads local folders, so copy the shards to one")
        manifest = read_manifest(path, what)
        folder = Path(path).expanduser()
        for shard in manifest.shardlist:
            file = folder / shard.url
            if not file.is_file():
                raise UserError(f"{what} {path!r}: {shard.url} is missing, the manifest lists it; copy or make it again")
            if file.stat().st_size != shard.filesize:
                raise UserError(
                    f"{what} {path!r}: {shard.url} has {file.stat().st_size:,} bytes, the manifest says {shard.filesize:,}: "
                    "the copy is incomplete or altered; copy or make it again"
                )
        return cls(folder, manifest, read_index(path, manifest))

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return len(self.index.shard)

    def shape(self, block: int) -> Shape:
        """Return how the examples of a block are divided, without reading its tokens; raises DamagedShardError."""
        return Shape(*self._arrays(block, SMALL_MEMBERS))

    def block(self, block: int) -> Block:
        """Return a whole block; raises DamagedShardError."""
        return Block(*self._arrays(block, (*SMALL_MEMBERS, MEMBERS[0])))

    def _arrays(self, block: int, names: Sequence[str]) -> list[np.ndarray]:
        contents = self._members(block, names)
        try:
            return [array_from_npy(contents[name]) for name in names]
        except ValueError as error:
            raise DamagedShardError(f"{self._place(block)}: {error}; copy or make the shard again") from error

    def _members(self, block: int, names: Sequence[str]) -> dict[str, memoryview]:
        """Return the wanted members' bytes, each checked against its CRC."""
        region = memoryview(self._map(block))
        position = int(self.index.offset[block])
        found: dict[str, memoryview] = {}
        for number, name in enumerate(MEMBERS):
            try:
                info = tarfile.TarInfo.frombuf(bytes(region[position : position + HEADER]), "utf-8", "strict")
            except tarfile.TarError as error:
                raise DamagedShardError(
                    f"{self._place(block)}, member {name}, offset {position:,}: no tar header ({error}); "
                    "copy or make the shard again"
                ) from error
            content = region[position + HEADER : position + HEADER + info.size]
            if name in names:
                self._check(block, number, info.name, position, content)
                found[name] = content
            position += HEADER + -(-info.size // HEADER) * HEADER
        return found

    def _check(self, block: int, number: int, member: str, position: int, content: memoryview) -> None:
        expected, crc = int(self.index.crc32[block, number]), zlib.crc32(content)
        if not member.endswith(f".{MEMBERS[number]}") or crc != expected:
            raise DamagedShardError(
                f"{self._place(block)}, member {member}, offset {position:,}: checksum {crc:08x}, expected {expected:08x}; "
                "the file was altered or is damaged: copy or make the shard again"
            )

    def _map(self, block: int) -> mmap.mmap:
        shard = int(self.index.shard[block])
        if shard in self._maps:
            self._maps.move_to_end(shard)
            return self._maps[shard]
        try:
            with open(self.folder / self.manifest.shardlist[shard].url, "rb") as file:
                self._maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise DamagedShardError(f"{self._place(block)} can't be opened: {error}; is the disk still there?") from error
        if len(self._maps) > OPEN_SHARDS:
            # Arrays that still point into the map keep it alive; only this reference goes.
            self._maps.popitem(last=False)
        return self._maps[shard]

    def _place(self, block: int) -> str:
        return f"shard {self.folder / self.manifest.shardlist[int(self.index.shard[block])].url}, block {block}"
