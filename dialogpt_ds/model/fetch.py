"""A released model of the Hugging Face hub in a folder of its own: brought file by file, and put into place when it is
whole."""

import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock, Timeout
from huggingface_hub import constants

from dialogpt_ds.commandline import Say
from dialogpt_ds.errors import RunError, UserError
from dialogpt_ds.files import sync_folder
from dialogpt_ds.model.hub import WAY_OUT, HubFile, Release, download, find_release
from dialogpt_ds.model.weight_files import check_weights


def folder_of(hub_id: str, data_folder: Path) -> Path:
    """Return the folder of a model: that of its name without the owner's."""
    return data_folder / hub_id.split("/")[-1]


def fetch_model(hub_id: str, revision: str | None, data_folder: Path, say: Say) -> tuple[Path, Release]:
    """Bring a model into a folder of its own in `data_folder`, or check the one that is there and mend it.

    Args:
        hub_id: owner/name.
        revision: branch, tag or commit; None: main, or whatever a folder that is there came from.
        data_folder: exists and can be written to.
        say: takes a line about what goes on.

    Raises:
        UserError: the hub can't be reached or has no such model, there is no space, another run is at work, the folder
            is somebody's own.
        RunError: a transfer broke off for good, a file is not what the hub says it is, the weights can't be opened.
    """
    folder = _ModelFolder(hub_id, folder_of(hub_id, data_folder), say)
    lock = data_folder / f"{folder.unfinished.name}.lock"
    try:
        with FileLock(lock, blocking=False):
            try:
                return folder.path, folder.fetched(revision)
            finally:
                lock.unlink(missing_ok=True)
    except Timeout as error:
        way_out = "wait for its end, or name another --data_folder"
        raise UserError(f"{folder.path}: another run is fetching it (it holds {lock}); {way_out}") from error
    except OSError as error:
        raise RunError(f"{folder.path} can't be written or read: {error.strerror or error}") from error


class _ModelFolder:
    """DATA_FOLDER/NAME, and the hidden folder beside it for what is not whole yet."""

    def __init__(self, hub_id: str, path: Path, say: Say) -> None:
        self.hub_id = hub_id
        self.path = path
        self.unfinished = path.with_name(f".unfinished-{path.name}")
        self.say = say

    def fetched(self, revision: str | None) -> Release:
        """Bring all files and put the folder into place, or mend the one that is there."""
        if os.path.lexists(self.path):
            return self._mended(revision)
        release = find_release(self.hub_id, revision or "main", self.say)
        self._bring(release, release.files)
        release = dataclasses.replace(release, parameters=check_weights(self.unfinished, release.names))
        release.write(self.unfinished)
        self.unfinished.rename(self.path)
        sync_folder(self.path.parent)
        return release

    def _mended(self, revision: str | None) -> Release:
        """Check the folder that is there, and bring again what is damaged."""
        release = Release.read(self.path)
        if release.hub_id != self.hub_id:
            raise UserError(f"{self.path} holds {release.hub_id}, and {self.hub_id} was asked for: {WAY_OUT}")
        if revision not in (None, release.revision, release.commit):
            held = f"revision {release.revision} (commit {release.commit})"
            raise UserError(f"{self.path} holds {held}, and --revision {revision} was asked for: {WAY_OUT}")
        damaged = {file: problem for file in release.files if (problem := file.difference(self.path / file.name))}
        for file, problem in damaged.items():
            self.say(f"{self.path / file.name} is damaged ({problem}); it is fetched again")
        if damaged:
            self._bring(release, list(damaged))
            for file in damaged:
                (self.unfinished / file.name).replace(self.path / file.name)
            sync_folder(self.path)
            check_weights(self.path, release.names)
        else:
            self.say(f"{self.path} is complete")
        shutil.rmtree(self.unfinished, ignore_errors=True)
        return release

    def _bring(self, release: Release, files: Sequence[HubFile]) -> None:
        """Bring files into the unfinished folder, where those that an earlier run brought are kept."""
        self.unfinished.mkdir(exist_ok=True)
        self._keep(files)
        lacking = [file for file in files if file.difference(self.unfinished / file.name)]
        needed, free = sum(file.size for file in lacking), shutil.disk_usage(self.unfinished).free
        if needed > free:
            space = f"needs {needed:,} more bytes, and the disk of {self.path.parent} has {free:,} bytes free"
            raise UserError(f"{self.hub_id} {space}: make room, or name another --data_folder")
        if lacking:
            count = f"{len(lacking)} file{'' if len(lacking) == 1 else 's'}, {needed / 1e6:,.1f} MB"
            origin = f"{release.hub_id} at commit {release.commit[:12]} from {constants.ENDPOINT}"
            self.say(f"{self.path}: fetching {count}, of {origin}")
        try:
            for file in lacking:
                self._bring_checked(release, file)
        finally:
            self._keep(files)

    def _keep(self, files: Sequence[HubFile]) -> None:
        """Remove what is not one of these: another commit's files, and what the library left of a transfer that was
        killed."""
        for path in self.unfinished.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name not in {file.name for file in files}:
                path.unlink()

    def _bring_checked(self, release: Release, file: HubFile) -> None:
        """Bring a file, a second time if its checksum is wrong."""
        path = self.unfinished / file.name
        for again in ("; it is deleted and fetched once more", ""):
            path.unlink(missing_ok=True)
            download(release, file.name, self.unfinished, self.say)
            problem = file.difference(path)
            if problem is None:
                with open(path, "rb") as copy:
                    os.fsync(copy.fileno())  # the library does not, and a power cut may come
                return
            if again:
                self.say(f"{file.name}: {problem}{again}")
        path.unlink()
        by = (
            "It was fetched twice. A mirror or a proxy may alter it: set HF_ENDPOINT to another place than "
            f"{constants.ENDPOINT}."
        )
        raise RunError(
            f"{file.name} of {release.hub_id} is not what the hub says it is, and was deleted: {problem}. {by}"
        )
