"""What a run writes: checkpoints, what goes into one, when the clock wants one, what saving has cost; and the exported
model at its end."""

import shutil
import time
from pathlib import Path
from typing import Any

import torch

from dialogpt_ds.checkpoints.folder import CheckpointFolder, Summary
from dialogpt_ds.checkpoints.load import scaler_state, updates_made
from dialogpt_ds.checkpoints.writer import SaveError, save_checkpoint
from dialogpt_ds.distributed.hang_watch import HangWatch
from dialogpt_ds.distributed.lone_work import Tell, first_works
from dialogpt_ds.export.card import model_card
from dialogpt_ds.export.folder import MODEL_FOLDER, Probe, gather_weights, probe, write_description, write_export
from dialogpt_ds.order.mixture import MixturePosition, order_state
from dialogpt_ds.training.engine import Engine, parameter_group_names
from dialogpt_ds.training.report import facts_for_a_card
from dialogpt_ds.training.settings import Settings
from dialogpt_ds.training.state import ProgressState


class Saver:
    """Saves one run's engine and state."""

    def __init__(self, settings: Settings, engine: Engine, watch: HangWatch, saved_step: int | None) -> None:
        self.settings, self.engine, self.watch = settings, engine, watch
        self.folder = CheckpointFolder(settings.output_dir)
        self.saved_step = saved_step
        """Step of the last checkpoint that is complete: loaded or saved."""
        self.num_failed = 0
        self.seconds = 0.0
        """Spent on saving by this process."""
        self._started = self._last = time.monotonic()

    @property
    def share(self) -> float:
        """Share of this process's time that saving has taken so far."""
        return self.seconds / max(time.monotonic() - self._started, 1e-9)

    def clock_wants_one(self) -> bool:
        """Return whether --save_minutes have passed since the last save."""
        minutes = self.settings.arguments.save_minutes
        return bool(minutes) and time.monotonic() - self._last >= 60 * minutes

    def save(self, state: ProgressState, position: MixturePosition) -> tuple[Path, float]:
        """Write a checkpoint; returns where and how long it took (seconds). Collective: every rank must call.

        Raises:
            SaveError: on every rank; nothing of it is left.
        """
        started = time.perf_counter()
        self.watch.beat(f"saving step {state.global_step}")
        client_state = {
            "progress": state.to_plain(),
            "order": order_state(self.settings.order_key, position),
            "loss_scaler": scaler_state(self.engine),
            "parameter_groups": parameter_group_names(self.engine) if self.settings.zero_stage == 0 else None,
            # No random state: each step's is made from seed, step and rank.
        }
        try:
            path = save_checkpoint(
                self.engine, self.folder, self.summary(state, position), client_state, self.write_description,
                self.settings.arguments.keep_checkpoints, self.watch.beat,
            )  # fmt: skip
        except SaveError:
            self.num_failed += 1
            raise
        finally:
            self._last = time.monotonic()
            seconds = time.perf_counter() - started
            self.seconds += seconds
            state.epoch_seconds += seconds
        self.saved_step = state.global_step
        return path, seconds

    def summary(self, state: ProgressState, position: MixturePosition) -> Summary:
        """Return what checkpoint.json says, without the files."""
        settings = self.settings
        layout = settings.layout()
        return Summary(
            step=state.global_step,
            world_size=layout.pop("processes"),
            zero_stage=layout.pop("ZeRO stage"),
            precision=layout.pop("precision"),
            optimizer={
                "type": settings.optimizer_type,
                "updates": updates_made(self.engine),
                "groups": len(self.engine.optimizer.param_groups),
                "layout": layout,
            },
            model=settings.model.name,
            model_shape=settings.model.shape(),
            order=order_state(settings.order_key, position),
            run=facts_for_a_card(settings) | state.facts_for_a_card(),
        )

    def write_description(self, folder: Path) -> None:
        """Write what an export needs beside the weights into `folder`/model; rank 0 only."""
        settings = self.settings
        description = folder / MODEL_FOLDER
        description.mkdir(parents=True, exist_ok=True)
        eos = settings.train.manifest.eos_id
        write_description(settings.model.config, settings.tokenizer, eos, settings.row_length, description)


def export_model(
    engine: Engine, saver: Saver, state: ProgressState, position: MixturePosition, device: torch.device
) -> tuple[Path, list[str]]:
    """Write output_dir/model in the training precision; returns where, and warnings. Collective: every rank must call.

    Raises:
        RunError: on all ranks, where it can't be written, or loads back differently.
    """
    settings = saver.settings
    folder = settings.output_dir / MODEL_FOLDER
    weights = gather_weights(engine, settings.zero_stage, keep=settings.world.is_first)
    live, warnings = _ask(engine.module.model, device, together=settings.zero_stage == 3 and settings.world.size > 1)

    def export(tell: Tell) -> str | None:
        description = folder.with_name(f"unfinished-{MODEL_FOLDER}-description")
        try:
            saver.write_description(description)
            summary = saver.summary(state, position)
            card = model_card(summary.run, summary.step)
            return write_export(weights, live, description / MODEL_FOLDER, folder, card, summary.step, tell)
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
        return None, [
            f"warning: the export is not compared with the model in training, which gave no logits: {error!r}"
        ]
