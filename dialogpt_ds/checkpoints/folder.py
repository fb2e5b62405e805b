"""The folder of a run's checkpoints: what is complete in it, what the pointers say, what is deleted."""

import functools
import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dialogpt_ds.config.precision import Precision
from dialogpt_ds.files import remove_folder, replace_text, sha256_of_file, sha256_of_json, sync_folder

CHECKPOINTS = "checkpoints"
LATEST, BEST = "latest", "best"
SUMMARY = "checkpoint.json"
SUMMARY_VERSION = 1
"""Version of the summary; raised when its meaning changes."""
OWN_SUM = "sha256_of_this"
"""Key of the SHA-256 of the rest of the summary, as canonical JSON."""
UNFINISHED, REPLACED, LEFT, DAMAGED, UNIVERSAL = "unfinished-", "replaced-", "left-", "damaged-", "universal-"
"""Prefixes of folders that are being written, are about to be replaced, were left behind by --continue_from, were found
damaged, or hold a checkpoint converted for another number of processes or ZeRO stage."""


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint of an optimizer step."""
    return f"step-{step:08d}"


def step_of(name: str) -> int:
    """Return the step in a folder name; raises ValueError where it has none."""
    prefix, _, number = name.rpartition("-")
    if prefix != "step":
        raise ValueError(name)
    return int(number)


@dataclass(frozen=True)
class Summary:
    """checkpoint.json: what a checkpoint is of, and the size and SHA-256 of each of its files."""

    step: int
    world_size: int
    zero_stage: int
    precision: Precision
    optimizer: dict[str, Any]
    """Type of the optimizer, where its state lives, and the number of updates it has made."""
    model: str
    model_shape: dict[str, Any]
    order: dict[str, Any]
    run: dict[str, Any] = field(default_factory=dict)
    """What a model card says: data, settings, figures."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Path below the checkpoint -> {"size", "sha256"}."""
    format: int = SUMMARY_VERSION

    def write(self, folder: Path) -> None:
        """Write it as the last file of a checkpoint."""
        content = vars(self) | {OWN_SUM: sha256_of_json(json.loads(json.dumps(vars(self))))}
        replace_text(folder / SUMMARY, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Summary":
        """Read it.

        Raises:
            DamagedCheckpointError: it is missing, or is no summary of this version.
        """
        try:
            content = dict(json.loads((folder / SUMMARY).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise DamagedCheckpointError(f"{folder / SUMMARY} can't be read: {error}") from error
        if content.pop(OWN_SUM, None) != sha256_of_json(content):
            raise DamagedCheckpointError(
                f"{folder / SUMMARY} is not as it was written: its content has another SHA-256"
            )
        if content.get("format") != SUMMARY_VERSION:
            raise DamagedCheckpointError(
                f"{folder / SUMMARY} has format {content.get('format')}, this version reads {SUMMARY_VERSION}"
            )
        return cls(**content)


class DamagedCheckpointError(Exception):
    """A checkpoint that is not as it was written; the message names the file and how it differs."""


def sums_of(file: Path) -> dict[str, Any]:
    """Return a file's size and SHA-256 as a summary keeps them."""
    return {"size": file.stat().st_size, "sha256": sha256_of_file(file)}


def difference(folder: Path, name: str, expected: dict[str, Any]) -> str | None:
    """Return how a file of a checkpoint differs from what its summary says; None where it doesn't."""
    file = folder / name
    try:
        size = file.stat().st_size
        if size != expected["size"]:
            return f"{name} has {size:,} bytes, {expected['size']:,} were written"
        found = sha256_of_file(file)
    except OSError as error:
        return f"{name}: {error.strerror or error}"
    if found != expected["sha256"]:
        return f"{name} has SHA-256 {found[:12]}, {expected['sha256'][:12]} was written"
    return None


class CheckpointFolder:
    """`output_dir/checkpoints`. What changes it is for rank 0 only."""

    def __init__(self, output_dir: Path) -> None:
        self.root = output_dir / CHECKPOINTS

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, oldest first. What has the name of one was complete when it got it."""
        steps = []
        for path in self.root.glob("step-*"):
            try:
                steps.append(step_of(path.name))
            except ValueError:
                continue
        return sorted(steps)

    def path(self, step: int) -> Path:
        """Return where the checkpoint of a step lies."""
        return self.root / checkpoint_name(step)

    def unfinished(self, name: str) -> Path:
        """Return where something is written before it gets its name."""
        return self.root / f"{UNFINISHED}{name}"

    def pointer(self, name: str) -> int | None:
        """Return the step that `latest` or `best` points to, None where there is no such pointer."""
        try:
            return step_of((self.root / name).read_text(encoding="utf-8").strip())
        except (OSError, ValueError):
            return None

    def point(self, name: str, step: int) -> None:
        """Let `latest` or `best` point to a step."""
        replace_text(self.root / name, checkpoint_name(step) + "\n")

    def publish(self, unfinished: Path, name: str) -> None:
        """Give a finished folder its name. One of that name, where there is one, is there until the new one is."""
        target, old = self.root / name, self.root / f"{REPLACED}{name}"
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        unfinished.rename(target)
        sync_folder(self.root)
        shutil.rmtree(old, ignore_errors=True)

    def clean(self, tell: Callable[[str], None] = lambda doing: None) -> None:
        """Remove what an earlier process was killed in the middle of, and take back what it was about to replace.

        A conversion that was killed has left a file for every parameter and rank; `tell` is called after each file.
        """
        for path in self.root.glob(f"{REPLACED}*"):
            target = self.root / path.name.removeprefix(REPLACED)
            if target.exists():
                remove_folder(path, functools.partial(tell, f"removing {path}"))
            else:
                path.rename(target)
        for path in self.root.glob(f"{UNFINISHED}*"):
            remove_folder(path, functools.partial(tell, f"removing {path}"))
        newest = max(self.steps(), default=None)
        if newest is not None and self.pointer(LATEST) != newest:
            self.point(LATEST, newest)

    def set_aside(self, step: int, prefix: str) -> Path:
        """Rename a checkpoint, so that it is none any more but is kept; `best` does not point to it any more. Returns
        where it is."""
        path = self.path(step)
        names = (f"{prefix}{path.name}{f'-{number}' if number > 1 else ''}" for number in itertools.count(1))
        target = next(target for name in names if not (target := path.with_name(name)).exists())
        path.rename(target)
        if self.pointer(BEST) == step:
            (self.root / BEST).unlink()
        return target

    def leave_behind(self, step: int) -> list[str]:
        """Set the checkpoints after `step` aside, which is resumed from: they belong to another history; returns their
        new names."""
        left = [self.set_aside(later, LEFT).name for later in self.steps() if later > step]
        self.point(LATEST, step)
        return left

    def rotate(self, keep: int) -> None:
        """Delete the oldest checkpoints beyond `keep`, never the best or the last one; 0 keeps all.

        Conversions of any but the last go too.
        """
        steps = self.steps()
        kept = {self.pointer(BEST), max(steps, default=None)}
        for step in steps[:-keep] if keep else []:
            if step not in kept:
                # Without its name it is no checkpoint any more, also where a kill leaves half of it.
                gone = self.unfinished(f"deleted-{checkpoint_name(step)}")
                self.path(step).rename(gone)
                shutil.rmtree(gone)
        for path in self.root.glob(f"{UNIVERSAL}*"):
            if path.name != f"{UNIVERSAL}{checkpoint_name(max(steps, default=0))}":
                shutil.rmtree(path)
