"""Exact perplexity over all ranks: every target of every row counts once, wherever it is computed."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dialogpt_ds.distributed.collectives import gather_reports
from dialogpt_ds.distributed.world import World
from dialogpt_ds.errors import RunError
from dialogpt_ds.model.loss import LossSums, to_tensors
from dialogpt_ds.order.batches import TURN_GROUPS, MicroBatch, make_micro_batch, padding_rows
from dialogpt_ds.order.stream import Rows, RowStream
from dialogpt_ds.training.engine import Engine
from dialogpt_ds.training.state import perplexity

GPU_BATCHES = 10
"""Batches of a GPU between questions to all ranks whether one was asked to stop: each question waits for the device."""


@dataclass(frozen=True)
class Evaluation:
    """The result, equal on all ranks."""

    loss: float
    """Mean negative log-likelihood of a target token, nats; every target counts 1, whatever its weight."""
    num_targets: int
    turn_losses: dict[str, float]
    """The same for each of TURN_GROUPS that has targets."""

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return perplexity(self.loss)


def evaluate(
    engine: Engine,
    stream: RowStream,
    world: World,
    rows_per_rank: int,
    padding_id: int,
    device: torch.device,
    turn_ids: bool,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Evaluate on all rows of one epoch of `stream`; None where a rank was asked to stop. Collective: every rank must
    call.

    All ranks run the same number of forward passes, since ZeRO-3 gathers weights in each; a rank without rows left runs
    on padding.

    Raises:
        RunError: on every rank, where one can't read a block; a figure without it could not be compared with the
            others.
    """
    groups = len(TURN_GROUPS)
    nll = torch.zeros(groups, dtype=torch.float64, device=device)
    counts = np.zeros(groups)
    was_training, asked = engine.training, False
    engine.eval()
    try:
        with torch.no_grad():
            for number, batch in enumerate(_batches(stream, world, rows_per_rank, padding_id, device)):
                asked = asked_to_stop() or asked
                if (number % GPU_BATCHES == 0 or device.type == "cpu") and _any_rank(asked, device):
                    return None
                counts += np.bincount(batch.turn_groups[batch.labels >= 0], minlength=groups)
                if device.type == "cuda":
                    batch = batch.pin_memory()
                sums: LossSums = engine(**to_tensors(batch, device, turn_ids))
                nll += sums.nll_by_turn
    finally:
        engine.train(was_training)
    everywhere = torch.stack([nll, torch.as_tensor(counts, device=device)])
    torch.distributed.all_reduce(everywhere)
    total_nll, totals = everywhere.tolist()
    by_group = zip(TURN_GROUPS, total_nll, totals, strict=True)
    return Evaluation(
        sum(total_nll) / sum(totals), int(sum(totals)), {name: total / n for name, total, n in by_group if n}
    )


def _batches(
    stream: RowStream, world: World, rows_per_rank: int, padding_id: int, device: torch.device
) -> Iterator[MicroBatch]:
    """Yield this rank's batches, all of one shape, so that nothing is compiled anew. Collective: every rank must go on
    with it.

    They are laid out while the device is at work on those before; only for a new window the ranks wait for each other.
    """
    length = stream.key.row_length
    for window in range(stream.num_windows()):
        rows = _rows_of_window(stream, window, device)
        for start in range(0, rows.num_rows, rows_per_rank * world.size):
            first = start + world.rank * rows_per_rank
            mine = range(min(first, rows.num_rows), min(first + rows_per_rank, rows.num_rows))
            if mine:
                yield make_micro_batch(rows, mine, length, padding_id, rows_per_rank)
            else:
                yield padding_rows(rows_per_rank, length, padding_id)


def _any_rank(mine: bool, device: Any) -> bool:
    told = torch.tensor(float(mine), device=device)
    torch.distributed.all_reduce(told)
    return bool(told.item())


def _rows_of_window(stream: RowStream, window: int, device: Any) -> Rows:
    """Plan and read a window; if one rank can't, all raise RunError. Collective: every rank must call."""
    rows, failure = None, None
    try:
        rows = stream.whole_window(0, window)
        rows.segments[0].content()  # read now, where all ranks can agree on it; the plan keeps it
    except (RunError, OSError) as error:
        failure = f"evaluation: {error}"
    failures = gather_reports(failure, device)
    if failures:
        raise RunError(failures[0])
    assert rows is not None
    return rows
