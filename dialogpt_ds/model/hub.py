"""What the Hugging Face hub says of a model, and huggingface_hub's download of a file, with its errors in words for a
person."""

import dataclasses
import json
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import urlparse

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,  # its HTTP client's own: of httpx in version 1, of httpx2 in version 2
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils import tqdm
from huggingface_hub.utils.sha import git_hash

from dialogpt_ds.commandline import Say
from dialogpt_ds.errors import RunError, UserError
from dialogpt_ds.files import replace_text, sha256_of_file

_Answer = TypeVar("_Answer")
RECORD = "fetched_from.json"
"""Written last into a fetched folder; a folder without it is somebody's own."""
WAY_OUT = "move the folder away, or name another --data_folder"
HUB_ATTEMPTS = 6
HUB_PAUSE_SECONDS = 2.0
"""Before the second attempt, and twice as long before each further one: about a minute in all."""
LISTING_SECONDS = 10.0
"""Longest wait for the hub's answer about a repository."""
WEIGHTS = (
    ("model.safetensors", None),
    ("model.safetensors.index.json", r"model-\d{5}-of-\d{5}\.safetensors"),
    ("pytorch_model.bin", None),
    ("pytorch_model.bin.index.json", r"pytorch_model-\d{5}-of-\d{5}\.bin"),
)
"""Files with weights in the order in which transformers looks for them, and the names of the parts that an index
lists."""
CONFIG = "config.json"
OPTIONAL_FILES = (
    "generation_config.json", "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip

# Plain HTTP, which every mirror has: Xet asks further hosts, which whoever needs a mirror often can't reach.
constants.HF_HUB_DISABLE_XET = True
hub_logging.set_verbosity_error()  # its warnings hold signed addresses of files


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

    def difference(self, path: Path) -> str | None:
        """Say how `path` differs from the file; None where it is the same.

        verify_repo_checksums does it with a hub at hand alone; a fetched folder is checked without one, too.
        """
        if not path.is_file():
            return "it is missing"
        size = path.stat().st_size
        if size != self.size:
            return f"it has {size:,} bytes, expected {self.size:,}"
        found = sha256_of_file(path) if self.kind == "sha256" else git_hash(path.read_bytes())
        return None if found == self.checksum else f"its {self.kind} is {found}, expected {self.checksum}"


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
    def names(self) -> list[str]:
        """Names of the files."""
        return [file.name for file in self.files]

    @classmethod
    def read(cls, folder: Path) -> "Release":
        """Read the record of a fetched folder; raises UserError where there is none, or it can't be read."""
        try:
            record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            files = [
                HubFile(name, entry["size"], "sha256", entry["sha256"]) for name, entry in record.pop("files").items()
            ]
            return cls(files=tuple(files), **record)
        except (FileNotFoundError, NotADirectoryError) as error:
            message = (
                f"{folder} is there and was not made by this command (it has no {RECORD}), so it is left as it "
                f"is: {WAY_OUT}"
            )
            raise UserError(message) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{folder / RECORD} can't be read ({error!r}), so nothing is known of the folder: {WAY_OUT}"
            ) from error

    def write(self, folder: Path) -> None:
        """Write the record: with the sha256 of every file, so that the folder can be checked without the hub."""
        sums = {f.name: f.checksum if f.kind == "sha256" else sha256_of_file(folder / f.name) for f in self.files}
        files = {file.name: {"size": file.size, "sha256": sums[file.name]} for file in self.files}
        replace_text(folder / RECORD, json.dumps(dataclasses.asdict(self) | {"files": files}, indent=2) + "\n")


def find_release(hub_id: str, revision: str, say: Say) -> Release:
    """Ask the hub which commit a revision is, and what it says of the files of that commit.

    Raises:
        UserError: the hub can't be reached; it has no such model or revision, or does not give it; there are no
            weights.
        RunError: the hub answers with errors of its own for a minute.
    """

    def ask() -> Release:
        info = HfApi().model_info(hub_id, revision=revision, files_metadata=True, timeout=LISTING_SECONDS)
        siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}
        files = tuple(_hub_file(siblings[name]) for name in wanted_files(hub_id, list(siblings)))
        if info.sha is None:
            raise ValueError("no commit")
        return Release(hub_id, revision, info.sha, urlparse(constants.ENDPOINT).netloc.rpartition("@")[2], files)

    return _patiently(ask, hub_id, revision, say)


def wanted_files(hub_id: str, names: Sequence[str]) -> list[str]:
    """Choose what a training needs of a repository's files: weights of one kind, config and vocabulary.

    Raises:
        UserError: there is no config.json, or there are no weights of PyTorch.
    """
    first, parts = next(((first, parts) for first, parts in WEIGHTS if first in names), (None, None))
    if CONFIG not in names or first is None:
        lacking = [CONFIG] * (CONFIG not in names) + ["weights (model.safetensors or pytorch_model.bin)"] * (
            first is None
        )
        raise UserError(
            f"{hub_id} has no {' and no '.join(lacking)}, so it is no model that transformers can load: name another "
            "one"
        )
    weights = [first, *sorted(name for name in names if parts and re.fullmatch(parts, name))]
    return [CONFIG, *(name for name in OPTIONAL_FILES if name in names), *weights]


def _hub_file(sibling: Any) -> HubFile:
    if sibling.lfs:
        return HubFile(sibling.rfilename, sibling.lfs.size, "sha256", sibling.lfs.sha256)
    if sibling.size is None or not sibling.blob_id:
        raise ValueError(f"no checksum of {sibling.rfilename}")
    return HubFile(sibling.rfilename, sibling.size, "git blob sha1", sibling.blob_id)


def download(release: Release, name: str, folder: Path, say: Say) -> None:
    """Bring a file into `folder`, where the library keeps notes of its own in .cache; what is there by then is not
    looked at.

    snapshot_download does this for each file of a repository. It also asks for the list again, waits for that without
    end, goes on without an answer in a folder that holds something, and draws bars without names, also where there is
    no terminal.

    Raises:
        UserError: the hub does not give the file.
        RunError: the transfer broke off for good.
    """
    columns, lines = shutil.get_terminal_size()  # 80 x 24 where a terminal does not know: there tqdm would hide the bar

    def bar(**options: Any) -> Any:
        return tqdm(**options | {"desc": name, "disable": None, "ncols": columns, "nrows": lines})

    def ask() -> str:
        return hf_hub_download(
            release.hub_id, name, revision=release.commit, local_dir=folder,
            cache_dir=folder / ".cache",  # so nothing is taken from elsewhere
            tqdm_class=cast(Any, bar),  # a class, it says, and takes what makes a bar
        )  # fmt: skip

    _patiently(ask, release.hub_id, release.commit, say, f"{name} of {release.hub_id} broke off")


def _patiently(ask: Callable[[], _Answer], hub_id: str, revision: str, say: Say, broken: str = "") -> _Answer:
    """Ask the hub, and again after an error that may pass; `broken` begins what is said of a transfer."""
    attempt = 1
    while True:
        try:
            return ask()
        except (HTTPError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk's
            tried_again = isinstance(error, LocalEntryNotFoundError)  # by the library, five times, before it says this
            cause = error.__cause__ if tried_again and error.__cause__ else error
            failure = _failure(cause, hub_id, revision, broken)
            if isinstance(failure, UserError) or tried_again or attempt == HUB_ATTEMPTS:
                raise failure from error
            seconds = HUB_PAUSE_SECONDS * 2 ** (attempt - 1)
            attempt += 1
            say(f"{_reason(cause, broken)}; attempt {attempt} of {HUB_ATTEMPTS} in {seconds:.0f} s")
            time.sleep(seconds)


def _reason(error: BaseException, broken: str) -> str:
    if isinstance(error, HfHubHTTPError):
        return f"{constants.ENDPOINT} answers {error.response.status_code}"
    said = (str(error).splitlines() or [type(error).__name__])[0]
    said = said.partition(" ((…)")[0]  # the end of a signed address follows
    return f"{broken} ({said})" if broken else said


def _failure(error: BaseException, hub_id: str, revision: str, broken: str) -> UserError | RunError:
    """Return the error for a person to read: a RunError where it may pass."""
    endpoint, reason = constants.ENDPOINT, _reason(error, broken)
    page = f"{endpoint}/{hub_id}"
    by_hand = "run this command on another machine and copy the model's folder into --data_folder by hand"
    if isinstance(error, OfflineModeIsEnabled):
        return UserError(f"HF_HUB_OFFLINE forbids to ask the hub at {endpoint}: unset it, or {by_hand}")
    if not isinstance(error, (HTTPError, OSError)) or isinstance(error, FileMetadataError):
        return UserError(
            f"{endpoint} answers, and not as a hub does ({error!r}): set HF_ENDPOINT to the hub or a mirror of it"
        )
    if not isinstance(error, HfHubHTTPError):
        if broken:
            return RunError(f"{reason}. The files that are whole are kept: the same command brings the others.")
        message = (
            f"the hub at {endpoint} can't be reached ({reason}): set HF_ENDPOINT to a mirror that can be "
            f"reached, or {by_hand}"
        )
        return HubUnreachableError(message)
    status = error.response.status_code
    if isinstance(error, RevisionNotFoundError):
        return UserError(
            f"{hub_id} has no branch, tag or commit {revision!r}: give --revision one that {page}/tree/main lists"
        )
    unknown = isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError)
    if unknown or (status == 404 and not isinstance(error, RemoteEntryNotFoundError)):
        problem = f"has no such model, or it is private (it answers {status}): check the name at {page}"
        return UserError(f"{hub_id}: the hub at {endpoint} {problem}, or set HF_TOKEN to a token that may read it")
    if status in (401, 403):
        problem = f"does not give it to you (it answers {status}): accept the model's terms at {page}"
        return UserError(f"{hub_id}: the hub at {endpoint} {problem}, and set HF_TOKEN to a token of that account")
    return RunError(f"{hub_id}: {reason}. What is here is kept: the same command goes on from it.")
