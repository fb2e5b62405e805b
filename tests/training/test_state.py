"""Counts of a run: sums start anew with the epoch of a step's last row, as DialoGPT's log has them."""

import math

import pytest

from dialogpt_ds.order.batches import RankStep
from dialogpt_ds.order.mixture import MixturePosition
from dialogpt_ds.training.state import ProgressState, perplexity


def step_of(epoch: int, weight: float) -> RankStep:
    return RankStep([None, None], weight, 4, 200, 90, 7, epoch, epoch + 0.5, (epoch + 0.5,), MixturePosition.start())  # type: ignore[list-item]


def test_a_line_of_the_train_log() -> None:
    state = ProgressState()
    state.add_step(step_of(0, 1.0), loss=2.0, seconds=1.5, row_length=64)
    state.add_step(step_of(0, 3.0), loss=4.0, seconds=0.5, row_length=64)
    # mean loss (1*2 + 3*4) / 4; step counts micro-batches; tokens with padding are 2 * 4 rows * 64
    assert state.train_log_values() == [1, 2, 4, 3.5, pytest.approx(math.exp(3.5)), 400, 512, 2.0]
    state.add_step(step_of(1, 1.0), loss=1.0, seconds=0.5, row_length=64)
    assert state.train_log_values() == [2, 3, 6, 1.0, pytest.approx(math.e), 200, 256, 0.5]
    assert (state.rows_seen, state.tokens_seen, state.targets_seen) == (12, 600, 270)


def test_it_survives_a_checkpoint() -> None:
    state = ProgressState(global_step=3, best_eval_loss=1.5, wandb_id="abc")
    assert ProgressState(**state.to_plain()) == state


def test_perplexity_never_overflows() -> None:
    assert perplexity(1e9) == math.inf
    assert math.isnan(perplexity(math.nan))
