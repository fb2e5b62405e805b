"""One dictionary per logged step, built once, goes to every place a person may look at."""

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dialogpt_ds.logs.metrics import known
from dialogpt_ds.logs.progress import Progress
from dialogpt_ds.logs.record import Record, Reply, Sink
from dialogpt_ds.logs.tensorboard import TensorBoard
from dialogpt_ds.logs.text_logs import TextLogs, printable
from dialogpt_ds.logs.wandb_run import WandbRun
from dialogpt_ds.order.batches import RankStep
from dialogpt_ds.redaction import without_secrets
from dialogpt_ds.training.engine import StepResult
from dialogpt_ds.training.evaluation import Evaluation
from dialogpt_ds.training.settings import Settings
from dialogpt_ds.training.state import ProgressState, perplexity


class Recorder:
    """Files first, then the terminal, TensorBoard and wandb. A sink that fails is reported once and left out. Exists on rank 0 only."""

    def __init__(self, settings: Settings, state: ProgressState, facts: Callable[[], dict[str, Any]]) -> None:
        arguments = settings.arguments
        self.progress = Progress(arguments.num_optim_steps, state.global_step, arguments.pbar)
        self.sinks: list[Sink] = [TextLogs(settings.log_dir, state.global_step), self.progress]
        if arguments.tensorboard:
            try:
                self.sinks.append(TensorBoard(settings.log_dir, state.global_step))
            except Exception as error:  # see record
                print(f"warning: TensorBoard's files can't be written, and are left out: {error}", file=sys.stderr, flush=True)
        self.wandb = WandbRun(arguments, settings.output_dir, facts, state.wandb_id, state.global_step)
        self.sinks.append(self.wandb)

    def record(self, record: Record) -> None:
        """Give a record to every sink."""
        for sink in list(self.sinks):
            try:
                sink.take(record)
            except Exception as error:  # whatever a sink meets, the run goes on without it
                self._leave_out(sink, error)

    def step(self, values: dict[str, Any], state: ProgressState) -> None:
        """Record one optimizer step."""
        values["seconds_left"] = self.progress.seconds_left(state.global_step)
        self.record(Record("step", known(values), state.train_log_values()))

    def evaluation(
        self, result: Evaluation, seconds: float, replies: list[Reply], seconds_replies: float, state: ProgressState
    ) -> None:
        """Record one evaluation with the replies to the sample prompts, and how long both took (seconds)."""
        values = {
            "step": state.global_step,
            "eval_loss": result.loss,
            "eval_ppl": result.perplexity,
            **{f"eval_loss_{group}": loss for group, loss in result.turn_losses.items()},
            "eval_targets": result.num_targets,
            "best_eval_loss": state.best_eval_loss,
            "best_eval_ppl": None if state.best_eval_loss is None else perplexity(state.best_eval_loss),
            "best_eval_step": None if state.best_eval_loss is None else state.best_step,
            "seconds_evaluation": seconds,
            "seconds_replies": seconds_replies if replies else None,
        }
        line = [state.epoch + 1, state.global_step, state.micro_steps, result.loss, result.perplexity]
        best = ", the best so far" if state.best_step == state.global_step and state.best_eval_loss is not None else ""
        text = (
            f"evaluation at step {state.global_step:,}: loss {result.loss:.4f}, perplexity {result.perplexity:,.2f} "
            f"on {result.num_targets:,} targets{best} ({seconds:.1f} s)"
        )
        if replies:
            text += f"\n  {replies[0].prompt} -> {shortened(replies[0].reply)}"
        self.record(Record("evaluation", known(values), line, text, replies))

    def saved(self, path: str, seconds: float, share: float, state: ProgressState) -> None:
        """Record a checkpoint, how long it took (seconds), and the share of this process's time that saving has taken so far."""
        values = {"step": state.global_step, "seconds_save": seconds, "save_share": share}
        text = f"checkpoint {path} ({seconds:.1f} s; saving took {share:.1%} of the time so far)"
        self.record(Record("save", known(values), text=text))

    def not_saved(self, why: str, num_failed: int, state: ProgressState) -> None:
        """Record a checkpoint that could not be written."""
        text = (
            f"WARNING: the checkpoint of step {state.global_step:,} could not be saved: {why}. Nothing of it is left; the last complete "
            "checkpoint is untouched, and training goes on to the next save."
        )
        self.record(Record("save", known({"step": state.global_step, "failed_saves": num_failed}), text=text))

    def say(self, line: str) -> None:
        """Print a line."""
        if self.progress not in self.sinks:
            return
        try:
            self.progress.say(line)
        except Exception as error:  # see record
            self._leave_out(self.progress, error)

    def say_last(self, text: str) -> None:
        """Print when the terminal's bar is gone."""
        with contextlib.suppress(Exception):  # nobody reads any more
            if text:
                print(without_secrets(text), flush=True)

    def close_files(self) -> None:
        """Finish everything but wandb, which may have something to wait for."""
        for sink in [sink for sink in self.sinks if sink is not self.wandb]:
            try:
                sink.close()
            except Exception as error:  # see record
                self._leave_out(sink, error)

    def finish_wandb(self, exit_code: int, hurry: bool, model: Path | None) -> list[str]:
        """End the wandb run, waiting for its server for a bounded time; returns what a person should be told.

        Args:
            exit_code: of this run.
            hurry: wait for less time, since others wait for this process.
            model: exported folder, for an artifact; None for none.
        """
        try:
            return self.wandb.finish(exit_code, hurry, model)
        except Exception as error:  # see record
            self._leave_out(self.wandb, error)
            return []

    def _leave_out(self, sink: Sink, error: Exception) -> None:
        if sink in self.sinks:
            self.sinks.remove(sink)
        if sink is self.progress:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (nobody reads any more, and Python would fail once more at its end)
        with contextlib.suppress(OSError):  # the terminal is gone
            said = without_secrets(f"warning: {sink.name} failed and is left out from here on: {error!r}")
            print(said, file=sys.stderr, flush=True)


def shortened(text: str, length: int = 100) -> str:
    """Return a text as one line of at most `length` characters."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= length else f"{line[: length - 1]}…"


def step_values(
    result: StepResult, step: RankStep, state: ProgressState, facts: dict[str, float | None], operations: float
) -> dict[str, Any]:
    """Return the metrics of one optimizer step, but for the time left; see logs.metrics for what each says.

    Args:
        result: what the step gave.
        step: its rows.
        state: counts after the step.
        facts: those of the metrics that are known by name: lr, seconds_per_step, memory, ...
        operations: share of the devices' peak that the step's arithmetic took for a second; what `mfu` is in a step of one second.
    """
    seconds = facts["seconds_per_step"]
    assert seconds is not None
    waited = facts["seconds_data"]
    assert waited is not None
    values: dict[str, Any] = {
        "step": state.global_step,
        "epoch": step.fractional_epoch,
        "loss": result.loss,
        "ppl": perplexity(result.loss),
        **{f"loss_{group}": loss for group, loss in result.turn_losses.items()},
        "grad_norm": result.grad_norm,
        "loss_spikes": state.loss_spikes,
        "tokens_per_second": step.num_tokens / seconds,
        "target_tokens_per_second": step.num_targets / seconds,
        "mfu": operations / seconds,
        "data_wait_share": min(waited / seconds, 1.0),
        "rows_seen": state.rows_seen,
        "tokens_seen": state.tokens_seen,
        "targets_seen": state.targets_seen,
        **facts,
        **{f"seconds_{name}": value for name, value in result.seconds.items()},
    }
    if len(step.source_epochs) > 1:
        values |= {f"epoch_source_{number}": epochs for number, epochs in enumerate(step.source_epochs)}
    return values
