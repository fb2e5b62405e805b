"""How far a run has come: what a checkpoint keeps beside the engine's own state. Plain types, equal on all ranks."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from dialogpt_ds.order.batches import RankStep


@dataclass
class ProgressState:
    """Counts since the run's start, and since its epoch's start where DialoGPT's log wants those."""

    global_step: int = 0
    """Optimizer steps done, skipped ones included."""
    micro_steps: int = 0
    """Micro-batches per rank, never reset."""
    rows_seen: int = 0
    tokens_seen: int = 0
    """Without padding."""
    targets_seen: int = 0
    best_eval_loss: float | None = None
    best_step: int = 0
    evaluated_step: int = 0
    """Step of the last evaluation that was finished."""
    last_eval_loss: float | None = None
    wandb_id: str | None = None
    epoch: int = 0
    """Epoch of the last step's last row, from 0."""
    epoch_weighted_nll: float = 0.0
    epoch_weight: float = 0.0
    epoch_tokens: int = 0
    epoch_places: int = 0
    """Tokens with padding: rows * max_seq_length."""
    epoch_seconds: float = 0.0
    skips_in_a_row: int = 0
    """Updates skipped since the last one that was made."""
    last_good_loss: float | None = None
    """Of the last step whose update was made."""
    last_good_step: int = 0
    usual_loss: float = 0.0
    """Exponential mean of the losses of the last steps, and their variance around it."""
    usual_variance: float = 0.0
    usual_steps: int = 0
    """Steps in it."""
    loss_spikes: int = 0
    """Steps so far whose loss lay far above the usual one."""

    def to_plain(self) -> dict[str, Any]:
        """Return what a checkpoint stores."""
        return asdict(self)

    def facts_for_a_card(self) -> dict[str, Any]:
        """Return the figures that a model card shows."""
        return {
            "tokens_seen": self.tokens_seen,
            "targets_seen": self.targets_seen,
            "eval_loss": self.last_eval_loss,
            "eval_step": self.evaluated_step,
        }

    def begin_epoch(self, epoch: int) -> None:
        """Begin the sums of an epoch anew."""
        self.epoch = epoch
        self.epoch_weighted_nll = self.epoch_weight = self.epoch_seconds = 0.0
        self.epoch_tokens = self.epoch_places = 0

    def add_step(self, step: RankStep, loss: float, seconds: float, row_length: int) -> None:
        """Count one optimizer step; a step whose last row is in a new epoch opens that epoch's sums."""
        if step.epoch != self.epoch:
            self.begin_epoch(step.epoch)
        self.global_step += 1
        self.micro_steps += len(step.micro_batches)
        self.rows_seen += step.num_rows
        self.tokens_seen += step.num_tokens
        self.targets_seen += step.num_targets
        self.epoch_weighted_nll += loss * step.weight_sum
        self.epoch_weight += step.weight_sum
        self.epoch_tokens += step.num_tokens
        self.epoch_places += step.num_rows * row_length
        self.epoch_seconds += seconds

    def train_log_values(self) -> list[int | float]:
        """Return the values of a line of train_log.txt, in the order of its header."""
        mean = self.epoch_weighted_nll / self.epoch_weight
        return [
            self.epoch + 1, self.global_step, self.micro_steps, mean, perplexity(mean),
            self.epoch_tokens, self.epoch_places, self.epoch_seconds,
        ]  # fmt: skip


def perplexity(loss: float) -> float:
    """Return exp(loss), infinite where a float can't hold it."""
    return math.exp(loss) if loss < 700 else math.inf if loss == loss else math.nan
