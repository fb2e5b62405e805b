"""Checkpoints that are complete or absent: written aside, summed, renamed, and only then pointed to."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dialogpt_ds.errors import UserError
from dialogpt_ds.files import replace_text, sha256_of_file, sync_folder
from dialogpt_ds.order.mixture import position_from_state
from dialogpt_ds.training.settings import Settings

FOLDER = "checkpoints"
LATEST, BEST = "latest", "best"
SUMMARY = "checkpoint.json"
CLIENT_STATE = "dialogpt_ds"
"""Key of our part of DeepSpeed's client state: plain types only."""


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint of an optimizer step."""
    return f"step-{step:08d}"


@dataclass(frozen=True)
class FoundCheckpoint:
    """A complete checkpoint that fits this run."""

    path: Path
    step: int


def save_checkpoint(engine: Any, settings: Settings, state: dict[str, Any], step: int) -> Path:
    """Save everything a resume needs. Collective: every rank must call.

    DeepSpeed writes its files into a folder that nothing points to; rank 0 adds sizes and checksums, renames it, moves `latest`,
    and only then deletes what keep_checkpoints no longer keeps.
    """
    root = settings.output_dir / FOLDER
    name = checkpoint_name(step)
    unfinished = root / f"unfinished-{name}"
    if settings.world.is_first:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(unfinished, ignore_errors=True)
    torch.distributed.barrier()
    engine.save_checkpoint(str(root), tag=unfinished.name, client_state={CLIENT_STATE: state}, save_latest=False)
    torch.distributed.barrier()
    if settings.world.is_first:
        summary = {
            "step": step,
            "world_size": settings.world.size,
            "zero_stage": settings.zero_stage,
            "precision": settings.precision,
            "model": settings.model.name,
            "model_shape": settings.model.shape(),
            "order": state["order"],
            "files": {str(f.relative_to(unfinished)): _sums(f) for f in sorted(unfinished.rglob("*")) if f.is_file()},
        }
        replace_text(unfinished / SUMMARY, json.dumps(summary, indent=2) + "\n")
        shutil.rmtree(root / name, ignore_errors=True)
        unfinished.rename(root / name)
        sync_folder(root)
        replace_text(root / LATEST, name + "\n")
        _rotate(root, settings.arguments.keep_checkpoints)
    torch.distributed.barrier()
    return root / name


def mark_best(settings: Settings, step: int) -> None:
    """Point `best` to a checkpoint; rank 0 only."""
    replace_text(settings.output_dir / FOLDER / BEST, checkpoint_name(step) + "\n")


def _sums(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256_of_file(path)}


def _pointer(root: Path, name: str) -> str | None:
    file = root / name
    return file.read_text(encoding="utf-8").strip() if file.is_file() else None


def _rotate(root: Path, keep: int) -> None:
    """Delete the oldest checkpoints beyond `keep`, never the best one; 0 keeps all."""
    complete = sorted(path for path in root.glob("step-*") if (path / SUMMARY).is_file())
    kept = {_pointer(root, BEST), _pointer(root, LATEST)}
    for path in complete[:-keep] if keep else []:
        if path.name not in kept:
            shutil.rmtree(path)


def find_checkpoint(settings: Settings) -> FoundCheckpoint | None:
    """Return the checkpoint to go on from, checked as far as one process can; None to start from scratch.

    Raises:
        UserError: what `--resume` and `--continue_from` ask for isn't there, is damaged, or was saved by another kind of run.
    """
    arguments = settings.arguments
    root = settings.output_dir / FOLDER
    latest = _pointer(root, LATEST)
    if arguments.continue_from:
        name = checkpoint_name(arguments.continue_from)
        if not (root / name / SUMMARY).is_file():
            there = ", ".join(sorted(path.name for path in root.glob("step-*"))) or "none"
            raise UserError(
                f"--continue_from {arguments.continue_from}: {root / name} is no complete checkpoint; there are: {there}"
            )
        return _checked(settings, root / name)
    if arguments.resume == "never" and latest is not None:
        raise UserError(f"--resume never, but {root} holds checkpoints ({latest}): name another --output_dir, or delete them")
    if latest is None:
        if arguments.resume == "must":
            raise UserError(
                f"--resume must, but {root} has no complete checkpoint: is --output_dir {arguments.output_dir!r} right?"
            )
        return None
    return _checked(settings, root / latest)


def _checked(settings: Settings, path: Path) -> FoundCheckpoint:
    try:
        summary = json.loads((path / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"checkpoint {path} is damaged: {SUMMARY} can't be read ({error}); try --continue_from an older step"
        ) from error
    mine = {"world_size": settings.world.size, "zero_stage": settings.zero_stage, "precision": settings.precision}
    theirs = {name: summary[name] for name in mine}
    if mine != theirs:
        raise UserError(
            f"checkpoint {path} was saved by {theirs['world_size']} processes with ZeRO-{theirs['zero_stage']} in {theirs['precision']}, "
            f"this run has {mine['world_size']} with ZeRO-{mine['zero_stage']} in {mine['precision']}. It can be gone on with only as it "
            "was saved; or take its weights along with --init_checkpoint and another --output_dir."
        )
    shapes = [(name, theirs, settings.model.shape().get(name)) for name, theirs in summary["model_shape"].items()]
    different = [f"{name}: checkpoint {theirs!r}, now {mine!r}" for name, theirs, mine in shapes if theirs != mine]
    if different:
        raise UserError(
            f"checkpoint {path} is of model {summary['model']!r}, this run has {settings.model.name!r}:\n  "
            + "\n  ".join(different)
            + "\nGive the same --model, or another --output_dir."
        )
    position_from_state(summary["order"], settings.order_key)
    if settings.world.is_first:
        for name, expected in summary["files"].items():
            file = path / name
            found = _sums(file) if file.is_file() else None
            if found != expected:
                raise UserError(
                    f"checkpoint {path} is damaged: {name} is {found or 'missing'}, {SUMMARY} says {expected}; "
                    "go on from an older one with --continue_from"
                )
    return FoundCheckpoint(path, summary["step"])


def load_checkpoint(engine: Any, found: FoundCheckpoint) -> dict[str, Any]:
    """Load a checkpoint into the engine and return our state. Collective: every rank must call."""
    path, client_state = engine.load_checkpoint(str(found.path.parent), tag=found.path.name)
    assert path is not None and CLIENT_STATE in client_state, (path, sorted(client_state or {}))
    assert engine.global_steps == found.step, (engine.global_steps, found.step)
    return client_state[CLIENT_STATE]
