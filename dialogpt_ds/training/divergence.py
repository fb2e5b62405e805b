"""Steps that go wrong: a loss that is not finite, updates skipped one after another, a loss that jumps."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from dialogpt_ds.distributed.collectives import all_gather, gather_reports
from dialogpt_ds.errors import RunError
from dialogpt_ds.model.loss import LossSums, to_tensors
from dialogpt_ds.model.saved_bytes import parts_here
from dialogpt_ds.order.batches import MicroBatch, make_micro_batch
from dialogpt_ds.order.mixture import Mixture, MixturePosition
from dialogpt_ds.order.places import examples_in, listed
from dialogpt_ds.training.engine import Engine
from dialogpt_ds.training.settings import Settings
from dialogpt_ds.training.state import ProgressState
from dialogpt_ds.training.step import StepResult

SPIKE_DEVIATIONS = 6.0
"""A loss is a spike where it lies so many standard deviations above the usual one ..."""
SMALLEST_SPIKE = 0.1
"""... and at least so many nats: near 0, losses hardly vary."""
USUAL_STEPS = 50
"""The usual loss is an exponential mean with a memory of so many steps; before as many are seen, nothing is judged."""
SHOWN_ROWS = 3


@dataclass(frozen=True)
class Scale:
    """fp16's loss scale around a step; equal on all ranks."""

    before: float
    after: float
    lowest: float | None
    """It may not go below; None where it is fixed, or there is none."""


class Verdict(NamedTuple):
    """On a step."""

    end: str | None = None
    """Why the run has to end."""
    warning: str | None = None


class DivergenceWatch:
    """Looks at what each step gave. All ranks have the same figures, so all come to the same verdict at once."""

    def __init__(self, settings: Settings, state: ProgressState) -> None:
        self.settings, self.state = settings, state
        self.limit = allowed_skips(settings)

    def judge(self, result: StepResult, rate: float, scale: Scale) -> Verdict:
        """Judge a step that has been counted in the state.

        Args:
            result: what the step gave.
            rate: its learning rate.
            scale: the loss scale around it.
        """
        state, loss, norm = self.state, result.loss, result.grad_norm
        state.skips_in_a_row = 0 if result.applied else state.skips_in_a_row + 1
        end = self._why_to_end(result, scale)
        if end is not None:
            last = state.last_good_loss
            good = (
                "there was no good step before"
                if last is None
                else f"the last good loss was {last:.4f} at step {state.last_good_step:,}"
            )
            return Verdict(
                end=f"{end} (loss {loss:.4f}, gradient norm {_or_unknown(norm)}, learning rate {rate:.3e}); {good}"
            )
        if not result.applied:
            return Verdict(warning=self._warning_of_a_skip(scale))
        spike = self._spike(loss)
        state.last_good_loss, state.last_good_step = loss, state.global_step
        if spike is None:
            return Verdict()
        warning = (
            f"warning: the loss of step {state.global_step:,} jumped to {loss:.4f}, usual are {spike} (gradient norm "
            f"{_or_unknown(norm)}, learning rate {rate:.3e}). If it does not come back within some hundred steps: a "
            "lower learning_rate, a longer warm-up, or gradient_clipping below 1"
        )
        return Verdict(warning=warning)

    def _why_to_end(self, result: StepResult, scale: Scale) -> str | None:
        if not math.isfinite(result.loss):
            return f"the loss is {result.loss}"
        norm = result.grad_norm
        if result.applied and norm is not None and not math.isfinite(norm):
            return f"the gradient's norm is {norm}, and it was applied"
        if not result.applied and scale.lowest is not None and scale.before <= scale.lowest:
            return f"gradients overflow fp16 at the lowest loss scale, {scale.lowest:g}, so no update is possible"
        if self.state.skips_in_a_row > self.limit:
            return f"{self.state.skips_in_a_row:,} updates in a row were skipped, because gradients were not finite"
        return None

    def _warning_of_a_skip(self, scale: Scale) -> str | None:
        """Return a line for an update that was skipped; fp16's scaler does that by design while it looks for its
        scale."""
        step, count = self.state.global_step, self.state.skips_in_a_row
        if self.settings.precision != "fp16":
            return f"warning: the gradient of step {step:,} is not finite; its update was skipped on all ranks"
        if count < 5 or count & (count - 1):  # at 8, 16, 32, ... in a row
            return None
        return (
            f"warning: {count} updates in a row were skipped, because gradients overflow fp16; its loss scale is "
            f"{scale.after:g} now (the run ends after {self.limit:,})"
        )

    def _spike(self, loss: float) -> str | None:
        """Take a loss into the usual one; returns the usual range where it is a spike."""
        state = self.state
        spike = None
        if state.usual_steps == 0:
            state.usual_loss = loss
        deviation = math.sqrt(state.usual_variance)
        highest = state.usual_loss + max(SPIKE_DEVIATIONS * deviation, SMALLEST_SPIKE)
        if state.usual_steps >= USUAL_STEPS and loss > highest:
            spike = f"{state.usual_loss:.4f} +- {deviation:.4f}"
            state.loss_spikes += 1
            loss = highest  # so that one spike does not hide the next
        # Exponential mean and variance (Finch 2009, equations 124 and 143), an ordinary mean while there are few.
        state.usual_steps += 1
        share = 1.0 / min(state.usual_steps, USUAL_STEPS)
        difference = loss - state.usual_loss
        state.usual_loss += share * difference
        state.usual_variance = (1.0 - share) * (state.usual_variance + share * difference**2)
        return spike


def allowed_skips(settings: Settings) -> int:
    """Return how many updates in a row may be skipped: --max_skipped_steps, and all that fp16's loss scale needs to
    come down."""
    fp16 = settings.deepspeed.get("fp16", {})
    if settings.precision != "fp16" or fp16.get("loss_scale"):
        return settings.arguments.max_skipped_steps
    return max(settings.arguments.max_skipped_steps, int(fp16["initial_scale_power"]) + int(fp16["hysteresis"]))


@dataclass(frozen=True)
class Diverged:
    """A step that ends the run."""

    step: int
    why: str
    before: MixturePosition
    """Where its rows begin."""
    saved_step: int | None
    """Step of the last complete checkpoint."""


def divergence_error(
    found: Diverged, engine: Engine, settings: Settings, device: torch.device, beat: Callable[[str], None]
) -> RunError:
    """Return the error that ends a run, with the rows that the trouble comes from. Collective: every rank must call.

    Args:
        found: what happened, where.
        engine: as it is after the step, whose update was skipped.
        settings: of the run.
        device: of this rank's tensors.
        beat: told of each row, so that the search is not taken for a hang.
    """
    if settings.precision == "fp16":
        advice = (
            "train in bf16 or fp32 (fp16 holds nothing above 65,504), lower learning_rate, or lengthen warmup_steps"
        )
    else:
        advice = "lower learning_rate, lengthen warmup_steps, or lower gradient_clipping"
    if found.saved_step is None:
        saved = "no checkpoint has been saved yet"
    else:
        saved = f"the last checkpoint is that of step {found.saved_step:,}, and --continue_from takes an earlier one"
    batches, failures = _rows_again(settings, found.before, device)
    if failures:
        rows = f"they can't be read again: {failures[0]}"
    else:
        losses = _losses_of_rows(batches, engine, settings.turn_ids, device, beat)
        rows = "\n  ".join(_lines(losses, _weights_are_broken(engine, device)))
    return RunError(
        f"step {found.step:,}: training has diverged: {found.why}.\n"
        "The step's rows, each run once more with the weights as they are:\n"
        f"  {rows}\n"
        f"Nothing of this step was saved; {saved}. What helps: {advice}. If a few rows stand out, look at them "
        "(inspect_shards.py --at)."
    )


@dataclass(frozen=True)
class RowLoss:
    """What the model says to one row."""

    row: int
    """Number in the step's global batch."""
    loss: float
    """Mean over its targets, nats."""
    places: str
    """Its examples."""


def _rows_again(
    settings: Settings, before: MixturePosition, device: torch.device
) -> tuple[list[tuple[int, MicroBatch, str]], list[str]]:
    """Return this rank's rows of a step, each with its number and its examples' places; and what ranks that can't read
    theirs say.

    Collective: every rank must call.
    """
    share, failure = settings.share, None
    batches = []
    try:
        rows = Mixture(settings.directories, settings.order_key, before.skipped).batch(before, share.global_rows).rows
        for row in (row for number in range(share.accumulation) for row in share.rows(number)):
            batch = make_micro_batch(rows, range(row, row + 1), settings.row_length, settings.train.manifest.eos_id)
            batches.append((row, batch, listed(examples_in(rows, row))))
    except (RunError, OSError) as error:
        failure = str(error)
    return batches, gather_reports(failure, device)


def _weights_are_broken(engine: Engine, device: torch.device) -> bool:
    """Return whether some rank holds a weight that is not finite. Collective: every rank must call."""
    broken = any(not bool(torch.isfinite(part).all()) for part in parts_here(engine.module.parameters()))
    return bool(gather_reports(True if broken else None, device))


def _losses_of_rows(
    batches: list[tuple[int, MicroBatch, str]],
    engine: Engine,
    turn_ids: bool,
    device: torch.device,
    beat: Callable[[str], None],
) -> list[RowLoss]:
    """Run a step's rows one by one, each rank its own; returns all. Collective: every rank must call."""
    mine = []
    was_training = engine.training
    engine.eval()
    try:
        with torch.no_grad():
            for row, batch, places in batches:
                beat(f"looking at row {row} of the step that diverged")
                sums: LossSums = engine(**to_tensors(batch, device, turn_ids))
                mine.append(
                    RowLoss(row, float(sums.nll_by_turn.sum()) / max(int((batch.labels >= 0).sum()), 1), places)
                )
    finally:
        engine.train(was_training)
    return [found for theirs in all_gather(mine) for found in theirs]


def _lines(rows: list[RowLoss], weights_are_broken: bool) -> list[str]:
    """Return what to say of the rows: those whose loss is not finite, else those with the highest."""
    broken = [row for row in rows if not math.isfinite(row.loss)]
    if len(broken) == len(rows) and (weights_are_broken or len(rows) > 1):
        return [
            f"all {len(rows):,} rows have a loss that is not finite: it is the weights that are broken, not the data"
        ]
    if broken:
        head = f"{len(broken):,} of {len(rows):,} rows have a loss that is not finite:"
    else:
        head = f"all {len(rows):,} rows have a finite loss, {min(r.loss for r in rows):.4f} at least; the highest:"
    shown = sorted(broken or rows, key=lambda row: (-row.loss if math.isfinite(row.loss) else 0.0, row.row))[
        :SHOWN_ROWS
    ]
    return [head, *(f"row {row.row:,}: loss {row.loss:.4f}: {row.places}" for row in shown)]


def _or_unknown(norm: float | None) -> str:
    return "unknown" if norm is None else f"{norm:.4g}"
