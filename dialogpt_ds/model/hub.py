"""What the Hugging Face hub says of a model and its files, and the transfer of a file, gone on with where it broke off."""

import dataclasses
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from huggingface_hub import HfApi, constants, get_session, hf_hub_url, hf_raise_for_status
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,  # its HTTP client's own: of httpx in version 1, of httpx2 in version 2
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers
from tqdm import tqdm

from dialogpt_ds.commandline import Say
from dialogpt_ds.errors import RunError, UserError
from dialogpt_ds.files import replace_text, sha256_of_file

RECORD = "fetched_from.json"
"""Written last into a fetched folder; a folder without it is somebody's own."""
ATTEMPTS = 6
PAUSE_SECONDS = 2.0
"""Before the second attempt, and twice as long before each further one: about a minute in all."""
HUB_SECONDS = 10.0
"""Longest wait for the hub's answer about a repository."""

WEIGHTS = (
    ("model.safetensors", None),
    ("model.safetensors.index.json", r"model-\d{5}-of-\d{5}\.safetensors"),
    ("pytorch_model.bin", None),
    ("pytorch_model.bin.index.json", r"pytorch_model-\d{5}-of-\d{5}\.bin"),
)
"""Files with weights in the order in which transformers looks for them, and the names of the parts that an index lists."""
CONFIG = "config.json"
OPTIONAL_FILES = (
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "chat_template.jinja",
)


class HubUnreachableError(UserError):
    """The hub can't be reached at all: no reason to ask it for the next model."""


@dataclass(frozen=True)
class HubFile:
    """A file of a commit, and how a whole copy of it is known."""

    name: str
    size: int
    """Bytes."""
    kind: str
    """What `checksum` is: sha256, or "git blob sha1" for the small files that the hub keeps in git itself."""
    checksum: str

    @property
    def part_name(self) -> str:
        """Name of a copy that is not complete. It holds the checksum, so another commit's copy is never gone on with."""
        return f"{self.name}.{self.checksum[:12]}.part"

    def difference(self, path: Path) -> str | None:
        """Say how `path` differs from the file; None where it is the same."""
        if not path.is_file():
            return "it is missing"
        size = path.stat().st_size
        if size != self.size:
            return f"it has {size:,} bytes, expected {self.size:,}"
        found = sha256_of_file(path) if self.kind == "sha256" else _git_blob_sha1(path)
        return None if found == self.checksum else f"its {self.kind} is {found}, expected {self.checksum}"


def _git_blob_sha1(path: Path) -> str:
    """Return the name that git gives to a file's content (Pro Git, chapter 10.2): for small files, which are read whole."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Release:
    """One commit of a model's repository: the part of it that is brought here, and the content of fetched_from.json."""

    hub_id: str
    revision: str
    """What was asked for: a branch, a tag or a commit."""
    commit: str
    """What it was when it was asked for."""
    endpoint: str
    """Host that it came from."""
    files: tuple[HubFile, ...]
    parameters: int = 0
    """Parameters of the weights; 0 as long as they aren't here."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @classmethod
    def read(cls, folder: Path) -> "Release":
        """Read the record of a fetched folder.

        Raises:
            UserError: there is none, or it can't be read.
        """
        way_out = "move the folder away, or name another --data_folder"
        try:
            record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            files = [HubFile(name, entry["size"], "sha256", entry["sha256"]) for name, entry in record.pop("files").items()]
            return cls(files=tuple(files), **record)
        except (FileNotFoundError, NotADirectoryError) as error:
            message = f"{folder} is there and was not made by this command (it has no {RECORD}), so it is left as it is: {way_out}"
            raise UserError(message) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder / RECORD} can't be read ({error!r}), so nothing is known of the folder: {way_out}") from error

    def write(self, folder: Path) -> None:
        """Write the record: with the sha256 of every file, so that the folder can be checked without the hub."""
        sums = {f.name: f.checksum if f.kind == "sha256" else sha256_of_file(folder / f.name) for f in self.files}
        files = {file.name: {"size": file.size, "sha256": sums[file.name]} for file in self.files}
        replace_text(folder / RECORD, json.dumps(dataclasses.asdict(self) | {"files": files}, indent=2) + "\n")


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def find_release(hub_id: str, revision: str, say: Say) -> Release:
    """Ask the hub which commit a revision is, and what it says of the files of that commit.

    Raises:
        UserError: the hub can't be reached; it has no such model or revision, or does not give it; there are no weights.
        RunError: the hub answers with errors of its own for a minute.
    """
    info = _ask(hub_id, revision, say)
    files = {sibling.rfilename: sibling for sibling in info.siblings or []}
    names = wanted_files(hub_id, list(files))
    without = [name for name in names if files[name].size is None or not (files[name].lfs or files[name].blob_id)]
    if info.sha is None or without:
        lacks = f"no checksum of {', '.join(without)}" if without else "no commit"
        raise UserError(
            f"{hub_id}: {constants.ENDPOINT} gives {lacks}, so nothing could be checked: set HF_ENDPOINT to another mirror"
        )
    return Release(hub_id, revision, info.sha, urlparse(constants.ENDPOINT).netloc, tuple(_hub_file(files[name]) for name in names))


def wanted_files(hub_id: str, names: Sequence[str]) -> list[str]:
    """Choose what a training needs of a repository's files: weights of one kind, config and vocabulary.

    Raises:
        UserError: there is no config.json, or there are no weights of PyTorch.
    """
    weights: list[str] = []
    for first, parts in WEIGHTS:
        if first in names:
            weights = [first, *sorted(name for name in names if parts and re.fullmatch(parts, name))]
            break
    if CONFIG not in names or not weights:
        lacks = " and no ".join(
            [CONFIG] * (CONFIG not in names) + ["weights (model.safetensors or pytorch_model.bin)"] * (not weights)
        )
        raise UserError(f"{hub_id} has no {lacks}, so it is no model that transformers can load: name another one")
    return [CONFIG, *(name for name in OPTIONAL_FILES if name in names), *weights]


def _hub_file(sibling: Any) -> HubFile:
    if sibling.lfs:
        return HubFile(sibling.rfilename, sibling.lfs.size, "sha256", sibling.lfs.sha256)
    return HubFile(sibling.rfilename, sibling.size, "git blob sha1", sibling.blob_id)


def _ask(hub_id: str, revision: str, say: Say) -> Any:
    """Return what the hub says of a repository; one that can't be reached at all is not asked again."""
    failures = 0
    while True:
        try:
            return HfApi().model_info(hub_id, revision=revision, files_metadata=True, timeout=HUB_SECONDS)
        except (HTTPError, OfflineModeIsEnabled) as error:
            failures += 1
            if not isinstance(error, HfHubHTTPError) or not _may_pass(error) or failures == ATTEMPTS:
                raise _failure(error, hub_id, revision) from error
            _pause(failures, _reason(error), say)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            message = (
                f"{constants.ENDPOINT} answers, and not as a hub does ({error!r}): set HF_ENDPOINT to the hub or a mirror of it"
            )
            raise UserError(message) from error


def transfer(release: Release, file: HubFile, part: Path, say: Say) -> None:
    """Bring a file's bytes into `part`, from where `part` ends. Attempts count from the last one that brought something.

    huggingface_hub's own download begins anew after a process ended, so only its connection is taken: with the endpoint, the
    token, the certificates and the proxies that it knows.
    """
    part.touch()
    failures, most = 0, size_of(part)
    while size_of(part) < file.size:
        reason = "the hub ended the transfer early"
        try:
            _append(hf_hub_url(release.hub_id, file.name, revision=release.commit), part, file)
        except (HTTPError, OfflineModeIsEnabled) as error:
            if not _may_pass(error):
                raise _failure(error, release.hub_id, release.commit) from error
            reason = _reason(error)
        have = size_of(part)
        if have >= file.size:
            break
        failures = 1 if have > most else failures + 1
        most = max(most, have)
        where = f"{file.name} of {release.hub_id} broke off at {have:,} of {file.size:,} bytes ({reason})"
        if failures == ATTEMPTS:
            raise RunError(
                f"{where}, and {ATTEMPTS} attempts brought no more. What is here is kept: the same command goes on from it."
            )
        _pause(failures, where, say)


def _append(url: str, part: Path, file: HubFile) -> None:
    """Ask for the bytes that `part` lacks and write them as they come, so that a kill loses next to nothing of them."""
    start = size_of(part)
    headers = build_hf_headers() | {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
        hf_raise_for_status(response)
        goes_on = response.status_code == 206  # else the server sends the file from its start, whatever it was asked for
        with open(part, "ab" if goes_on else "wb") as copy, _progress_bar(file, start if goes_on else 0) as progress:
            for piece in response.iter_bytes():
                copy.write(piece)
                progress.update(len(piece))
            copy.flush()
            os.fsync(copy.fileno())


def _progress_bar(file: HubFile, done: int) -> "tqdm[Any]":
    terminal = sys.stderr.isatty()
    # A terminal that doesn't know its size (a container's, often) would make tqdm hide the bar.
    unknown = terminal and not all(os.get_terminal_size(sys.stderr.fileno()))
    size: dict[str, Any] = {"ncols": 110, "nrows": 24} if unknown else {"dynamic_ncols": True}
    return tqdm(total=file.size, initial=done, desc=file.name, unit="B", unit_scale=True, disable=not terminal, **size)


def _pause(failures: int, reason: str, say: Say) -> None:
    seconds = PAUSE_SECONDS * 2 ** (failures - 1)
    say(f"{reason}; attempt {failures + 1} of {ATTEMPTS} in {seconds:.0f} s")
    time.sleep(seconds)


def _may_pass(error: Exception) -> bool:
    """Return whether another attempt may have another end."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    return not isinstance(error, OfflineModeIsEnabled)


def _reason(error: Exception) -> str:
    if isinstance(error, HfHubHTTPError):
        return f"{constants.ENDPOINT} answers {error.response.status_code}"
    return str(error) or type(error).__name__


def _failure(error: Exception, hub_id: str, revision: str) -> UserError | RunError:
    """Return the error to raise for one of the hub's client, written for the person who reads it."""
    endpoint = constants.ENDPOINT
    page = f"{endpoint}/{hub_id}"
    by_hand = "run this command on another machine and copy the model's folder into --data_folder by hand"
    if isinstance(error, OfflineModeIsEnabled):
        return UserError(f"HF_HUB_OFFLINE forbids to ask the hub at {endpoint}: unset it, or {by_hand}")
    if not isinstance(error, HfHubHTTPError):
        return HubUnreachableError(
            f"the hub at {endpoint} can't be reached ({_reason(error)}): set HF_ENDPOINT to a mirror that can be reached, or {by_hand}"
        )
    status = error.response.status_code
    if isinstance(error, RevisionNotFoundError):
        return UserError(f"{hub_id} has no branch, tag or commit {revision!r}: give --revision one that {page}/tree/main lists")
    unknown = isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError)
    if unknown or (status == 404 and not isinstance(error, RemoteEntryNotFoundError)):
        return UserError(
            f"{hub_id}: the hub at {endpoint} has no such model, or it is private (it answers {status}): check the name at {page}, or set "
            "HF_TOKEN to a token that may read it"
        )
    if status in (401, 403):
        return UserError(
            f"{hub_id}: the hub at {endpoint} does not give it to you (it answers {status}): accept the model's terms at {page}, and set "
            "HF_TOKEN to a token of that account"
        )
    return RunError(f"{hub_id}: {_reason(error)}. What is here is kept: the same command goes on from it.")
