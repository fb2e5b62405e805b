"""The training run: one loop around the engine, from a position in the order to the exported model."""

import json
import math
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from dialogpt_ds.checkpoints.folder import BEST
from dialogpt_ds.checkpoints.load import load_checkpoint
from dialogpt_ds.checkpoints.writer import SaveError
from dialogpt_ds.distributed.collectives import all_gather
from dialogpt_ds.distributed.hang_watch import HangWatch
from dialogpt_ds.distributed.stop_requests import StopRequests, exit_code_of, first_reason
from dialogpt_ds.errors import EXIT_DONE, RunError
from dialogpt_ds.files import replace_text
from dialogpt_ds.logs.record import Reply
from dialogpt_ds.logs.recorder import Recorder
from dialogpt_ds.model.flops import device_peak, flops_of
from dialogpt_ds.order.batches import RankStep
from dialogpt_ds.order.mixture import MixturePosition
from dialogpt_ds.order.stream import RowStream
from dialogpt_ds.redaction import without_secrets
from dialogpt_ds.shards.reader import ShardDirectory
from dialogpt_ds.training.data import TrainingData
from dialogpt_ds.training.divergence import Diverged, DivergenceWatch, Scale, divergence_error
from dialogpt_ds.training.engine import learning_rate, loss_scale, lowest_loss_scale, restore_schedule, start_engine
from dialogpt_ds.training.evaluation import evaluate
from dialogpt_ds.training.rank_report import RankReport, gauges_of
from dialogpt_ds.training.records import evaluation_record, failed_save_record, save_record, step_record
from dialogpt_ds.training.report import RunClock, end_summary, run_facts, start_table
from dialogpt_ds.training.resume import ResumePoint, position_to_resume_from, prepare_resume
from dialogpt_ds.training.sample_replies import SampleReplies
from dialogpt_ds.training.saver import Saver, export_model
from dialogpt_ds.training.settings import Settings
from dialogpt_ds.training.state import ProgressState
from dialogpt_ds.training.step import StepResult, train_step

Outcome = Literal["not evaluated", "evaluated", "improved"]
"""Of the moment between two steps: whether there was an evaluation, and whether it is the best so far."""


class TrainingRun:
    """A run in progress. Every method that computes is collective: every rank must call."""

    def __init__(
        self, settings: Settings, requests: StopRequests, watch: HangWatch, model: Any, device: torch.device
    ) -> None:
        self.settings, self.requests, self.watch, self.device = settings, requests, watch, device
        self.arguments = settings.arguments
        self.world = settings.world
        self.turn_ids = settings.turn_ids
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self.flops = flops_of(model)
        self.peak = device_peak(device, settings.precision)
        self.all_peaks = sum(peak.operations_per_second for peak in all_gather(self.peak))
        resume_point = prepare_resume(settings, watch, device)
        self.notes = resume_point.notes
        watch.beat("starting the engine")
        self.engine = start_engine(settings, model)
        self.state = ProgressState()
        position = self._resume(resume_point)
        self.saver = Saver(settings, self.engine, watch, self.state.global_step if resume_point.choice else None)
        self.data = TrainingData(settings, position, self.device)
        self.divergence = DivergenceWatch(settings, self.state)
        self.sample_replies = SampleReplies(settings, self.engine)
        self.clock = RunClock(self.state)
        self.stop_reason: str | None = None
        """Why the run is to stop before its last step, agreed on by all ranks."""
        self.checkpoint_wanted = False
        """By the clock, agreed on by all ranks."""
        self.last_words = ""
        self.exported: Path | None = None
        self.recorder: Recorder | None = None

    def _resume(self, resume_point: ResumePoint) -> MixturePosition:
        """Load what the run is resumed from, if there is something; returns its place in the order."""
        choice, path = resume_point.choice, resume_point.path
        if choice is None or path is None:
            return MixturePosition.start(len(self.settings.directories))
        self.watch.beat(f"loading {path}")
        saved = load_checkpoint(self.engine, path, choice.bridged)
        assert self.engine.global_steps == choice.step, (self.engine.global_steps, choice.step)
        restore_schedule(self.engine, self.arguments.learning_rate)
        self.state = ProgressState(**saved["progress"])
        position, differences = position_to_resume_from(self.settings, saved["order"])
        if differences:
            self.state.begin_epoch(0)
            self.notes.append(
                "--changed_order restart: another order of rows than the checkpoint's; the rows begin at the first of "
                "the new one:\n  " + "\n  ".join(differences)
            )
        return position

    @property
    def steps_left(self) -> int:
        """Optimizer steps until num_optim_steps."""
        return max(self.arguments.num_optim_steps - self.state.global_step, 0)

    def run(self) -> int:
        """Train to num_optim_steps, evaluate, save, export; or to where a stop is asked for. Returns the exit code."""
        self._start_logs()
        outcome = self._evaluate_if_due()  # an evaluation that a stop had broken off
        self._save_if_due(outcome)
        while self.steps_left and self.stop_reason is None:
            self._step()
            outcome = self._evaluate_if_due()
            self._save_if_due(outcome)
        self.data.close()
        if self.stop_reason is not None:
            return self._stop(self.stop_reason)
        self._finish()
        return EXIT_DONE

    def _step(self) -> None:
        """Take one optimizer step."""
        started = time.perf_counter()
        step, before = self._next_rows()
        rate, scale = learning_rate(self.engine), loss_scale(self.engine)
        self.watch.beat(f"computing step {self.state.global_step + 1}")
        result = train_step(self.engine, step, self.device, self.turn_ids, self._report)
        seconds = time.perf_counter() - started
        self.state.add_step(step, result.loss, seconds, self.settings.row_length)
        verdict = self.divergence.judge(
            result, rate, Scale(scale, loss_scale(self.engine), lowest_loss_scale(self.engine))
        )
        self._record(step, result, rate, seconds, verdict.warning)
        if verdict.end is not None:
            diverged = Diverged(self.state.global_step, verdict.end, before, self.saver.saved_step)
            raise divergence_error(diverged, self.engine, self.settings, self.device, self.watch.beat)
        self.stop_reason, self.checkpoint_wanted = result.reports.stop_reason, result.reports.checkpoint_wanted
        if not result.reports.rows_failed:
            self.data.nobody_failed()

    def _next_rows(self) -> tuple[RankStep, MixturePosition]:
        """Return this rank's rows of the next step, and where the step begins in the order."""
        self.watch.beat(f"waiting for the rows of step {self.state.global_step + 1}")
        before = self.data.position
        step, warnings = self.data.next_step()
        self._say(*warnings)
        if self.arguments.dropout:
            # The random state of a step depends on nothing before it, so a resume needs none of it stored.
            torch.manual_seed(hash((self.arguments.seed, self.state.global_step, self.world.rank)))
        return step, replace(before, skipped=self.data.position.skipped)

    def _report(self) -> RankReport:
        """Return what this rank reports to the others. The device is still at work on the step, so rows of the next are
        looked for."""
        failed = False
        if self.steps_left > 1:
            self.watch.beat(f"waiting for the rows of step {self.state.global_step + 2}")
            failed = self.data.look_ahead()
            self.watch.beat(f"computing step {self.state.global_step + 1}")
        return RankReport(
            stop_requests=self.requests.vector(),
            wants_checkpoint=self.world.is_first and self.saver.clock_wants_one(),
            rows_failed=failed,
            gauges=gauges_of(self.device, self.data.seconds_waited),
        )

    def _record(self, step: RankStep, result: StepResult, rate: float, seconds: float, warning: str | None) -> None:
        if self.recorder is None:
            return
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
            **result.reports.gauges,
        }
        share = self.flops.per_step(step.num_tokens, step.num_targets, length) / self.all_peaks
        self.recorder.record(step_record(result, step, self.state, facts, share))
        self._say(warning)

    def _evaluate_if_due(self) -> Outcome:
        """Evaluate at a step that is one to evaluate at and was not evaluated yet; a run that is to stop leaves it to
        the resume."""
        step = self.state.global_step
        at_this_step = step > 0 and (step % self.arguments.valid_step == 0 or not self.steps_left)
        if (
            self.settings.evaluation is None
            or not at_this_step
            or self.state.evaluated_step == step
            or self.stop_reason is not None
        ):
            return "not evaluated"
        return self._evaluate(self.settings.evaluation)

    def _save_if_due(self, outcome: Outcome) -> None:
        """Save where it is time to, or something asks for it."""
        if self._save_is_due(outcome):
            self._save(outcome == "improved")

    def _save_is_due(self, outcome: Outcome) -> bool:
        step = self.state.global_step
        if self.saver.saved_step == step or step == 0:
            # A checkpoint from before its own evaluation, which a stop leaves, is made anew: else each resume would
            # evaluate it.
            return outcome != "not evaluated"
        at_interval = step % self.settings.save_step == 0 or not self.steps_left
        asked_for = self.checkpoint_wanted or self.stop_reason is not None
        return at_interval or asked_for or outcome == "improved"

    def _start_logs(self) -> None:
        """Write down what runs, and open the logs; on rank 0."""
        if not self.world.is_first:
            return
        settings, state = self.settings, self.state
        text = yaml.safe_dump(without_secrets(settings.what_runs()), sort_keys=False, allow_unicode=True)
        replace_text(settings.output_dir / "run_config.yaml", text)
        replace_text(
            settings.output_dir / "ds_config.json", json.dumps(without_secrets(settings.deepspeed), indent=2) + "\n"
        )
        facts = partial(run_facts, settings, self.num_parameters, self.peak)
        self.recorder = Recorder(
            self.arguments, settings.output_dir, settings.log_dir, state.global_step, state.wandb_id, facts
        )
        state.wandb_id = self.recorder.wandb.run_id
        attention = self.engine.module.model.config._attn_implementation
        wandb_mode = self.recorder.wandb.mode_text
        self.recorder.say(
            start_table(settings, self.num_parameters, attention, wandb_mode, state.global_step, self.peak)
        )
        self._say(*self.notes)
        folder = self.saver.folder
        if (
            state.best_eval_loss is not None
            and state.best_step in folder.steps()
            and folder.pointer(BEST) != state.best_step
        ):
            folder.point(BEST, state.best_step)  # the run was killed between the save and the pointer

    def _evaluate(self, directory: ShardDirectory) -> Outcome:
        state, rows = self.state, self.arguments.valid_batch_size
        started = time.perf_counter()
        stream = RowStream(directory, self.settings.evaluation_key(directory))
        eos = directory.manifest.eos_id
        result = evaluate(self.engine, stream, self.world, rows, eos, self.device, self.turn_ids, self._asked_to_stop)
        seconds = time.perf_counter() - started
        state.epoch_seconds += seconds
        if result is None:
            self.stop_reason = self._agreed_reason()
            return "not evaluated"
        improved = math.isfinite(result.loss) and (state.best_eval_loss is None or result.loss < state.best_eval_loss)
        if improved:
            state.best_eval_loss, state.best_step = result.loss, state.global_step
        state.evaluated_step, state.last_eval_loss = state.global_step, result.loss
        replies, seconds_replies = self._reply_to_samples()
        if self.recorder is not None:
            self.recorder.record(evaluation_record(result, seconds, replies, seconds_replies, state))
        return "improved" if improved else "evaluated"

    def _reply_to_samples(self) -> tuple[list[Reply], float]:
        """Return the replies to the sample prompts (rank 0's), and how long they took (seconds)."""
        started = time.perf_counter()
        self.watch.beat(f"replying to the sample prompts at step {self.state.global_step}")
        replies, warning = self.sample_replies.replies()
        self._say(warning)
        seconds = time.perf_counter() - started
        self.state.epoch_seconds += seconds
        return replies, seconds

    def _asked_to_stop(self) -> bool:
        self.watch.beat(f"evaluating at step {self.state.global_step}")
        return any(self.requests.vector())

    def _agreed_reason(self) -> str | None:
        """Return why the run is to stop, the same on all ranks. Collective."""
        counts = torch.tensor(self.requests.vector(), device=self.device)
        torch.distributed.all_reduce(counts)
        return first_reason(counts.tolist())

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
                f"stopped by {reason} after step {step:,}, which could not be saved; the last complete checkpoint is "
                "kept"
            )
        self.last_words = (
            f"stopped by {reason}: step {step:,} of {self.arguments.num_optim_steps:,} is saved in "
            f"{self.saver.folder.path(step)}; the same command goes on from it"
        )
        return exit_code_of(reason)

    def _finish(self) -> None:
        """Export the model, and put together where everything is."""
        self.watch.beat("exporting the model")
        self.exported, warnings = export_model(self.engine, self.saver, self.state, self.data.position, self.device)
        self._say(*warnings)
        step = self.state.global_step
        counts = {
            "updates skipped": self.engine.skipped_steps,
            "loss spikes": self.state.loss_spikes,
            "failed saves": self.saver.num_failed,
            "blocks that can't be read": self.data.num_skipped_blocks,
        }
        places = {"model": self.exported}
        if self.saver.saved_step is not None:
            places["checkpoint"] = self.saver.folder.path(self.saver.saved_step)
        self.last_words = end_summary(
            self.settings.log_dir,
            self.settings.evaluation is not None,
            self.state,
            self.clock.line(self.state),
            counts,
            places,
        )
        if self.saver.saved_step != step:
            raise RunError(
                f"the run is at its end and its model is exported, but the checkpoint of step {step:,} could not be "
                "saved"
            )

    def _say(self, *lines: str | None) -> None:
        """Print what there is to say, on rank 0."""
        for line in lines:
            if line and self.recorder is not None:
                self.recorder.say(line)

    def close(self, code: int) -> None:
        """End what only rank 0 has: the logs, and a wandb server that may take its time. No collective; does nothing
        the second time."""
        if self.recorder is None:
            return
        recorder, self.recorder = self.recorder, None
        recorder.close_files()
        recorder.say_last(self.last_words)
        artifacts = self.exported if self.arguments.wandb_artifacts else None
        for line in recorder.finish_wandb(code, self.exported is None, artifacts):
            recorder.say_last(line)
