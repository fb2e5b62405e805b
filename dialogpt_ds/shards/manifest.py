"""The manifest and the index of a shard directory: what is in it, and one fingerprint over all of it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dialogpt_ds.commandline import existing_folder
from dialogpt_ds.errors import UserError
from dialogpt_ds.files import replace_file, replace_text, sha256_of_file, sha256_of_json

MANIFEST = "manifest.json"
INDEX = "index.npz"
REPORT = "report.json"
"""Where everything of the input went; written by preprocessing."""
TOKENIZER = "tokenizer"
"""Folder beside the shards with the tokenizer they were made with, so that training needs no hub."""
FORMAT_NAME = "dialogpt-ds-shards"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class ShardEntry:
    """One tar shard; the names are those of WebDataset's own index files where those have one."""

    url: str
    """File name, relative to the manifest."""
    filesize: int
    """Bytes."""
    sha256: str
    """Of the whole file."""
    nsamples: int
    """Blocks: WebDataset's samples."""
    examples: int
    tokens: int
    target_tokens: int

    def problem_in(self, folder: Path) -> str | None:
        """Say what a look at the file's size tells of the copy in `folder`, or None."""
        file = folder / self.url
        if not file.is_file():
            return "is missing, the manifest lists it"
        size = file.stat().st_size
        if size == self.filesize:
            return None
        return f"has {size:,} bytes, the manifest says {self.filesize:,}: the copy is incomplete or altered"


@dataclass(frozen=True)
class Manifest:
    """What a shard directory holds. No times, hosts or paths: the same input gives the same bytes."""

    tokenizer: dict[str, Any]
    """name, and sha256 of the vocabulary and merges."""
    eos_id: int
    vocab_size: int
    max_seq_length: int
    """No example is longer (tokens)."""
    options: dict[str, Any]
    """What else decided the content: targets, validation split, ..."""
    shardlist: list[ShardEntry]
    index_sha256: str
    totals: dict[str, int]
    """shards, blocks, examples, tokens, target_tokens."""

    def content(self) -> dict[str, Any]:
        """Return everything but the fingerprint, as it stands in the file."""
        return {"format": FORMAT_NAME, "format_version": FORMAT_VERSION, **asdict(self)}

    @property
    def fingerprint(self) -> str:
        """SHA-256 over everything in the manifest, and so, through its checksums, over every token."""
        return sha256_of_json(self.content())

    def write(self, folder: Path) -> None:
        """Write manifest.json by rename; until then the directory is an unfinished one."""
        replace_text(folder / MANIFEST, self.to_text())

    def to_text(self) -> str:
        """Return the content of manifest.json."""
        return json.dumps(self.content() | {"fingerprint": self.fingerprint}, indent=2, ensure_ascii=False) + "\n"


def read_manifest(path: str, what: str) -> Manifest:
    """Read and check the manifest of the shard directory `path`; `what` names the option it came from.

    Raises:
        UserError: no such folder, no manifest, another format, or a manifest that was changed by hand.
    """
    folder = existing_folder(path, what)
    file = folder / MANIFEST
    if not file.is_file():
        raise UserError(f"{what} {path!r} has no {MANIFEST}: {_why_no_manifest(folder)}")
    return parse_manifest(file.read_bytes(), str(file))


def parse_manifest(text: bytes, file: str) -> Manifest:
    """Check the content of the manifest `file`; raises UserError as `read_manifest` does."""
    try:
        content = json.loads(text.decode("utf-8"))
        version = (content.pop("format"), content.pop("format_version"))
        fingerprint = content.pop("fingerprint")
        if version != (FORMAT_NAME, FORMAT_VERSION):
            raise UserError(
                f"{file} is {version[0]} version {version[1]}, this program reads {FORMAT_NAME} version "
                f"{FORMAT_VERSION}: make the shards again, or use the program they were made with"
            )
        manifest = Manifest(**(content | {"shardlist": [ShardEntry(**entry) for entry in content["shardlist"]]}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is not a manifest of this program: {error!r}") from error
    if manifest.fingerprint != fingerprint:
        raise UserError(
            f"{file} was changed after it was written (fingerprint {fingerprint[:12]}, its content gives "
            f"{manifest.fingerprint[:12]}): make the shards again"
        )
    return manifest


def _why_no_manifest(folder: Path) -> str:
    """Say what a folder without a manifest seems to be, and what to do."""
    parts = [name for name in ("train", "validation") if (folder / name / MANIFEST).is_file()]
    if parts:
        return f"its parts have ({', '.join(str(folder / part) for part in parts)}); name one of them"
    if any(folder.glob("shard-*.tar")):
        return "an unfinished run of make_shards.py; run that command again to its end"
    return "it is not a shard directory; make one with preprocess/make_shards.py"


@dataclass(frozen=True, eq=False)
class Index:
    """Where each block lies and how much is in it, so that a plan needs no pass over the tars. All arrays [blocks]."""

    shard: np.ndarray
    """int32, place in the manifest's shardlist."""
    offset: np.ndarray
    """int64, bytes from the start of the tar to the header of the block's first member."""
    size: np.ndarray
    """int64, bytes from there to the end of its last member, padding included."""
    examples: np.ndarray
    """int32."""
    tokens: np.ndarray
    """int64."""
    targets: np.ndarray
    """int64, target tokens."""
    weight_sum: np.ndarray
    """float64, sum of the target tokens' weights."""
    crc32: np.ndarray
    """uint32 [blocks, 4], of each member's content, in the order of blocks.MEMBERS."""

    def write(self, folder: Path) -> None:
        """Write index.npz; NumPy stamps no time into it, so equal content gives equal bytes."""
        with replace_file(folder / INDEX) as file:
            np.savez(file, **vars(self))


def read_index(folder: Path, manifest: Manifest) -> Index:
    """Read the index that belongs to `manifest`.

    Raises:
        UserError: it is missing or is not the one the manifest was written with.
    """
    file = folder / INDEX
    if not file.is_file():
        raise UserError(f"{file} is missing: the shard directory is damaged, copy or make it again")
    found = sha256_of_file(file)
    if found != manifest.index_sha256:
        raise UserError(f"{file} is damaged: sha256 {found}, the manifest says {manifest.index_sha256}")
    with np.load(file, allow_pickle=False) as arrays:
        return Index(**{name: arrays[name] for name in Index.__dataclass_fields__})
