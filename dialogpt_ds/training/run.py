"""The training run: one loop around the engine, from a position in the order to the exported model."""

import contextlib
import json
import math
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml

from dialogpt_ds.checkpoints.folder import BEST, CheckpointFolder, Summary
from dialogpt_ds.checkpoints.load import load_checkpoint, scaler_state, updates_made
from dialogpt_ds.checkpoints.universal import convert
from dialogpt_ds.checkpoints.writer import SaveError, save_checkpoint
from dialogpt_ds.errors import EXIT_DONE, EXIT_RUN_FAILED, RunError, UserError
from dialogpt_ds.export.card import model_card
from dialogpt_ds.export.folder import FOLDER, gather_weights, probe, write_description, write_export
from dialogpt_ds.files import replace_text, sha256_of_json
from dialogpt_ds.logs.recorder import Recorder, step_values
from dialogpt_ds.logs.start_table import start_table
from dialogpt_ds.model.load import build_model
from dialogpt_ds.order.batches import RankStep
from dialogpt_ds.order.mixture import MixturePosition, order_state
from dialogpt_ds.order.stream import RowStream
from dialogpt_ds.training.agreement import all_reports, different_from_first, from_first
from dialogpt_ds.training.data import TrainingData
from dialogpt_ds.training.engine import (
    StepResult,
    learning_rate,
    loss_scale,
    parameter_group_names,
    start_engine,
    take_up_schedule,
    train_step,
)
from dialogpt_ds.training.evaluation import evaluate
from dialogpt_ds.training.hang import HangWatch
from dialogpt_ds.training.progress_state import ProgressState
from dialogpt_ds.training.resume import Choice, check_shared, choose, position_to_go_on_from
from dialogpt_ds.training.settings import Settings, order_key
from dialogpt_ds.training.stopping import REASONS, StopRequests, exit_code_of
from dialogpt_ds.training.world import join_world, leave_world

LOST_CONTACT = (
    "closed by peer",
    "Connection reset",
    "Broken pipe",
    "Socket Timeout",
    "Timed out waiting",
    "NCCL",
    "DistBackendError",
)
"""What gloo and NCCL say where another rank is gone."""


class TrainingRun:
    """A run in progress. Every method that computes is collective: every rank must call."""

    def __init__(self, settings: Settings, requests: StopRequests, watch: HangWatch, model: Any, device: torch.device) -> None:
        self.settings, self.requests, self.watch, self.device = settings, requests, watch, device
        self.arguments = settings.arguments
        self.world = settings.world
        self.turn_ids = not self.arguments.no_token_id
        self.started = self.last_saved = time.monotonic()
        self.seconds_saving = 0.0
        self.num_failed_saves = 0
        self.saved_step: int | None = None
        self.folder = CheckpointFolder(settings.output_dir)
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self.notes: list[str] = []
        choice = self._choose()
        check_same_run(settings, choice)
        path = self._ready_to_load(choice)
        watch.beat("starting the engine")
        self.engine = start_engine(settings, model)
        self.state = ProgressState()
        position = MixturePosition.start(len(settings.directories))
        if choice is not None and path is not None:
            watch.beat(f"loading {path}")
            saved = load_checkpoint(self.engine, path, choice.bridged)
            assert self.engine.global_steps == choice.step, (self.engine.global_steps, choice.step)
            take_up_schedule(self.engine, settings)
            self.state = ProgressState(**saved["progress"])
            self.saved_step = choice.step
            position = self._take_up_order(saved["order"])
        self.data = TrainingData(settings, position, self.device)
        self.recorder: Recorder | None = None

    def _choose(self) -> Choice | None:
        """Return the checkpoint to go on from; the folder is in order afterwards."""
        first = self.world.is_first
        check_shared(self.settings)
        if first:
            self.folder.clean()
        self.watch.beat("checking the checkpoints")
        choice = choose(self.settings, self.device, self.notes.append)
        if first and choice is not None and self.arguments.continue_from:
            left = self.folder.leave_behind(choice.step)
            if left:
                self.notes.append(
                    f"--continue_from {choice.step}: the checkpoints after it are of another history now; renamed to {', '.join(left)}"
                )
        return choice

    def _ready_to_load(self, choice: Choice | None) -> Path | None:
        """Return the folder to load: the checkpoint, or its conversion, which rank 0 makes while the others wait."""
        if choice is None:
            return None
        if not choice.bridged:
            return self.folder.path(choice.step)
        path, failure = None, None
        if self.world.is_first:
            try:
                path = convert(self.folder, choice.summary, lambda line: print(line, flush=True), self.watch.beat)
            except OSError as error:
                failure = f"checkpoint {self.folder.path(choice.step)} can't be converted for this run: {error}"
        self.watch.beat("waiting for the conversion of the checkpoint")
        failures = all_reports(failure, self.device)
        if failures:
            raise RunError(failures[0])
        return from_first(path)

    def _take_up_order(self, order: dict[str, Any]) -> MixturePosition:
        position, differences = position_to_go_on_from(self.settings, order)
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
        reason = self._evaluate_and_save(None, due=False) if self._evaluation_is_due() else None
        while self.steps_left and reason is None:
            reason, save_now = self._step()
            step = self.state.global_step
            due = save_now or not self.steps_left or step % self.settings.save_step == 0
            reason = self._evaluate_and_save(reason, due)
        self.data.close()
        if reason is not None:
            return self._stop(reason)
        self._export()
        return EXIT_DONE

    def _start_logs(self) -> None:
        self.recorder = Recorder(self.settings, self.state)
        self.state.wandb_id = self.recorder.wandb.run_id
        self._write_what_runs()
        self.recorder.say(start_table(self.settings, self.num_parameters, self.recorder.wandb.mode, self.state.global_step))
        for note in self.notes:
            self.recorder.say(note)
        best = self.state.best_step
        if self.state.best_eval_loss is not None and best in self.folder.steps() and self.folder.pointer(BEST) != best:
            self.folder.point(BEST, best)  # killed between the save and the pointer

    def _evaluation_is_due(self) -> bool:
        """Say whether the step that was reached is one to evaluate at, and has not been evaluated."""
        step = self.state.global_step
        at_this_step = step > 0 and (step % self.arguments.valid_step == 0 or not self.steps_left)
        return self.settings.evaluation is not None and at_this_step and self.state.evaluated_step != step

    def _evaluate_and_save(self, reason: str | None, due: bool) -> str | None:
        """Evaluate where it is time to, save where it is time to or something asks for it; returns the reason to stop, if there is one."""
        improved = evaluated = False
        if reason is None and self._evaluation_is_due():
            improved, reason = self._evaluate()
            # A checkpoint from before its own evaluation, which a stop leaves, is made anew: else it would be evaluated at every resume.
            evaluated = reason is None and self.saved_step == self.state.global_step
        if due or improved or evaluated or (reason is not None and self.saved_step != self.state.global_step):
            self._save(improved)
        return reason

    def _step(self) -> tuple[str | None, bool]:
        """Take one optimizer step; returns why to stop after it, and whether the clock wants a checkpoint."""
        started = time.perf_counter()
        self.watch.beat(f"waiting for the rows of step {self.state.global_step + 1}")
        step, warnings = self.data.next_step()
        if self.recorder is not None:
            for warning in warnings:
                self.recorder.say(warning)
        rate = learning_rate(self.engine)
        if self.arguments.dropout:
            # The random state of a step depends on nothing before it, so a resume needs none of it stored.
            torch.manual_seed(hash((self.arguments.seed, self.state.global_step, self.world.rank)))
        self.watch.beat(f"computing step {self.state.global_step + 1}")
        result = train_step(self.engine, step, self.device, self.turn_ids, self._wishes)
        seconds = time.perf_counter() - started
        self.state.add_step(step, result.loss, seconds, self.settings.row_length)
        if self.recorder is not None:
            self._record(step, result, rate, seconds)
        self._check_finite(result, rate)
        *reasons, save_now = result.wishes
        return _first_reason(reasons), save_now > 0

    def _wishes(self) -> list[float]:
        """Return what this rank wishes for: reasons to stop, and (of rank 0's clock) a checkpoint."""
        minutes = (time.monotonic() - self.last_saved) / 60
        save_now = self.world.is_first and bool(self.arguments.save_minutes) and minutes >= self.arguments.save_minutes
        return [*self.requests.vector(), float(save_now)]

    def _check_finite(self, result: StepResult, rate: float) -> None:
        """End the run before a model that is not a number is saved; raises RunError on all ranks, which have the same figures."""
        norm = result.grad_norm
        poisoned = norm is not None and not math.isfinite(norm) and result.applied
        if math.isfinite(result.loss) and not poisoned:
            return
        what = f"the loss is {result.loss}" if not math.isfinite(result.loss) else f"the gradient's norm is {norm} and was applied"
        raise RunError(
            f"step {self.state.global_step}: {what} (loss {result.loss}, learning rate {rate:.3e}, gradient norm {norm}): training has "
            "diverged. Nothing of it was saved, the last checkpoint is from before. Lower learning_rate, lengthen warmup_steps, or train "
            "in bf16 or fp32."
        )

    def _record(self, step: RankStep, result: StepResult, rate: float, seconds: float) -> None:
        assert self.recorder is not None
        facts = {
            "lr": rate,
            "loss_scale": loss_scale(self.engine),
            "skipped_steps": self.engine.skipped_steps,
            "epoch": step.fractional_epoch,
            "source_epochs": step.source_epochs,
            "rows": step.num_rows,
            "tokens": step.num_tokens,
            "targets": step.num_targets,
            "skipped_blocks": self.data.num_skipped_blocks,
            "skipped_examples": self.data.num_skipped_examples,
        }
        values = step_values(result, self.state, facts, seconds, self.data.seconds_waited, self.settings.row_length)
        self.recorder.step(values, self.state)
        if not result.applied and self.settings.precision != "fp16":
            self.recorder.say(
                f"warning: the gradient of step {self.state.global_step:,} is not finite; its update was left out on all ranks"
            )

    def _evaluate(self) -> tuple[bool, str | None]:
        """Evaluate; returns whether it is the best so far, and why it was broken off."""
        directory = self.settings.evaluation
        assert directory is not None
        started = time.perf_counter()
        stream = RowStream(directory, order_key(directory, 0, self.settings.row_length, packing=True))
        result = evaluate(
            self.engine,
            stream,
            self.world,
            self.arguments.valid_batch_size,
            directory.manifest.eos_id,
            self.device,
            self.turn_ids,
            self._asked_to_stop,
        )
        seconds = time.perf_counter() - started
        self.state.epoch_seconds += seconds
        if result is None:
            return False, self._agreed_reason()
        best = self.state.best_eval_loss
        improved = math.isfinite(result.loss) and (best is None or result.loss < best)
        if improved:
            self.state.best_eval_loss, self.state.best_step = result.loss, self.state.global_step
        self.state.evaluated_step, self.state.last_eval_loss = self.state.global_step, result.loss
        if self.recorder is not None:
            self.recorder.evaluation(result, seconds, self.state)
        return improved, None

    def _asked_to_stop(self) -> bool:
        self.watch.beat(f"evaluating at step {self.state.global_step}")
        return any(self.requests.vector())

    def _agreed_reason(self) -> str | None:
        """Return why the run is to stop, the same on all ranks. Collective."""
        told = torch.tensor(self.requests.vector(), device=self.device)
        torch.distributed.all_reduce(told)
        return _first_reason(told.tolist())

    def _save(self, improved: bool) -> None:
        started = time.perf_counter()
        step = self.state.global_step
        self.watch.beat(f"saving step {step}")
        try:
            path = save_checkpoint(
                self.engine, self.folder, self._summary(), self._client_state(), self._write_description,
                self.arguments.keep_checkpoints, self.watch.beat,
            )  # fmt: skip
        except SaveError as error:
            self.num_failed_saves += 1
            if self.recorder is not None:
                self.recorder.not_saved(str(error), self.num_failed_saves, self.state)
            return
        finally:
            self.last_saved = time.monotonic()
            seconds = time.perf_counter() - started
            self.seconds_saving += seconds
            self.state.epoch_seconds += seconds
        self.saved_step = step
        if self.recorder is not None:
            if improved:
                self.folder.point(BEST, step)
            share = self.seconds_saving / (time.monotonic() - self.started)
            self.recorder.saved(str(path), seconds, share, self.state)

    def _client_state(self) -> dict[str, Any]:
        """Return our part of a checkpoint, plain types. Random states aren't in it: each step's is made from seed, step and rank."""
        return {
            "progress": self.state.to_plain(),
            "order": order_state(self.settings.order_key, self.data.position),
            "loss_scaler": scaler_state(self.engine),
            "parameter_groups": parameter_group_names(self.engine) if self.settings.zero_stage == 0 else None,
        }

    def _summary(self) -> Summary:
        settings = self.settings
        layout = settings.layout()
        return Summary(
            step=self.state.global_step,
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
            order=order_state(settings.order_key, self.data.position),
            run=settings.facts_for_a_card() | self.state.facts_for_a_card(),
        )

    def _write_description(self, folder: Path) -> None:
        settings = self.settings
        description = folder / FOLDER
        description.mkdir(exist_ok=True)
        eos = settings.train.manifest.eos_id
        write_description(settings.model.config, settings.tokenizer, eos, settings.row_length, description)

    def _stop(self, reason: str) -> int:
        """End a run that was asked to stop; returns the exit code."""
        self.requests.carry_out()
        step = self.state.global_step
        if self.recorder is not None:
            self.recorder.close()
        if self.saved_step != step:
            raise RunError(
                f"stopped by {reason} after step {step:,}, which could not be saved; the last complete checkpoint is kept"
            )
        if self.world.is_first:
            print(
                f"stopped by {reason}: step {step:,} of {self.arguments.num_optim_steps:,} is saved in {self.folder.path(step)}; the same "
                "command goes on from it",
                flush=True,
            )
        return exit_code_of(reason)

    def _export(self) -> None:
        self.watch.beat("exporting the model")
        folder = self._export_model()
        if self.recorder is not None:
            sync = self.recorder.close()
            best = self.state.best_eval_loss
            print(f"done: {self.state.global_step:,} steps, {self.state.tokens_seen:,} tokens, {self.state.rows_seen:,} rows")
            if best is not None:
                print(f"best evaluation: loss {best:.4f}, perplexity {math.exp(best):,.2f} at step {self.state.best_step:,}")
            print(f"model: {folder}\nlogs: {self.settings.log_dir}\ncheckpoints: {self.folder.root}")
            if sync:
                print(f"upload to wandb: {sync}")
        if self.saved_step != self.state.global_step:
            raise RunError(
                f"the run is at its end and its model is exported, but the checkpoint of step {self.state.global_step:,} could not be saved"
            )

    def _export_model(self) -> Path:
        """Write output_dir/model in the training precision; raises RunError on all ranks where it can't be or loads back differently."""
        settings = self.settings
        weights = gather_weights(self.engine, settings.zero_stage, keep=self.world.is_first)
        live = probe(self.engine.module.model, self.device)
        target = settings.output_dir / FOLDER
        failure = None
        if self.world.is_first:
            summary = self._summary()
            description = settings.output_dir / f"unfinished-{FOLDER}-description"
            try:
                description.mkdir(exist_ok=True)
                self._write_description(description)
                write_export(weights, live, description / FOLDER, target, model_card(summary.run, summary.step), summary.step)
            except OSError as error:
                failure = f"the model can't be exported to {target}: {error}"
            except RunError as error:
                failure = str(error)
            finally:
                with contextlib.suppress(OSError):
                    _remove(description)
        failures = all_reports(failure, self.device)
        if failures:
            raise RunError(failures[0])
        return target

    def _write_what_runs(self) -> None:
        settings = self.settings
        text = yaml.safe_dump(settings.what_runs(), sort_keys=False, allow_unicode=True)
        replace_text(settings.output_dir / "run_config.yaml", text)
        replace_text(settings.output_dir / "ds_config.json", json.dumps(settings.deepspeed, indent=2) + "\n")


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder)


def _first_reason(sums: list[float]) -> str | None:
    """Return the first of REASONS that some rank had."""
    return next((reason for reason, count in zip(REASONS, sums, strict=True) if count > 0), None)


def check_same_run(settings: Settings, choice: Choice | None) -> None:
    """Refuse ranks that were not given the same run, such as by an old copy of the data on one node. Collective.

    Raises:
        RunError: on every rank, naming the ranks that differ from rank 0 and in what.
    """
    facts = {
        "train_input_file (fingerprints of its manifests)": settings.order_key,
        "eval_input_file (fingerprint of its manifest)": settings.evaluation and settings.evaluation.manifest.fingerprint,
        "batch": settings.batch,
        "DeepSpeed configuration": settings.deepspeed,
        "num_optim_steps": settings.arguments.num_optim_steps,
        "valid_step": settings.arguments.valid_step,
        "save_step": settings.save_step,
        "on_bad_block": settings.arguments.on_bad_block,
        "model": settings.model.shape(),
        "checkpoint that is gone on from": choice and (choice.step, choice.bridged),
    }
    different = different_from_first({name: sha256_of_json(repr(value)) for name, value in facts.items()})
    if different:
        raise RunError(
            "the ranks were not all given the same run. These differ from rank 0:\n  "
            + "\n  ".join(f"{name}: rank {', '.join(map(str, ranks))}" for name, ranks in different.items())
            + "\nDo all nodes have the same copy of the data and of the configuration?"
        )


def train(settings: Settings) -> int:
    """Run to the end; returns the exit code. Collective: every rank must call."""
    run: TrainingRun | None = None
    torch.manual_seed(settings.arguments.seed)
    # Weights that don't fit are a mistake, and mistakes are said before the ranks come together.
    model = build_model(settings.model, settings.arguments.init_checkpoint or None)
    device = join_world(settings.world)
    try:
        with (
            StopRequests(settings.output_dir, settings.world.is_first) as requests,
            HangWatch(settings.output_dir, settings.world.rank, settings.arguments.hang_timeout) as watch,
        ):
            run = TrainingRun(settings, requests, watch, model, device)
            code = run.run()
            requests.carry_out()
            watch.beat("leaving")
            leave_world(run.engine)
            return code
    except (UserError, RunError):
        # Raised on all ranks, so they can part in order.
        leave_world(run.engine if run is not None else None)
        raise
    except Exception as error:
        end_alone(error, settings)


def end_alone(error: Exception, settings: Settings) -> NoReturn:
    """End this rank at once: what went wrong here, the others don't know of, and anything done together would wait for them."""
    rank = settings.world.rank
    if isinstance(error, RuntimeError) and any(words in f"{type(error).__name__} {error}" for words in LOST_CONTACT):
        print(
            f"run failed: rank {rank} has lost contact with another rank, which has ended or can't be reached; its own message, if it had "
            "time for one, stands above. The last complete checkpoint is kept: the same command goes on from it. "
            f"({str(error).splitlines()[0][:200]})",
            file=sys.stderr,
        )
        if settings.arguments.verbose:
            traceback.print_exc()
    else:
        print(f"run failed: rank {rank} met an error that nobody foresaw:", file=sys.stderr)
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_RUN_FAILED)
