"""The training run: one loop around the engine, from a position in the order to the exported model."""

import json
import math
import time
from typing import Any

import torch
import yaml

from dialogpt_ds.errors import EXIT_DONE, RunError
from dialogpt_ds.files import replace_text, sha256_of_json
from dialogpt_ds.logs.recorder import Recorder, step_values
from dialogpt_ds.logs.start_table import start_table
from dialogpt_ds.model.load import build_model
from dialogpt_ds.order.batches import RankStep
from dialogpt_ds.order.mixture import MixturePosition, order_state, position_from_state
from dialogpt_ds.order.stream import RowStream
from dialogpt_ds.training.agreement import different_from_first
from dialogpt_ds.training.checkpoint import FoundCheckpoint, load_checkpoint, mark_best, save_checkpoint
from dialogpt_ds.training.data import TrainingData
from dialogpt_ds.training.engine import StepResult, learning_rate, loss_scale, start_engine, take_up_schedule, train_step
from dialogpt_ds.training.evaluation import evaluate
from dialogpt_ds.training.export import export_model
from dialogpt_ds.training.progress_state import ProgressState
from dialogpt_ds.training.settings import Settings, order_key
from dialogpt_ds.training.world import join_world, leave_world


class TrainingRun:
    """A run in progress. Every method that computes is collective: every rank must call."""

    def __init__(self, settings: Settings, found: FoundCheckpoint | None) -> None:
        self.settings = settings
        self.arguments = settings.arguments
        self.world = settings.world
        self.turn_ids = not self.arguments.no_token_id
        torch.manual_seed(self.arguments.seed)
        # Weights that don't fit are a mistake, and mistakes are said before the ranks come together.
        model = build_model(settings.model, self.arguments.init_checkpoint or None)
        self.device = join_world(self.world)
        check_same_run(settings, found)
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self.engine = start_engine(settings, model)
        self.state = ProgressState()
        position = MixturePosition.start(len(settings.directories))
        if found is not None:
            saved = load_checkpoint(self.engine, found)
            take_up_schedule(self.engine, settings)
            self.state = ProgressState(**saved["progress"])
            position = position_from_state(saved["order"], settings.order_key)
        self.data = TrainingData(settings, position, self.device)
        self.recorder: Recorder | None = None

    @property
    def steps_left(self) -> int:
        """Optimizer steps until num_optim_steps."""
        return max(self.arguments.num_optim_steps - self.state.global_step, 0)

    def run(self) -> None:
        """Train to num_optim_steps, evaluate, save, export."""
        if self.world.is_first:
            self.recorder = Recorder(self.settings, self.state)
            self.state.wandb_id = self.recorder.wandb.run_id
            self._write_what_runs()
            self.recorder.say(start_table(self.settings, self.num_parameters, self.recorder.wandb.mode, self.state.global_step))
        for _ in range(self.steps_left):
            self._step()
            step = self.state.global_step
            last = not self.steps_left
            improved = self._evaluate() if last or step % self.arguments.valid_step == 0 else False
            if last or improved or step % self.settings.save_step == 0:
                self._save(improved)
        self.data.close()
        self._export()

    def _step(self) -> None:
        started = time.perf_counter()
        step, warnings = self.data.next_step()
        if self.recorder is not None:
            for warning in warnings:
                self.recorder.say(warning)
        rate = learning_rate(self.engine)
        if self.arguments.dropout:
            # The random state of a step depends on nothing before it, so a resume needs none of it stored.
            torch.manual_seed(hash((self.arguments.seed, self.state.global_step, self.world.rank)))
        result = train_step(self.engine, step, self.device, self.turn_ids)
        seconds = time.perf_counter() - started
        self.state.add_step(step, result.loss, seconds, self.settings.row_length)
        if self.recorder is not None:
            self._record(step, result, rate, seconds)
        if not math.isfinite(result.loss):
            raise RunError(
                f"the loss of step {self.state.global_step} is {result.loss} (learning rate {rate:.3e}, gradient norm "
                f"{result.grad_norm}): training has diverged. The last checkpoint is from before; lower learning_rate, lengthen "
                "warmup_steps, or train in bf16 or fp32."
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

    def _evaluate(self) -> bool:
        """Evaluate; returns whether it is the best so far."""
        directory = self.settings.evaluation
        if directory is None:
            return False
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
        )
        seconds = time.perf_counter() - started
        self.state.epoch_seconds += seconds
        best = self.state.best_eval_loss
        improved = math.isfinite(result.loss) and (best is None or result.loss < best)
        if improved:
            self.state.best_eval_loss, self.state.best_step = result.loss, self.state.global_step
        if self.recorder is not None:
            self.recorder.evaluation(result, seconds, self.state)
        return improved

    def _save(self, improved: bool) -> None:
        started = time.perf_counter()
        step = self.state.global_step
        state = {
            "progress": self.state.to_plain(),
            "order": order_state(self.settings.order_key, self.data.position),
        }
        path = save_checkpoint(self.engine, self.settings, state, step)
        seconds = time.perf_counter() - started
        self.state.epoch_seconds += seconds
        if self.recorder is not None:
            if improved:
                mark_best(self.settings, step)
            self.recorder.saved(str(path), seconds, self.state)

    def _export(self) -> None:
        folder = export_model(self.engine, self.settings)
        if self.recorder is None:
            return
        sync = self.recorder.close()
        best = self.state.best_eval_loss
        print(f"done: {self.state.global_step:,} steps, {self.state.tokens_seen:,} tokens, {self.state.rows_seen:,} rows")
        if best is not None:
            print(f"best evaluation: loss {best:.4f}, perplexity {math.exp(best):,.2f} at step {self.state.best_step:,}")
        print(f"model: {folder}\nlogs: {self.settings.log_dir}\ncheckpoints: {self.settings.output_dir / 'checkpoints'}")
        if sync:
            print(f"upload to wandb: {sync}")

    def _write_what_runs(self) -> None:
        settings = self.settings
        text = yaml.safe_dump(settings.what_runs(), sort_keys=False, allow_unicode=True)
        replace_text(settings.output_dir / "run_config.yaml", text)
        replace_text(settings.output_dir / "ds_config.json", json.dumps(settings.deepspeed, indent=2) + "\n")


def check_same_run(settings: Settings, found: FoundCheckpoint | None) -> None:
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
        "checkpoint that is gone on from": found and found.path.name,
    }
    different = different_from_first({name: sha256_of_json(repr(value)) for name, value in facts.items()})
    if different:
        raise RunError(
            "the ranks were not all given the same run. These differ from rank 0:\n  "
            + "\n  ".join(f"{name}: rank {', '.join(map(str, ranks))}" for name, ranks in different.items())
            + "\nDo all nodes have the same copy of the data and of the configuration, and is output_dir shared by them?"
        )


def train(settings: Settings, found: FoundCheckpoint | None) -> int:
    """Run to the end; returns the exit code. Collective: every rank must call."""
    engine: Any = None
    try:
        run = TrainingRun(settings, found)
        engine = run.engine
        run.run()
    finally:
        leave_world(engine)
    return EXIT_DONE
