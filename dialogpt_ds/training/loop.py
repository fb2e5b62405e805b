"""The training run: one loop around the engine, from a position in the order to the exported model."""

import json
import math
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from dialogpt_ds.checkpoints.folder import BEST
from dialogpt_ds.checkpoints.load import load_checkpoint
from dialogpt_ds.checkpoints.writer import SaveError
from dialogpt_ds.distributed.collectives import all_gathered
from dialogpt_ds.distributed.hang_watch import HangWatch
from dialogpt_ds.distributed.stop_requests import REASONS, StopRequests, exit_code_of
from dialogpt_ds.errors import EXIT_DONE, RunError
from dialogpt_ds.files import replace_text
from dialogpt_ds.logs.record import Reply
from dialogpt_ds.logs.recorder import Recorder
from dialogpt_ds.model.flops import arithmetic_of, peak_of
from dialogpt_ds.order.batches import RankStep
from dialogpt_ds.order.mixture import MixturePosition
from dialogpt_ds.order.stream import RowStream
from dialogpt_ds.redaction import without_secrets
from dialogpt_ds.training.data import TrainingData
from dialogpt_ds.training.divergence import Diverged, DivergenceWatch, Scale, report
from dialogpt_ds.training.engine import (
    StepResult,
    learning_rate,
    loss_scale,
    lowest_loss_scale,
    start_engine,
    take_up_schedule,
    train_step,
)
from dialogpt_ds.training.evaluation import evaluate
from dialogpt_ds.training.exporting import export_model
from dialogpt_ds.training.gauges import largest, told_by_this_rank
from dialogpt_ds.training.rank_checks import Beginning, begin
from dialogpt_ds.training.records import evaluation_record, failed_save_record, save_record, step_record
from dialogpt_ds.training.resume import position_to_go_on_from
from dialogpt_ds.training.run_facts import run_facts
from dialogpt_ds.training.sample_replies import Sampler
from dialogpt_ds.training.saver import Saver
from dialogpt_ds.training.settings import Settings
from dialogpt_ds.training.start_table import start_table
from dialogpt_ds.training.state import ProgressState
from dialogpt_ds.training.summary import RunClock, end_summary

FLAGS = len(REASONS) + 2
"""Numbers that ranks tell before their gauges: reasons to stop, whether the clock wants a checkpoint, whether rows can't be read."""


class TrainingRun:
    """A run in progress. Every method that computes is collective: every rank must call."""

    def __init__(self, settings: Settings, requests: StopRequests, watch: HangWatch, model: Any, device: torch.device) -> None:
        self.settings, self.requests, self.watch, self.device = settings, requests, watch, device
        self.arguments = settings.arguments
        self.world = settings.world
        self.turn_ids = not self.arguments.no_token_id
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self.arithmetic = arithmetic_of(model)
        self.peak = peak_of(device, settings.precision)
        self.all_peaks = sum(peak.operations_per_second for peak in all_gathered(self.peak))
        beginning = begin(settings, watch, device)
        self.notes = beginning.notes
        watch.beat("starting the engine")
        self.engine = start_engine(settings, model)
        self.state = ProgressState()
        position = self._take_up(beginning)
        self.saver = Saver(settings, self.engine, watch, self.state.global_step if beginning.choice else None)
        self.data = TrainingData(settings, position, self.device)
        self.divergence = DivergenceWatch(settings, self.state)
        self.sampler = Sampler(settings, self.engine)
        self.clock = RunClock(self.state)
        self.last_words = ""
        self.exported: Path | None = None
        self.recorder: Recorder | None = None

    def _take_up(self, beginning: Beginning) -> MixturePosition:
        """Load what the run goes on from, if there is something; returns its place in the order."""
        choice, path = beginning.choice, beginning.path
        if choice is None or path is None:
            return MixturePosition.start(len(self.settings.directories))
        self.watch.beat(f"loading {path}")
        saved = load_checkpoint(self.engine, path, choice.bridged)
        assert self.engine.global_steps == choice.step, (self.engine.global_steps, choice.step)
        take_up_schedule(self.engine, self.settings)
        self.state = ProgressState(**saved["progress"])
        position, differences = position_to_go_on_from(self.settings, saved["order"])
        if differences:
            self.state.begin_epoch(0)
            self.notes.append(
                "--changed_order restart: another order of rows than the checkpoint's; the rows begin at the first of the new one:\n  "
                + "\n  ".join(differences)
            )
        return position

    @property
    def steps_left(self) -> int:
        """Optimizer steps until num_optim_steps."""
        return max(self.arguments.num_optim_steps - self.state.global_step, 0)

    def run(self) -> int:
        """Train to num_optim_steps, evaluate, save, export; or to where a stop is asked for. Returns the exit code."""
        if self.world.is_first:
            self._start_logs()
        reason = self._evaluate_and_save(None, due=False)  # an evaluation that a stop had broken off
        while self.steps_left and reason is None:
            reason, clock_wants_one = self._step()
            due = clock_wants_one or not self.steps_left or self.state.global_step % self.settings.save_step == 0
            reason = self._evaluate_and_save(reason, due)
        self.data.close()
        if reason is not None:
            return self._stop(reason)
        self._finish()
        return EXIT_DONE

    def _start_logs(self) -> None:
        settings, state = self.settings, self.state
        text = yaml.safe_dump(without_secrets(settings.what_runs()), sort_keys=False, allow_unicode=True)
        replace_text(settings.output_dir / "run_config.yaml", text)
        replace_text(settings.output_dir / "ds_config.json", json.dumps(without_secrets(settings.deepspeed), indent=2) + "\n")
        facts = partial(run_facts, settings, self.num_parameters, self.peak)
        self.recorder = Recorder(self.arguments, settings.output_dir, settings.log_dir, state.global_step, state.wandb_id, facts)
        state.wandb_id = self.recorder.wandb.run_id
        attention = self.engine.module.model.config._attn_implementation
        wandb_mode = self.recorder.wandb.mode_text
        self.recorder.say(start_table(settings, self.num_parameters, attention, wandb_mode, state.global_step, self.peak))
        for note in self.notes:
            self.recorder.say(note)
        folder = self.saver.folder
        if state.best_eval_loss is not None and state.best_step in folder.steps() and folder.pointer(BEST) != state.best_step:
            folder.point(BEST, state.best_step)  # the run was killed between the save and the pointer

    def _evaluation_is_due(self) -> bool:
        """Say whether the step that was reached is one to evaluate at, and has not been evaluated."""
        step = self.state.global_step
        at_this_step = step > 0 and (step % self.arguments.valid_step == 0 or not self.steps_left)
        return self.settings.evaluation is not None and at_this_step and self.state.evaluated_step != step

    def _evaluate_and_save(self, reason: str | None, due: bool) -> str | None:
        """Evaluate where it is time to, and save where it is time to or something asks for it.

        Args:
            reason: why the run is to stop; then an evaluation waits for the resume.
            due: whether it is time to save.

        Returns:
            Why the run is to stop.
        """
        improved = anew = False
        if reason is None and self._evaluation_is_due():
            improved, reason = self._evaluate()
            # A checkpoint from before its own evaluation, which a stop leaves, is made anew: else it would be evaluated at every resume.
            anew = reason is None and self.saver.saved_step == self.state.global_step
        if due or improved or anew or (reason is not None and self.saver.saved_step != self.state.global_step):
            self._save(improved)
        return reason

    def _step(self) -> tuple[str | None, bool]:
        """Take one optimizer step; returns why to stop after it, and whether the clock wants a checkpoint."""
        started = time.perf_counter()
        self.watch.beat(f"waiting for the rows of step {self.state.global_step + 1}")
        before = self.data.position
        step, warnings = self.data.next_step()
        before = replace(before, skipped=self.data.position.skipped)
        if self.recorder is not None:
            for warning in warnings:
                self.recorder.say(warning)
        rate = learning_rate(self.engine)
        if self.arguments.dropout:
            # The random state of a step depends on nothing before it, so a resume needs none of it stored.
            torch.manual_seed(hash((self.arguments.seed, self.state.global_step, self.world.rank)))
        self.watch.beat(f"computing step {self.state.global_step + 1}")
        scale = loss_scale(self.engine)
        result = train_step(self.engine, step, self.device, self.turn_ids, self._tell)
        seconds = time.perf_counter() - started
        self.state.add_step(step, result.loss, seconds, self.settings.row_length)
        self._judge(step, result, rate, seconds, before, Scale(scale, loss_scale(self.engine), lowest_loss_scale(self.engine)))
        clock_wants_one, failed = result.told[len(REASONS) : FLAGS]
        if not failed:
            self.data.nobody_failed()
        return _first_reason(result.told[: len(REASONS)]), clock_wants_one > 0

    def _tell(self) -> list[float]:
        """Return what this rank tells the others: reasons to stop, (rank 0) whether the clock wants a checkpoint, whether it can't
        read the rows of the next step, and its gauges."""
        failed = False
        if self.steps_left > 1:
            self.watch.beat(f"waiting for the rows of step {self.state.global_step + 2}")
            failed = self.data.look_ahead()  # while the device computes
            self.watch.beat(f"computing step {self.state.global_step + 1}")
        wants_checkpoint = self.world.is_first and self.saver.clock_wants_one()
        gauges = told_by_this_rank(self.world, self.device, self.data.seconds_waited)
        return [*self.requests.vector(), float(wants_checkpoint), float(failed), *gauges]

    def _judge(
        self, step: RankStep, result: StepResult, rate: float, seconds: float, before: MixturePosition, scale: Scale
    ) -> None:
        """Record a step, and end the run before a model that is no number is saved; raises RunError on all ranks."""
        end, warning = self.divergence.look(result, rate, scale)
        if self.recorder is not None:
            self._record(step, result, rate, seconds)
            if warning:
                self.recorder.say(warning)
        if end is not None:
            diverged = Diverged(self.state.global_step, end, before, self.saver.saved_step)
            raise report(diverged, self.engine, self.settings, self.device, self.watch.beat)

    def _record(self, step: RankStep, result: StepResult, rate: float, seconds: float) -> None:
        assert self.recorder is not None
        length = self.settings.row_length
        facts = {
            "lr": rate,
            "loss_scale": loss_scale(self.engine),
            "skipped_steps": self.engine.skipped_steps,
            "padding_share": 1.0 - step.num_tokens / (step.num_rows * length),
            "skipped_blocks": self.data.num_skipped_blocks,
            "skipped_examples": self.data.num_skipped_examples,
            "seconds_per_step": seconds,
            "seconds_left": self.recorder.progress.seconds_left(self.state.global_step),
            **largest(result.told[FLAGS:]),
        }
        operations = self.arithmetic.operations(step.num_tokens, step.num_targets, length)
        self.recorder.record(step_record(result, step, self.state, facts, operations / self.all_peaks))

    def _evaluate(self) -> tuple[bool, str | None]:
        """Evaluate; returns whether it is the best so far, and why it was broken off."""
        directory, state = self.settings.evaluation, self.state
        assert directory is not None
        started = time.perf_counter()
        stream = RowStream(directory, self.settings.evaluation_key(directory))
        eos = directory.manifest.eos_id
        rows = self.arguments.valid_batch_size
        result = evaluate(self.engine, stream, self.world, rows, eos, self.device, self.turn_ids, self._asked_to_stop)
        seconds = time.perf_counter() - started
        state.epoch_seconds += seconds
        if result is None:
            return False, self._agreed_reason()
        improved = math.isfinite(result.loss) and (state.best_eval_loss is None or result.loss < state.best_eval_loss)
        if improved:
            state.best_eval_loss, state.best_step = result.loss, state.global_step
        state.evaluated_step, state.last_eval_loss = state.global_step, result.loss
        replies, seconds_replies = self._sample()
        if self.recorder is not None:
            self.recorder.record(evaluation_record(result, seconds, replies, seconds_replies, state))
        return improved, None

    def _sample(self) -> tuple[list[Reply], float]:
        """Return the replies to the sample prompts (rank 0's), and how long they took (seconds)."""
        started = time.perf_counter()
        self.watch.beat(f"replying to the sample prompts at step {self.state.global_step}")
        replies, warning = self.sampler.replies()
        if warning and self.recorder is not None:
            self.recorder.say(warning)
        seconds = time.perf_counter() - started
        self.state.epoch_seconds += seconds
        return replies, seconds

    def _asked_to_stop(self) -> bool:
        self.watch.beat(f"evaluating at step {self.state.global_step}")
        return any(self.requests.vector())

    def _agreed_reason(self) -> str | None:
        """Return why the run is to stop, the same on all ranks. Collective."""
        told = torch.tensor(self.requests.vector(), device=self.device)
        torch.distributed.all_reduce(told)
        return _first_reason(told.tolist())

    def _save(self, improved: bool) -> None:
        try:
            path, seconds = self.saver.save(self.state, self.data.position)
        except SaveError as error:
            if self.recorder is not None:
                self.recorder.record(failed_save_record(str(error), self.saver.num_failed, self.state.global_step))
            return
        if self.recorder is not None:
            if improved:
                self.saver.folder.point(BEST, self.state.global_step)
            self.recorder.record(save_record(str(path), seconds, self.saver.share, self.state.global_step))

    def _stop(self, reason: str) -> int:
        """End a run that was asked to stop; returns the exit code."""
        self.requests.carry_out()
        step = self.state.global_step
        if self.saver.saved_step != step:
            raise RunError(
                f"stopped by {reason} after step {step:,}, which could not be saved; the last complete checkpoint is kept"
            )
        self.last_words = (
            f"stopped by {reason}: step {step:,} of {self.arguments.num_optim_steps:,} is saved in {self.saver.folder.path(step)}; "
            "the same command goes on from it"
        )
        return exit_code_of(reason)

    def _finish(self) -> None:
        """Export the model, and put together where everything is."""
        self.watch.beat("exporting the model")
        self.exported, exporting = export_model(self.engine, self.saver, self.state, self.data.position, self.device)
        if self.recorder is not None:
            for warning in exporting:
                self.recorder.say(warning)
        step = self.state.global_step
        warnings = {
            "updates left out": self.engine.skipped_steps,
            "loss spikes": self.state.loss_spikes,
            "failed saves": self.saver.num_failed,
            "blocks that can't be read": self.data.num_skipped_blocks,
        }
        places = {"model": self.exported}
        if self.saver.saved_step is not None:
            places["checkpoint"] = self.saver.folder.path(self.saver.saved_step)
        self.last_words = end_summary(self.settings, self.state, self.clock.line(self.state), warnings, places)
        if self.saver.saved_step != step:
            raise RunError(
                f"the run is at its end and its model is exported, but the checkpoint of step {step:,} could not be saved"
            )

    def part(self, code: int) -> None:
        """End what only rank 0 has: the logs, and a wandb server that may take its time. No collective; does nothing the second time."""
        if self.recorder is None:
            return
        recorder, self.recorder = self.recorder, None
        recorder.close_files()
        recorder.say_last(self.last_words)
        artifacts = self.exported if self.arguments.wandb_artifacts else None
        for line in recorder.finish_wandb(code, self.exported is None, artifacts):
            recorder.say_last(line)


def _first_reason(sums: list[float]) -> str | None:
    """Return the first of REASONS that some rank had."""
    return next((reason for reason, count in zip(REASONS, sums, strict=True) if count > 0), None)
