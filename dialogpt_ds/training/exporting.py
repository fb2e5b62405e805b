"""The export of the model at the end of a run."""

import shutil
from pathlib import Path
from typing import Any

import torch

from dialogpt_ds.distributed.lone_work import Tell, first_works
from dialogpt_ds.export.card import model_card
from dialogpt_ds.export.folder import FOLDER, Probe, gather_weights, probe, write_export
from dialogpt_ds.order.mixture import MixturePosition
from dialogpt_ds.training.saver import Saver
from dialogpt_ds.training.state import ProgressState


def export_model(
    engine: Any, saver: Saver, state: ProgressState, position: MixturePosition, device: torch.device
) -> tuple[Path, list[str]]:
    """Write output_dir/model in the training precision; returns where, and warnings. Collective: every rank must call.

    Raises:
        RunError: on all ranks, where it can't be written, or loads back differently.
    """
    settings = saver.settings
    folder = settings.output_dir / FOLDER
    weights = gather_weights(engine, settings.zero_stage, keep=settings.world.is_first)
    live, warnings = _ask(engine.module.model, device, together=settings.zero_stage == 3 and settings.world.size > 1)

    def export(tell: Tell) -> str | None:
        description = folder.with_name(f"unfinished-{FOLDER}-description")
        try:
            saver.write_description(description)
            summary = saver.summary(state, position)
            card = model_card(summary.run, summary.step)
            return write_export(weights, live, description / FOLDER, folder, card, summary.step, tell)
        finally:
            shutil.rmtree(description, ignore_errors=True)

    warning = first_works(export, f"exporting the model to {folder}", settings.world, saver.watch, device)
    return folder, [*warnings, *([warning] if warning else [])]


def _ask(model: Any, device: torch.device, together: bool) -> tuple[Probe | None, list[str]]:
    """Return what the live model says, or nothing and why: a finished run does not end for want of memory."""
    try:
        return probe(model, device), []
    except Exception as error:
        if together:
            raise  # the others wait in a collective, so there is no going on
        torch.cuda.empty_cache()  # nothing without a GPU
        return None, [f"warning: the export is not compared with the model in training, which gave no logits: {error!r}"]
