"""One dictionary per logged step, built once, goes to every place a person may look at."""

from typing import Any

from dialogpt_ds.logs.progress import Progress
from dialogpt_ds.logs.text_logs import TextLogs
from dialogpt_ds.logs.wandb_run import WandbRun
from dialogpt_ds.training.engine import StepResult
from dialogpt_ds.training.evaluation import Evaluation
from dialogpt_ds.training.progress_state import ProgressState, perplexity
from dialogpt_ds.training.settings import Settings


class Recorder:
    """Files first, then the terminal, then wandb. Exists on rank 0 only."""

    def __init__(self, settings: Settings, state: ProgressState) -> None:
        arguments = settings.arguments
        self.settings = settings
        self.logs = TextLogs(settings.log_dir, state.global_step)
        self.wandb = WandbRun(
            mode=arguments.wandb_mode,
            project=arguments.wandb_project,
            name=arguments.wandb_run_name or settings.output_dir.name,
            tags=arguments.wandb_tags,
            folder=settings.output_dir,
            config=settings.what_runs()
            | {"deepspeed": settings.deepspeed, "shards": {d.name: d.manifest.totals for d in settings.directories}},
            run_id=state.wandb_id,
        )
        self.progress = Progress(arguments.num_optim_steps, state.global_step, arguments.pbar)

    def step(self, values: dict[str, Any], state: ProgressState) -> None:
        """Record one optimizer step."""
        self.logs.train_line(state.train_log_values())
        self.logs.metrics_line(values)
        self.progress.show(state.global_step, values["loss"], values["ppl"], values["tokens_per_second"], values["lr"])
        self.wandb.log(values)

    def evaluation(self, result: Evaluation, seconds: float, state: ProgressState) -> None:
        """Record one evaluation."""
        values = {
            "step": state.global_step,
            "eval_loss": result.loss,
            "eval_ppl": result.perplexity,
            "eval_targets": result.num_targets,
            "best_eval_loss": state.best_eval_loss,
            "seconds_evaluation": seconds,
        }
        self.logs.eval_line([state.epoch + 1, state.global_step, state.micro_steps, result.loss, result.perplexity])
        self.logs.metrics_line(values)
        self.progress.say(
            f"evaluation at step {state.global_step:,}: loss {result.loss:.4f}, perplexity {result.perplexity:,.2f} "
            f"on {result.num_targets:,} targets ({seconds:.1f} s)"
        )
        self.wandb.log(values)

    def saved(self, path: str, seconds: float, share: float, state: ProgressState) -> None:
        """Record a checkpoint, how long it took (seconds), and the share of this process's time that saving has taken so far."""
        values = {"step": state.global_step, "seconds_save": seconds, "save_share": share}
        self.logs.metrics_line(values)
        self.progress.say(f"checkpoint {path} ({seconds:.1f} s; saving took {share:.1%} of the time so far)")
        self.wandb.log(values)

    def not_saved(self, why: str, num_failed: int, state: ProgressState) -> None:
        """Record a checkpoint that could not be written."""
        values = {"step": state.global_step, "failed_saves": num_failed}
        self.logs.metrics_line(values)
        self.progress.say(
            f"WARNING: the checkpoint of step {state.global_step:,} could not be saved: {why}. Nothing of it is left; the last complete "
            "checkpoint is untouched, and training goes on to the next save."
        )
        self.wandb.log(values)

    def say(self, line: str) -> None:
        """Print a line."""
        self.progress.say(line)

    def close(self) -> str | None:
        """Close every place; returns the command that uploads an offline wandb run."""
        self.progress.close()
        self.logs.close()
        return self.wandb.finish()


def step_values(
    result: StepResult,
    state: ProgressState,
    facts: dict[str, Any],
    seconds: float,
    seconds_data: float,
    row_length: int,
) -> dict[str, Any]:
    """Return the metrics of one optimizer step; seconds are wall-clock, tokens are real ones unless they say padding.

    Args:
        result: what the step gave.
        state: counts after the step.
        facts: lr, loss_scale, skipped_steps, loss_spikes, peak_memory (bytes), skipped_blocks and skipped_examples so far, and the
            step's rows, tokens, targets, fractional epoch and that of each source.
        seconds: of the whole step.
        seconds_data: of it, spent waiting for the batch.
        row_length: tokens of a row.
    """
    values = {
        "step": state.global_step,
        "epoch": facts["epoch"],
        "loss": result.loss,
        "ppl": perplexity(result.loss),
        "lr": facts["lr"],
        "grad_norm": result.grad_norm,
        "loss_scale": facts["loss_scale"],
        "skipped_steps": facts["skipped_steps"],
        "loss_spikes": facts["loss_spikes"],
        "peak_memory_gib": facts["peak_memory"] / 2**30,
        "tokens_per_second": facts["tokens"] / seconds,
        "target_tokens_per_second": facts["targets"] / seconds,
        "padding_share": 1.0 - facts["tokens"] / (facts["rows"] * row_length),
        "data_wait_share": seconds_data / seconds,
        "skipped_blocks": facts["skipped_blocks"],
        "skipped_examples": facts["skipped_examples"],
        "rows_seen": state.rows_seen,
        "tokens_seen": state.tokens_seen,
        "targets_seen": state.targets_seen,
        "seconds_per_step": seconds,
        "seconds_data": seconds_data,
    }
    if len(facts["source_epochs"]) > 1:
        values |= {f"epoch_source_{number}": epochs for number, epochs in enumerate(facts["source_epochs"])}
    return values | {f"seconds_{name}": value for name, value in result.seconds.items()}
