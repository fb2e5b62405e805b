"""What a run is resumed from: the newest checkpoint that is whole, checked against the run, converted if need be."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dialogpt_ds.checkpoints.folder import DAMAGED, CheckpointFolder, DamagedCheckpointError, Summary, difference
from dialogpt_ds.checkpoints.universal import convert
from dialogpt_ds.config.arguments import TrainingArguments
from dialogpt_ds.distributed.collectives import broadcast_from_rank0, gather_reports
from dialogpt_ds.distributed.hang_watch import HangWatch
from dialogpt_ds.distributed.lone_work import Tell, first_works
from dialogpt_ds.distributed.world import World
from dialogpt_ds.errors import UserError
from dialogpt_ds.order.mixture import MixturePosition, order_differences, position_from_state
from dialogpt_ds.training.rank_checks import check_same_run
from dialogpt_ds.training.settings import Settings

ADAM = ("adam", "adamw", "torch_adam")
"""Optimizers whose state is two moments and a step, in lower case."""


@dataclass(frozen=True)
class ResumeChoice:
    """The checkpoint that a run is resumed from."""

    summary: Summary
    bridged: bool
    """Whether it goes through a conversion: it was saved by another number of processes, or with another stage or
    precision."""

    @property
    def step(self) -> int:
        """Its optimizer step."""
        return self.summary.step


def candidates(arguments: TrainingArguments, folder: CheckpointFolder) -> list[int]:
    """Return the steps that the run could be resumed from, the preferred one first.

    Raises:
        UserError: what `--resume` and `--continue_from` ask for isn't there.
    """
    steps = folder.steps()
    if arguments.continue_from:
        if arguments.continue_from not in steps:
            there = ", ".join(f"{step:,}" for step in steps) or "none"
            raise UserError(
                f"--continue_from {arguments.continue_from}: {folder.root} has no checkpoint of that step; it has: "
                f"{there}"
            )
        return [arguments.continue_from]
    if arguments.resume == "never" and steps:
        raise UserError(
            f"--resume never, but {folder.root} holds checkpoints (the last: step {steps[-1]:,}): name another "
            "--output_dir, or delete them"
        )
    if arguments.resume == "must" and not steps:
        raise UserError(
            f"--resume must, but {folder.root} has no complete checkpoint: is --output_dir {arguments.output_dir!r} "
            "right?"
        )
    return steps[::-1]


def preview_resume(settings: Settings) -> int | None:
    """Check what this process alone can, before the ranks come together; returns the step of the preferred checkpoint
    that can be read.

    Raises:
        UserError: there is nothing to resume from that was asked for, or it doesn't fit this run.
    """
    folder = CheckpointFolder(settings.output_dir)
    try:
        steps = candidates(settings.arguments, folder)
    except OSError as error:
        raise UserError(
            f"--output_dir {settings.output_dir} can't be looked into ({error.strerror}: {error.filename}); name one "
            "that you may enter"
        ) from error
    for step in steps:
        try:
            summary = Summary.read(folder.path(step))
        except DamagedCheckpointError:
            continue
        check_fits(settings, folder.path(step), summary)
        return step
    return None


def choose_checkpoint(settings: Settings, device: torch.device, say: Callable[[str], None]) -> ResumeChoice | None:
    """Return the checkpoint to resume from, every byte of it compared with its checksum. Collective: every rank must
    call.

    One that is damaged is set aside, and the one before it is taken.

    Raises:
        UserError: on every rank; all are damaged, or the one that was named is, or it doesn't fit.
    """
    folder = CheckpointFolder(settings.output_dir)
    damages: list[tuple[int, str]] = []
    steps = broadcast_from_rank0(candidates(settings.arguments, folder) if settings.world.is_first else None)
    for step in steps:
        summary, damage = _examined(folder, step, settings.world, device)
        if summary is not None:
            if settings.world.is_first:
                _set_aside(folder, damages, say)
            return ResumeChoice(summary, check_fits(settings, folder.path(step), summary))
        damages.append((step, damage))
    if damages:
        raise UserError(
            "\n".join(f"checkpoint {folder.path(step)} is damaged: {damage}" for step, damage in damages)
            + "\nThere is no other to go on from. Take an older one with --continue_from, restore the files from a "
            "copy, or start another "
            "--output_dir."
        )
    return None


def _examined(folder: CheckpointFolder, step: int, world: World, device: torch.device) -> tuple[Summary | None, str]:
    """Return a checkpoint's summary, or None and what is wrong. Collective: every rank looks at its share of the
    files."""
    path, summary, damage = folder.path(step), None, None
    try:
        summary = Summary.read(path)
        names = sorted(summary.files)[world.rank :: world.size]
        damage = next((found for name in names if (found := difference(path, name, summary.files[name]))), None)
    except DamagedCheckpointError as error:
        damage = str(error)
    damages = gather_reports(damage, device)
    return (None, damages[0]) if damages else (summary, "")


def _set_aside(folder: CheckpointFolder, damages: list[tuple[int, str]], say: Callable[[str], None]) -> None:
    for step, damage in damages:
        aside = folder.set_aside(step, DAMAGED)
        say(
            f"WARNING: the checkpoint of step {step:,} is damaged ({damage}). It is now {aside}; the run goes on from "
            "the one before it."
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
            + ".\nGo on as it was saved, or take its weights alone with --init_checkpoint (launch/export.py writes "
            "them) and another "
            "--output_dir."
        )
    return True


def position_to_resume_from(settings: Settings, order: dict[str, Any]) -> tuple[MixturePosition, list[str]]:
    """Return the first row of the run, and in what the order is another one than the checkpoint's, where that was
    accepted."""
    differences = order_differences(order, settings.order_key)
    if differences and settings.arguments.changed_order == "restart":
        return MixturePosition.start(len(settings.directories)), differences
    return position_from_state(order, settings.order_key), []


@dataclass(frozen=True)
class ResumePoint:
    """What a run is resumed from."""

    choice: ResumeChoice | None
    """None: it starts from nothing."""
    path: Path | None
    """The folder to load: the checkpoint, or its conversion."""
    notes: list[str] = field(default_factory=list)
    """Notes for the user; of rank 0 alone."""


def prepare_resume(settings: Settings, watch: HangWatch, device: torch.device) -> ResumePoint:
    """Put the folder in order, and find and prepare what the run is resumed from. Collective: every rank must call.

    Raises:
        UserError: on every rank; see choose_checkpoint().
        RunError: on every rank; they were not given the same run, the folder can't be put in order, or the checkpoint
            can't be converted.
    """
    folder = CheckpointFolder(settings.output_dir)
    notes: list[str] = []
    first_works(folder.clean, "removing what an earlier process left unfinished", settings.world, watch, device)
    watch.beat("checking the checkpoints")
    choice = choose_checkpoint(settings, device, notes.append)
    check_same_run(settings, None if choice is None else (choice.step, choice.bridged))
    if choice is None:
        return ResumePoint(None, None, notes)
    if settings.arguments.continue_from and settings.world.is_first:
        left = folder.leave_behind(choice.step)
        if left:
            notes.append(
                f"--continue_from {choice.step}: the checkpoints after it are of another history now; renamed to "
                f"{', '.join(left)}"
            )
    path = _converted(settings.world, folder, choice, watch, device) if choice.bridged else folder.path(choice.step)
    return ResumePoint(choice, path, notes)


def _converted(
    world: World, folder: CheckpointFolder, choice: ResumeChoice, watch: HangWatch, device: torch.device
) -> Path:
    """Return the folder of the conversion, which rank 0 makes while the others wait; it alone holds the lock of
    output_dir."""

    def conversion(tell: Tell) -> Path:
        return convert(folder, choice.summary, lambda line: print(line, flush=True), tell)

    doing = f"converting checkpoint {folder.path(choice.step)} for this run"
    return first_works(conversion, doing, world, watch, device)
