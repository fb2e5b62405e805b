"""The output folder of a preprocessing run: whose it is, what is finished in it, and that one run works in it at a
time."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dialogpt_ds.conversations.inputs import Input
from dialogpt_ds.errors import UserError
from dialogpt_ds.files import replace_text
from dialogpt_ds.preprocessing import parts as part_settings
from dialogpt_ds.preprocessing.arguments import PartShare, ShardArguments, encoding_settings
from dialogpt_ds.preprocessing.balance import REJECTS
from dialogpt_ds.preprocessing.encoding import TRAIN, VALIDATION
from dialogpt_ds.preprocessing.parts import PARTS_FOLDER
from dialogpt_ds.shards.manifest import INDEX, MANIFEST, REPORT

CONFIGURATION = "configuration.json"
LOCK = ".lock"
BEGIN_SECONDS = 60.0
"""How long a share waits for others that begin at the same time."""
CONFIGURATION_KEY = "configuration"
"""Key of it in the report of a finished run."""


def configuration_of(arguments: ShardArguments, inputs: Sequence[Input], vocabulary: str) -> dict[str, Any]:
    """Return everything that decides on the output; files are known by path, size and time."""
    settings = json.loads(json.dumps(asdict(encoding_settings(arguments))))
    return {
        **settings,
        "vocabulary": vocabulary,
        "dedupe": arguments.dedupe,
        "shard_megabytes": arguments.shard_megabytes,
        "part_bytes": part_settings.PART_BYTES,
        "inputs": [_facts_of(source) for source in inputs],
    }


def _facts_of(source: Input) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(json.dumps(source.facts()))
    if source.path != "-":
        stat = Path(source.path).stat()
        facts |= {"path": str(Path(source.path).absolute()), "size": stat.st_size, "modified": stat.st_mtime_ns}
    return facts


class OutputFolder:
    """The output folder of a run, with the folders in it."""

    def __init__(self, arguments: ShardArguments) -> None:
        self.path = Path(arguments.output).expanduser()
        names = (TRAIN, VALIDATION)
        self.splits = (
            {name: self.path / name for name in names} if arguments.validation_fraction else {TRAIN: self.path}
        )
        """The folder with the shards of each split."""

    @property
    def parts(self) -> Path:
        """Folder of the parts."""
        return self.path / PARTS_FOLDER

    def is_finished(self) -> bool:
        """Return whether the shards are finished."""
        return all((folder / MANIFEST).is_file() for folder in self.splits.values())

    @contextmanager
    def locked(self, share: PartShare) -> Iterator[None]:
        """Keep other runs out; those with other shares of --part may work beside this one.

        Raises:
            UserError: another run is at work here.
        """
        name = LOCK if share.of == 1 else f"{LOCK}-part-{share.number}-of-{share.of}"
        lock = self._acquired(name)
        try:
            if share.of == 1:
                for path in self.path.glob(f"{LOCK}-part-*"):
                    self._acquired(path.name).release()
            yield
        finally:
            (self.path / name).unlink(missing_ok=True)
            lock.release()

    def _acquired(self, name: str) -> FileLock:
        lock = FileLock(self.path / name)
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise self._in_use(name) from error
        return lock

    def _in_use(self, name: str) -> UserError:
        holds = f"it holds {self.path / name}"
        return UserError(
            f"--output {self.path}: another run is at work in it ({holds}); wait for its end, or name another folder"
        )

    def prepare(self, configuration: dict[str, Any], share: PartShare) -> str:
        """Make the folder ready for this configuration; returns a notice for the person who runs it, or nothing.

        Shares of one input take turns.

        Raises:
            UserError: as `_prepare` does, or a run that makes shards is at work here.
        """
        if share.of == 1:
            return self._prepare(configuration)
        try:
            with FileLock(self.path / LOCK, timeout=BEGIN_SECONDS):
                return self._prepare(configuration)
        except Timeout as error:
            raise self._in_use(LOCK) from error

    def _prepare(self, configuration: dict[str, Any]) -> str:
        """Look at what the folder holds, and write down what it is for.

        Raises:
            UserError: it holds finished shards, or parts, of another configuration, or files of something else.
        """
        if self.is_finished():
            self._check_same(self._finished_configuration(), configuration, "finished shards")
            self.remove_parts()
            return ""
        file = self.parts / CONFIGURATION
        if file.is_file():
            self._check_same(json.loads(file.read_text(encoding="utf-8")), configuration, "the unfinished run")
            finished = sum(1 for _ in self.parts.glob("part-*.npz"))
            for path in self._shard_files():
                path.unlink()
            return f"{self.path}: going on with an unfinished run, {finished:,} parts of it are there"
        foreign = self._shard_files()
        if foreign:
            raise UserError(
                f"--output {self.path}: {foreign[0]} is there already, and no unfinished run that it could belong to; "
                "name another folder, or delete it"
            )
        self.parts.mkdir(exist_ok=True)
        replace_text(file, json.dumps(configuration, indent=2, ensure_ascii=False) + "\n")
        return ""

    def remove_parts(self) -> None:
        """Remove the parts of finished shards."""
        shutil.rmtree(self.parts, ignore_errors=True)

    def _finished_configuration(self) -> dict[str, Any]:
        try:
            report = json.loads((self.path / REPORT).read_text(encoding="utf-8"))
            return dict(report[CONFIGURATION_KEY])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"--output {self.path} holds finished shards, and its {REPORT} doesn't say of what ({error!r}); name "
                "another folder, or delete them"
            ) from error

    def _shard_files(self) -> list[Path]:
        """Return files with the names that a run writes to."""
        found = []
        for folder in {self.path, *self.splits.values()}:
            names = [*folder.glob("shard-*.tar"), *(folder / name for name in (MANIFEST, INDEX, REPORT, REJECTS))]
            found += [path for path in names if path.is_file()]
        return sorted(found)

    def _check_same(self, theirs: dict[str, Any], mine: dict[str, Any], what: str) -> None:
        different = [
            f"{name}: there {theirs.get(name)!r}, now {mine.get(name)!r}"
            for name in dict.fromkeys([*theirs, *mine])
            if name != "inputs" and theirs.get(name) != mine.get(name)
        ]
        different += _differences_of_inputs(theirs.get("inputs", []), mine["inputs"])
        if different:
            raise UserError(
                f"--output {self.path} holds {what} of another configuration:\n  "
                + "\n  ".join(different)
                + "\nGive the same options and inputs, name another folder, or delete it."
            )


def _differences_of_inputs(theirs: list[dict[str, Any]], mine: list[dict[str, Any]]) -> list[str]:
    if [facts["path"] for facts in theirs] != [facts["path"] for facts in mine]:
        return [f"inputs: there {[facts['path'] for facts in theirs]}, now {[facts['path'] for facts in mine]}"]
    return [
        f"{now['path']}: {name} there {before.get(name)!r}, now {now.get(name)!r}"
        for before, now in zip(theirs, mine, strict=True)
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]
