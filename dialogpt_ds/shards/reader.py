"""Reading blocks at random from the tars, by the offsets of the index, memory-mapped and checked."""

import json
import mmap
import re
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dialogpt_ds.errors import RunError, UserError
from dialogpt_ds.shards.blocks import MEMBERS, SMALL_MEMBERS, Block, Shape, array_from_npy, smallest_dtype
from dialogpt_ds.shards.cache import CacheSettings, LostShardError, ShardCache
from dialogpt_ds.shards.manifest import MANIFEST, REPORT, Index, Manifest, parse_manifest, read_index, read_manifest
from dialogpt_ds.shards.remote import FetchError, address, is_remote, read_small

OPEN_SHARDS = 16
"""Shards that stay mapped at once; a window draws from a few."""
TAR_HEADER = 512
"""Bytes of a tar header; content is padded to a multiple of it."""


_USTAR = re.compile(rb"(?P<name>[^\0]{1,100})\0*.{24}(?P<size>[0-7]{11})\0.{121}ustar.*", re.DOTALL)
"""Name and size in a member's header (POSIX 1003.1, ustar); tarfile's own reader takes half of the time of a plan."""


class DamagedShardError(RunError):
    """A block that can't be read back as it was written."""


class ShardDirectory:
    """A finished shard directory, opened for random access. Nothing is unpacked; only remote shards are copied, to a
    cache."""

    def __init__(
        self, name: str, folder: Path, manifest: Manifest, index: Index, cache: ShardCache | None = None
    ) -> None:
        self.name = name
        """As it was given: a path or a remote address."""
        self.folder = folder
        """Where manifest, index, tokenizer and (for a remote directory, some) shards lie on this machine."""
        self.manifest = manifest
        self.index = index
        self.cache = cache
        self._maps: OrderedDict[int, mmap.mmap] = OrderedDict()

    @classmethod
    def open(cls, path: str, what: str, cache: CacheSettings | None = None) -> "ShardDirectory":
        """Open the shard directory `path`, named by the option `what`; `cache` says where shards of a remote one are
        kept.

        Raises:
            UserError: it is missing, unfinished or damaged as far as a look at file sizes can tell.
        """
        if is_remote(path):
            return cls._open_remote(path, what, cache)
        path = path.removeprefix("file://")
        manifest = read_manifest(path, what)
        folder = Path(path).expanduser()
        for shard in manifest.shardlist:
            problem = shard.problem_in(folder)
            if problem is not None:
                raise UserError(f"{what} {path!r}: {shard.url} {problem}; copy or make it again")
        return cls(path, folder, manifest, read_index(folder, manifest))

    @classmethod
    def _open_remote(cls, url: str, what: str, settings: CacheSettings | None) -> "ShardDirectory":
        if settings is None:
            raise UserError(f"{what} {url!r} is remote, and this command reads local folders: copy it here")
        try:
            manifest = parse_manifest(read_small(url, MANIFEST), address(url, MANIFEST))
            cache = ShardCache(url, manifest, settings)
            cache.open_directory()
        except FetchError as error:
            raise UserError(f"{what} {url!r}: {error}. Is it a shard directory that this machine may read?") from error
        except OSError as error:
            raise UserError(f"--cache_dir {str(settings.folder)!r} can't be written to: {error}") from error
        return cls(url, cache.folder, manifest, read_index(cache.folder, manifest), cache)

    def report(self) -> dict[str, Any] | None:
        """Return what making the shards reported; None where that can't be read."""
        try:
            text = (self.folder / REPORT).read_bytes() if self.cache is None else read_small(self.name, REPORT)
            return dict(json.loads(text))
        except (OSError, FetchError, ValueError, TypeError):
            return None

    @property
    def token_dtype(self) -> np.dtype:
        """Type of stored tokens."""
        return smallest_dtype(self.manifest.vocab_size)

    def largest_shards(self, number: int) -> int:
        """Return how many bytes the `number` largest shards have."""
        return sum(sorted((shard.filesize for shard in self.manifest.shardlist), reverse=True)[:number])

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
        region = memoryview(self._map(block))
        contents = members_of(
            region, int(self.index.offset[block]), self.index.crc32[block], names, self.place_of(block)
        )
        try:
            return [array_from_npy(contents[name]) for name in names]
        except ValueError as error:
            raise DamagedShardError(f"{self.place_of(block)}: {error}; copy or make the shard again") from error

    def _map(self, block: int) -> mmap.mmap:
        shard = int(self.index.shard[block])
        try:
            if self.cache is None:
                self._check_file(shard)
            if shard in self._maps:
                self._maps.move_to_end(shard)
                return self._maps[shard]
            with open(self._file(shard), "rb") if self.cache is None else self.cache.open(shard) as file:
                self._maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except LostShardError as error:
            raise DamagedShardError(f"{self.place_of(block)}: {error}") from error
        except (OSError, ValueError) as error:
            raise DamagedShardError(
                f"{self.place_of(block)} can't be opened: {error}; is the disk still there?"
            ) from error
        if len(self._maps) > OPEN_SHARDS:
            # Arrays that still point into the map keep it alive; only this reference goes.
            self._maps.popitem(last=False)
        return self._maps[shard]

    def _file(self, shard: int) -> Path:
        return self.folder / self.manifest.shardlist[shard].url

    def _check_file(self, shard: int) -> None:
        """Look at a local file before each use: reading a map beyond the end of its file would kill the process."""
        size, expected = self._file(shard).stat().st_size, self.manifest.shardlist[shard].filesize
        if size != expected:
            raise ValueError(f"it has {size:,} bytes, expected {expected:,}")

    def place_of(self, block: int) -> str:
        """Return how messages name a block."""
        shard = int(self.index.shard[block])
        where = self._file(shard) if self.cache is None else address(self.name, self.manifest.shardlist[shard].url)
        return f"shard {where}, block {block}"


def members_of(
    shard: memoryview, position: int, sums: np.ndarray, names: Sequence[str], place: str
) -> dict[str, memoryview]:
    """Return the wanted members of a block, each checked against its CRC.

    Args:
        shard: the whole tar, or what there is of it.
        position: where the block's first header begins.
        sums: [4] uint32, the CRC-32 of each member's content.
        names: of blocks.MEMBERS, what is wanted.
        place: how messages name the block.

    Raises:
        DamagedShardError: a header or a content is not what was written.
    """
    found: dict[str, memoryview] = {}
    for name, expected in zip(MEMBERS, sums.tolist(), strict=True):
        where = f"{place}, member {name}, offset {position:,}"
        header = _USTAR.fullmatch(shard[position : position + TAR_HEADER])
        if header is None:
            ends = f"; the file ends at {len(shard):,}" if position + TAR_HEADER > len(shard) else ""
            raise DamagedShardError(f"{where}: no tar header{ends}; copy or make the shard again")
        size = int(header["size"], 8)
        if name in names:
            content = shard[position + TAR_HEADER : position + TAR_HEADER + size]
            full_name = header["name"].decode("utf-8", "replace")
            crc = zlib.crc32(content)
            if not full_name.endswith(f".{name}") or crc != expected:
                ends = f"; the file ends at {len(shard):,}" if len(content) < size else ""
                raise DamagedShardError(
                    f"{place}, member {full_name}, offset {position:,}: checksum {crc:08x}, expected "
                    f"{expected:08x}{ends}; the file was altered or is damaged: copy or make the shard again"
                )
            found[name] = content
        position += TAR_HEADER + -(-size // TAR_HEADER) * TAR_HEADER
    return found
