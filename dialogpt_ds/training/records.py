"""What training records of a step, an evaluation and a save: the rows of metrics.jsonl, and what a person reads."""

from typing import Any

from dialogpt_ds.logs.metrics import checked_row
from dialogpt_ds.logs.record import LogRecord, Reply
from dialogpt_ds.logs.text_logs import printable
from dialogpt_ds.order.batches import RankStep
from dialogpt_ds.training.evaluation import Evaluation
from dialogpt_ds.training.state import ProgressState, perplexity
from dialogpt_ds.training.step import StepResult


def step_record(
    result: StepResult, step: RankStep, state: ProgressState, facts: dict[str, float | None], operations: float
) -> LogRecord:
    """Return the record of one optimizer step; see logs.metrics for what each metric says.

    Args:
        result: what the step gave.
        step: its rows.
        state: counts after the step.
        facts: those of the metrics that are known by name: lr, seconds_per_step, memory, ...
        operations: share of the devices' peak that the step's arithmetic took for a second; what `mfu` is in a step of
            one second.
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
    return LogRecord("step", checked_row(values), state.train_log_values())


def evaluation_record(
    result: Evaluation, seconds: float, replies: list[Reply], seconds_replies: float, state: ProgressState
) -> LogRecord:
    """Return the record of an evaluation with the replies to the sample prompts, and how long both took (seconds)."""
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
    return LogRecord("evaluation", checked_row(values), line, text, replies)


def shortened(text: str, length: int = 100) -> str:
    """Return a text as one line of at most `length` characters."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= length else f"{line[: length - 1]}…"


def save_record(path: str, seconds: float, share: float, step: int) -> LogRecord:
    """Return the record of a checkpoint, how long it took (seconds), and the share of this process's time that saving
    took so far."""
    values = {"step": step, "seconds_save": seconds, "save_share": share}
    text = f"checkpoint {path} ({seconds:.1f} s; saving took {share:.1%} of the time so far)"
    return LogRecord("save", checked_row(values), text=text)


def failed_save_record(why: str, num_failed: int, step: int) -> LogRecord:
    """Return the record of a checkpoint that could not be written."""
    text = (
        f"WARNING: the checkpoint of step {step:,} could not be saved: {why}. Nothing of it is left; the last complete "
        "checkpoint is untouched, and training goes on to the next save."
    )
    return LogRecord("save", checked_row({"step": step, "failed_saves": num_failed}), text=text)
