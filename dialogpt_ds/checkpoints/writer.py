"""Saving: all ranks write beside the place, then one rename makes it a checkpoint; one that fails leaves nothing
behind."""

import hashlib
import os
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine

from dialogpt_ds.checkpoints.folder import LATEST, SUMMARY, CheckpointFolder, Summary, checkpoint_name, sums_of
from dialogpt_ds.distributed.collectives import all_gather, gather_reports
from dialogpt_ds.files import sync_folder

CLIENT_STATE = "dialogpt_ds"
"""Key of our part of DeepSpeed's client state: plain types only."""
UNIVERSAL_INFO = {"universal_checkpoint_version": 0.2}
"""What DeepSpeed's converter wants to find of a model without tensor parallelism."""


class SaveError(Exception):
    """A checkpoint could not be written; nothing is left of it. Raised on all ranks, with the message of the first."""


class SummingFile:
    """A binary file that takes its own SHA-256 while it is written.

    Its `write` never raises: torch's writer, which is C++, could end the process.
    """

    def __init__(self, path: Path) -> None:
        self.failure: OSError | None = None
        self.size = 0
        self._digest = hashlib.sha256()
        self._file = open(path, "wb")  # noqa: SIM115 (closed in close)

    def write(self, data: Any) -> int:
        """Append bytes; after a failure they are counted and dropped."""
        view = memoryview(data).cast("B")
        self.size += len(view)
        if self.failure is None:
            try:
                self._file.write(view)
                self._digest.update(view)
            except OSError as error:
                self.failure = error
        return len(view)

    def flush(self) -> None:
        """Nothing to do before close."""

    def close(self) -> dict[str, Any]:
        """Bring everything to the disk; returns size and SHA-256. Raises OSError, also that of an earlier write."""
        try:
            if self.failure is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            try:
                self._file.close()
            except OSError as error:
                self.failure = self.failure or error
        if self.failure is not None:
            raise self.failure
        return {"size": self.size, "sha256": self._digest.hexdigest()}


class SummingEngine(CheckpointEngine):
    """Takes the place of DeepSpeed's checkpoint engine during a save.

    DeepSpeed meets at barriers between the files of a checkpoint; a rank that raised before one would leave the others
    waiting. So what goes wrong is kept until all of them are through.
    """

    def __init__(self, beat: Callable[[str], None]) -> None:
        super().__init__()
        self.name = type(self).__name__
        self.sums: dict[Path, dict[str, Any]] = {}
        """Of the files that this rank wrote."""
        self.failure: str | None = None
        self._beat = beat

    @contextmanager
    def guarded(self, what: str) -> Any:
        """Keep an error of the file system instead of raising it."""
        try:
            yield
        except OSError as error:
            self.failure = self.failure or f"{what}: {error.strerror or error}"

    def create(self, info: CheckpointCommitInfo) -> None:
        """Nothing to do."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder."""
        with self.guarded(path):
            os.makedirs(path, exist_ok=exist_ok)

    def save(self, state_dict: Any, path: str) -> None:
        """Write one file."""
        self._beat(f"saving {Path(path).name}")
        if self.failure is not None:
            return
        with self.guarded(path):
            file = SummingFile(Path(path))
            try:
                torch.save(state_dict, cast(Any, file))
            finally:
                sums = file.close()
            self.sums[Path(path)] = sums

    def load(self, path: str, map_location: Any = None) -> Any:
        """Not for loading."""
        raise NotImplementedError

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Nothing to do: the rename commits."""
        return True


def save_checkpoint(
    engine: Any,
    folder: CheckpointFolder,
    summary: Summary,
    client_state: dict[str, Any],
    write_model: Callable[[Path], None],
    keep: int,
    beat: Callable[[str], None],
) -> Path:
    """Save everything that a resume needs. Collective: every rank must call.

    Args:
        engine: DeepSpeed's.
        folder: where to.
        summary: of this checkpoint, without its files.
        client_state: ours, plain types.
        write_model: writes what an export needs beside the weights into a folder; called on rank 0.
        keep: checkpoints that are kept.
        beat: told what is being done, for the watch over hangs.

    Raises:
        SaveError: on every rank; training can go on, and the last complete checkpoint is what it was.
    """
    first = torch.distributed.get_rank() == 0
    name = checkpoint_name(summary.step)
    unfinished = folder.unfinished(name)
    writer = SummingEngine(beat)
    if first:
        with writer.guarded(str(folder.root)):
            folder.root.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
    _agree(writer, engine.device, unfinished, first)
    _let_deepspeed_write(engine, writer, folder.root, unfinished.name, client_state)
    if first:
        with writer.guarded(str(unfinished)):
            write_model(unfinished)
    _agree(writer, engine.device, unfinished, first)
    written = {path: sums for theirs in all_gather(writer.sums) for path, sums in theirs.items()}
    if first:
        beat("completing the checkpoint")
        with writer.guarded(str(unfinished)):
            _complete(folder, unfinished, replace(summary, files=_files(unfinished, written)), name, keep)
    _agree(writer, engine.device, unfinished, first)
    return folder.path(summary.step)


def _let_deepspeed_write(
    engine: Any, writer: SummingEngine, root: Path, tag: str, client_state: dict[str, Any]
) -> None:
    usual = engine.checkpoint_engine
    engine.checkpoint_engine = writer
    # DeepSpeed's recovery scripts are left out: launch/export.py does their work, also for ZeRO-0 and tied weights.
    engine._copy_recovery_script = lambda save_path: None
    try:
        engine.save_checkpoint(
            str(root),
            tag=tag,
            client_state={CLIENT_STATE: client_state, "universal_checkpoint_info": UNIVERSAL_INFO},
            save_latest=False,
        )
    finally:
        engine.checkpoint_engine = usual
        del engine._copy_recovery_script


def _files(unfinished: Path, written: dict[Path, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the sums of all files by name; those that weren't taken while they were written are taken now."""
    files = {}
    for file in sorted(unfinished.rglob("*")):
        if file.is_file() and file.name != SUMMARY:
            files[file.relative_to(unfinished).as_posix()] = written.get(file) or sums_of(file)
    missing = [str(path) for path in written if path.relative_to(unfinished).as_posix() not in files]
    if missing:
        raise OSError(
            f"rank 0 doesn't see what another rank wrote ({missing[0]}): is output_dir on one disk for all nodes?"
        )
    return files


def _complete(folder: CheckpointFolder, unfinished: Path, summary: Summary, name: str, keep: int) -> None:
    for file in unfinished.rglob("*"):
        if file.is_dir():
            sync_folder(file)
    summary.write(unfinished)
    folder.publish(unfinished, name)
    folder.point(LATEST, summary.step)
    folder.rotate(keep)


def _agree(writer: SummingEngine, device: torch.device, unfinished: Path, first: bool) -> None:
    """Raise SaveError on all ranks where one has failed, after the remains are gone. Collective: every rank must
    call."""
    failures = gather_reports(writer.failure, device)
    if not failures:
        return
    if first:
        shutil.rmtree(unfinished, ignore_errors=True)
    torch.distributed.barrier()
    raise SaveError(failures[0])
