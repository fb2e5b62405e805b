"""The export of the model at the end of a run."""

import shutil
from pathlib import Path
from typing import Any

import torch

from dialogpt_ds.errors import RunError
from dialogpt_ds.export.card import model_card
from dialogpt_ds.export.folder import FOLDER, gather_weights, probe, write_export
from dialogpt_ds.order.mixture import MixturePosition
from dialogpt_ds.training.agreement import all_reports
from dialogpt_ds.training.progress_state import ProgressState
from dialogpt_ds.training.saver import Saver


def export_model(engine: Any, saver: Saver, state: ProgressState, position: MixturePosition, device: torch.device) -> Path:
    """Write output_dir/model in the training precision; returns where. Collective: every rank must call.

    Raises:
        RunError: on all ranks, where it can't be written, or loads back differently.
    """
    settings = saver.settings
    output = settings.output_dir
    weights = gather_weights(engine, settings.zero_stage, keep=settings.world.is_first)
    live = probe(engine.module.model, device)
    failure = None
    if settings.world.is_first:
        description = output / f"unfinished-{FOLDER}-description"
        try:
            saver.write_description(description)
            summary = saver.summary(state, position)
            card = model_card(summary.run, summary.step)
            write_export(weights, live, description / FOLDER, output / FOLDER, card, summary.step)
        except OSError as error:
            failure = f"the model can't be exported to {output / FOLDER}: {error}"
        except RunError as error:
            failure = str(error)
        finally:
            shutil.rmtree(description, ignore_errors=True)
    failures = all_reports(failure, device)
    if failures:
        raise RunError(failures[0])
    return output / FOLDER
