"""A released model of the Hugging Face hub: brought here file by file, checked, and put into place when it is whole."""

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from huggingface_hub import constants

from dialogpt_ds.commandline import Say
from dialogpt_ds.errors import RunError, UserError
from dialogpt_ds.files import sync_folder
from dialogpt_ds.model.hub import HubFile, Release, find_release, size_of, transfer

Check = Callable[[Path, Sequence[str]], int]


def folder_of(hub_id: str, data_folder: Path) -> Path:
    """Return the folder of a model: that of its name without the owner's."""
    return data_folder / hub_id.split("/")[-1]


def fetch_model(hub_id: str, revision: str | None, data_folder: Path, check: Check, say: Say) -> tuple[Path, Release]:
    """Bring a model into a folder of its own in `data_folder`, or check the one that is there and mend it.

    Args:
        hub_id: owner/name.
        revision: branch, tag or commit; None: main, or whatever a folder that is there came from.
        data_folder: exists and can be written to.
        check: opens the weights of a folder, given the names of its files, and returns the number of parameters.
        say: takes a line about what goes on.

    Raises:
        UserError: the hub can't be reached or has no such model, there is no space, another run is at work, the folder is
            somebody's own.
        RunError: a transfer broke off for good, a file is not what the hub says it is, the weights can't be opened.
    """
    folder = _ModelFolder(data_folder, hub_id, check, say)
    try:
        with folder.locked():
            if os.path.lexists(folder.path):
                return folder.path, folder.mended(revision)
            return folder.path, folder.brought(find_release(hub_id, revision or "main", say))
    except OSError as error:
        raise RunError(f"{folder.path} can't be written or read: {error.strerror or error}") from error


class _ModelFolder:
    """DATA_FOLDER/NAME, and the hidden folder beside it for what is not whole yet."""

    def __init__(self, data_folder: Path, hub_id: str, check: Check, say: Say) -> None:
        self.hub_id = hub_id
        self.path = folder_of(hub_id, data_folder)
        self.unfinished = data_folder / f".unfinished-{self.path.name}"
        self.check = check
        self.say = say

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out; raises UserError where one is at work."""
        path = self.unfinished.with_name(f"{self.unfinished.name}.lock")
        lock = FileLock(path)
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            message = f"{self.path}: another run is fetching it (it holds {path}); wait for its end, or name another --data_folder"
            raise UserError(message) from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            lock.release()

    def brought(self, release: Release) -> Release:
        """Bring all files, and put the folder into place."""
        self._bring(release, release.files)
        release = dataclasses.replace(release, parameters=self.check(self.unfinished, [file.name for file in release.files]))
        release.write(self.unfinished)
        self.unfinished.rename(self.path)
        sync_folder(self.path.parent)
        return release

    def mended(self, revision: str | None) -> Release:
        """Check the folder that is there, and bring again what is damaged."""
        release = Release.read(self.path)
        self._check_same(release, revision)
        damaged = {file: problem for file in release.files if (problem := file.difference(self.path / file.name))}
        if damaged:
            for file, problem in damaged.items():
                self.say(f"{self.path / file.name} is damaged ({problem}); it is fetched again")
            self._bring(release, list(damaged))
            for file in damaged:
                (self.unfinished / file.name).replace(self.path / file.name)
            sync_folder(self.path)
            self.check(self.path, [file.name for file in release.files])
        else:
            self.say(f"{self.path} is complete")
        shutil.rmtree(self.unfinished, ignore_errors=True)
        return release

    def _check_same(self, release: Release, revision: str | None) -> None:
        """Refuse to take a folder for another model than it is; raises UserError."""
        way_out = "move the folder away, or name another --data_folder"
        if release.hub_id != self.hub_id:
            raise UserError(f"{self.path} holds {release.hub_id}, and {self.hub_id} was asked for: {way_out}")
        if revision not in (None, release.revision, release.commit):
            held = f"revision {release.revision} (commit {release.commit})"
            raise UserError(f"{self.path} holds {held}, and --revision {revision} was asked for: {way_out}")

    def _bring(self, release: Release, files: Sequence[HubFile]) -> None:
        """Bring files into the unfinished folder, where those that an earlier run brought are kept."""
        self.unfinished.mkdir(exist_ok=True)
        keep = {name for file in files for name in (file.name, file.part_name)}
        for path in self.unfinished.iterdir():
            if path.name not in keep:
                path.unlink()
        lacking = [file for file in files if file.difference(self.unfinished / file.name)]
        if lacking:
            self._check_space(lacking)
            count = f"{len(lacking)} file{'' if len(lacking) == 1 else 's'}, {sum(file.size for file in lacking) / 1e6:,.1f} MB"
            origin = f"{release.hub_id} at commit {release.commit[:12]} from {constants.ENDPOINT}"
            self.say(f"{self.path}: fetching {count}, of {origin}")
        for file in lacking:
            self._bring_checked(release, file)

    def _check_space(self, files: Sequence[HubFile]) -> None:
        needed = sum(file.size - size_of(self.unfinished / file.part_name) for file in files)
        free = shutil.disk_usage(self.unfinished).free
        if needed > free:
            raise UserError(
                f"{self.hub_id} needs {needed:,} more bytes, and the disk of {self.path.parent} has {free:,} bytes free: make room, "
                "or name another --data_folder"
            )

    def _bring_checked(self, release: Release, file: HubFile) -> None:
        """Bring a file, a second time if its checksum is wrong: an earlier run may have left a damaged part."""
        part = self.unfinished / file.part_name
        for last in (False, True):
            transfer(release, file, part, self.say)
            problem = file.difference(part)
            if problem is None:
                part.replace(self.unfinished / file.name)
                return
            part.unlink()
            if not last:
                self.say(f"{file.name}: {problem}; it is deleted and fetched once more")
        raise RunError(
            f"{file.name} of {release.hub_id} is not what the hub says it is, and was deleted: {problem}. It was fetched twice. A mirror "
            f"or a proxy may alter it: set HF_ENDPOINT to another place than {constants.ENDPOINT}."
        )
