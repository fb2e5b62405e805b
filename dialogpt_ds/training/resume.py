"""What a run goes on from: the newest checkpoint that is whole, checked against the run, for one run at a time."""

import socket
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from dialogpt_ds.checkpoints.folder import DAMAGED, CheckpointFolder, DamagedCheckpointError, Summary, difference
from dialogpt_ds.distributed.collectives import all_gathered, all_reports, from_first
from dialogpt_ds.errors import UserError
from dialogpt_ds.files import appears, rename_problem
from dialogpt_ds.order.mixture import MixturePosition, order_differences, position_from_state
from dialogpt_ds.training.settings import Settings

LOCK = ".lock"
LOCK_SECONDS = 20.0
"""How long a run waits for the lock: loader processes of one that was killed hold it for a few seconds more."""
TOKEN_SECONDS = 15.0
"""How long another node may take to see a new file on a shared disk."""
ADAM = ("adam", "adamw", "torch_adam")
"""Optimizers whose state is two moments and a step, in lower case."""


@dataclass(frozen=True)
class Choice:
    """The checkpoint that a run goes on from."""

    summary: Summary
    bridged: bool
    """Whether it goes through a conversion: it was saved by another number of processes, or with another stage or precision."""

    @property
    def step(self) -> int:
        """Its optimizer step."""
        return self.summary.step


def lock_output(settings: Settings) -> FileLock:
    """Keep other runs out of output_dir for as long as this process lives; rank 0 only.

    Raises:
        UserError: another run is at work in it.
    """
    lock = FileLock(settings.output_dir / LOCK)
    try:
        lock.acquire(timeout=LOCK_SECONDS, poll_interval=0.5)
    except Timeout as error:
        raise UserError(
            f"--output_dir {settings.output_dir}: another run is at work in it (it holds {settings.output_dir / LOCK}); wait for its "
            "end, or name another folder"
        ) from error
    return lock


def check_renames(settings: Settings) -> None:
    """Refuse an output_dir in which no checkpoint could be saved, now rather than after save_step steps. Collective: every rank must call.

    Raises:
        UserError: on every rank.
    """
    problem = from_first(rename_problem(settings.output_dir) if settings.world.is_first else "")
    if problem:
        raise UserError(
            f"--output_dir {settings.output_dir}: {problem}. A checkpoint is written and flushed there, and gets its name by the rename of "
            "its folder once it is whole, so none could be saved. Name a folder on a local disk, NFS or Lustre; a mounted bucket (s3fs, "
            "gcsfuse, Mountpoint for S3) is for copies of it"
        )


def check_shared(settings: Settings) -> None:
    """Refuse an output_dir that is not one place for all ranks. Collective: every rank must call.

    Raises:
        UserError: on every rank, with the ranks and hosts that don't see what rank 0 writes there.
    """
    first = settings.world.is_first
    token = settings.output_dir / f".token-{from_first(uuid.uuid4().hex)}"
    if first:
        token.write_text("")
    all_gathered(None)  # now it is there
    sees = appears(token, TOKEN_SECONDS)
    seen = all_gathered((socket.gethostname(), sees))
    blind = [(rank, host) for rank, (host, saw) in enumerate(seen) if not saw]
    if first:
        with suppress(OSError):  # where files can be made and not removed, check_renames() has something to say
            token.unlink(missing_ok=True)
    if blind:
        hosts = sorted({host for _, host in blind})
        raise UserError(
            f"--output_dir {settings.output_dir} is not one folder for all processes: what rank 0 writes on {seen[0][0]} is not seen "
            f"by rank {', '.join(str(rank) for rank, _ in blind)} on {', '.join(hosts)}. A checkpoint would be scattered over the nodes' "
            "own disks. Name a folder on a disk that all nodes share (NFS, Lustre), under the same path on each."
        )


def candidates(settings: Settings, folder: CheckpointFolder) -> list[int]:
    """Return the steps that the run could go on from, the preferred one first.

    Raises:
        UserError: what `--resume` and `--continue_from` ask for isn't there.
    """
    arguments, steps = settings.arguments, folder.steps()
    if arguments.continue_from:
        if arguments.continue_from not in steps:
            there = ", ".join(f"{step:,}" for step in steps) or "none"
            raise UserError(
                f"--continue_from {arguments.continue_from}: {folder.root} has no checkpoint of that step; it has: {there}"
            )
        return [arguments.continue_from]
    if arguments.resume == "never" and steps:
        raise UserError(
            f"--resume never, but {folder.root} holds checkpoints (the last: step {steps[-1]:,}): name another --output_dir, or delete them"
        )
    if arguments.resume == "must" and not steps:
        raise UserError(
            f"--resume must, but {folder.root} has no complete checkpoint: is --output_dir {arguments.output_dir!r} right?"
        )
    return steps[::-1]


def first_look(settings: Settings) -> int | None:
    """Check what this process alone can, before the ranks come together; returns the step of the preferred checkpoint that can be read.

    Raises:
        UserError: there is nothing to go on from that was asked for, or it doesn't fit this run.
    """
    folder = CheckpointFolder(settings.output_dir)
    try:
        steps = candidates(settings, folder)
    except OSError as error:
        raise UserError(
            f"--output_dir {settings.output_dir} can't be looked into ({error.strerror}: {error.filename}); name one that you may enter"
        ) from error
    for step in steps:
        try:
            summary = Summary.read(folder.path(step))
        except DamagedCheckpointError:
            continue
        check_fits(settings, folder.path(step), summary)
        return step
    return None


def choose(settings: Settings, device: torch.device, say: Callable[[str], None]) -> Choice | None:
    """Return the checkpoint to go on from, every byte of it compared with its checksum. Collective: every rank must call.

    One that is damaged is set aside, and the one before it is taken.

    Raises:
        UserError: on every rank; all are damaged, or the one that was named is, or it doesn't fit.
    """
    folder = CheckpointFolder(settings.output_dir)
    damages: list[tuple[int, str]] = []
    steps = from_first(candidates(settings, folder) if settings.world.is_first else None)
    for step in steps:
        summary, damage = _examined(folder, step, settings, device)
        if summary is not None:
            if settings.world.is_first:
                _set_aside(folder, damages, say)
            return Choice(summary, check_fits(settings, folder.path(step), summary))
        damages.append((step, damage))
    if damages:
        raise UserError(
            "\n".join(f"checkpoint {folder.path(step)} is damaged: {damage}" for step, damage in damages)
            + "\nThere is no other to go on from. Take an older one with --continue_from, restore the files from a copy, or start another "
            "--output_dir."
        )
    return None


def _examined(folder: CheckpointFolder, step: int, settings: Settings, device: torch.device) -> tuple[Summary | None, str]:
    """Return a checkpoint's summary, or None and what is wrong. Collective: every rank looks at its share of the files."""
    path, summary, damage = folder.path(step), None, None
    try:
        summary = Summary.read(path)
        names = sorted(summary.files)[settings.world.rank :: settings.world.size]
        damage = next((found for name in names if (found := difference(path, name, summary.files[name]))), None)
    except DamagedCheckpointError as error:
        damage = str(error)
    damages = all_reports(damage, device)
    return (None, damages[0]) if damages else (summary, "")


def _set_aside(folder: CheckpointFolder, damages: list[tuple[int, str]], say: Callable[[str], None]) -> None:
    for step, damage in damages:
        aside = folder.set_aside(step, DAMAGED)
        say(
            f"WARNING: the checkpoint of step {step:,} is damaged ({damage}). It is now {aside}; the run goes on from the one before it."
        )


def check_fits(settings: Settings, path: Path, summary: Summary) -> bool:
    """Check that a checkpoint is of this run; returns whether it must be converted first.

    Raises:
        UserError: names what differs and what is possible.
    """
    mine = settings.model.shape()
    shapes = [(name, theirs, mine.get(name)) for name, theirs in summary.model_shape.items()]
    different = [f"{name}: checkpoint {theirs!r}, now {now!r}" for name, theirs, now in shapes if theirs != now]
    if different:
        raise UserError(
            f"checkpoint {path} is of model {summary.model!r}, this run has {settings.model.name!r}:\n  "
            + "\n  ".join(different)
            + "\nGive the same --model, or another --output_dir; no option makes weights of one shape fit another."
        )
    if settings.arguments.changed_order == "stop":
        position_from_state(summary.order, settings.order_key)
    return _must_be_bridged(settings, path, summary)


def _must_be_bridged(settings: Settings, path: Path, summary: Summary) -> bool:
    layout = settings.layout()
    theirs = {
        "processes": summary.world_size,
        "ZeRO stage": summary.zero_stage,
        "precision": summary.precision,
        **summary.optimizer["layout"],
    }
    different = [name for name, value in layout.items() if theirs.get(name) != value]
    if layout["ZeRO stage"] == 0 and theirs["ZeRO stage"] == 0 and different == ["processes"]:
        return False  # every process has everything
    if not different:
        return False
    reasons = []
    for what, type_, device in (
        ("the checkpoint", summary.optimizer["type"], theirs["optimizer state on"]),
        ("this run", settings.optimizer_type, layout["optimizer state on"]),
    ):
        if type_.lower() not in ADAM:
            reasons.append(f"{what} has optimizer {type_}; only the state of Adam and AdamW can be converted")
        if device == "nvme":
            reasons.append(f"{what} keeps the optimizer's state on NVMe, which can't be converted")
    if reasons:
        raise UserError(
            f"checkpoint {path} was saved with another layout of its state:\n  "
            + "\n  ".join(f"{name}: checkpoint {theirs.get(name)!r}, now {layout[name]!r}" for name in different)
            + "\nand can't be converted to this run's: "
            + "; ".join(reasons)
            + ".\nGo on as it was saved, or take its weights alone with --init_checkpoint (launch/export.py writes them) and another "
            "--output_dir."
        )
    return True


def position_to_go_on_from(settings: Settings, order: dict[str, Any]) -> tuple[MixturePosition, list[str]]:
    """Return the first row of the run, and in what the order is another one than the checkpoint's, where that was accepted."""
    differences = order_differences(order, settings.order_key)
    if differences and settings.arguments.changed_order == "restart":
        return MixturePosition.start(len(settings.directories)), differences
    return position_from_state(order, settings.order_key), []
