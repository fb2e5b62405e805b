"""Exact perplexity over all ranks: every target of every row counts once, wherever it is computed."""

from dataclasses import dataclass
from typing import Any

import torch

from dialogpt_ds.model.loss import to_tensors
from dialogpt_ds.order.batches import MicroBatch, make_micro_batch, padding_rows
from dialogpt_ds.order.position import Position
from dialogpt_ds.order.stream import RowStream
from dialogpt_ds.training.progress_state import perplexity
from dialogpt_ds.training.world import World


@dataclass(frozen=True)
class Evaluation:
    """The result, equal on all ranks."""

    loss: float
    """Mean negative log-likelihood of a target token, nats; every target counts 1, whatever its weight."""
    num_targets: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return perplexity(self.loss)


def evaluate(
    engine: Any, stream: RowStream, world: World, rows_per_rank: int, padding_id: int, device: Any, turn_ids: bool
) -> Evaluation:
    """Evaluate on all rows of one epoch of `stream`. Collective: every rank must call.

    All ranks run the same number of forward passes, since ZeRO-3 gathers weights in each; a rank without rows left runs on padding.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    was_training = engine.training
    engine.eval()
    try:
        with torch.no_grad():
            position = Position()
            while position.epoch == 0:
                whole = stream.batch(position, 1).segments[0].window.num_rows
                for start in range(0, whole, rows_per_rank * world.size):
                    batch = _share(stream, Position(0, position.window, start), world, rows_per_rank, whole, padding_id)
                    _, nll = engine(**to_tensors(batch, device, turn_ids))
                    sums += torch.stack([nll.double(), torch.as_tensor(batch.labels >= 0, device=device).sum().double()])
                position = stream.batch(Position(0, position.window, 0), whole).position_after
    finally:
        engine.train(was_training)
    torch.distributed.all_reduce(sums)
    nll_sum, count = sums.tolist()
    return Evaluation(nll_sum / count, int(count))


def _share(stream: RowStream, position: Position, world: World, rows_per_rank: int, whole: int, padding_id: int) -> MicroBatch:
    """Return this rank's rows of the `rows_per_rank` * world rows from `position` on in a window of `whole` rows."""
    batch = stream.batch(position, min(rows_per_rank * world.size, whole - position.row))
    rows = list(batch.rows())[world.rank * rows_per_rank : (world.rank + 1) * rows_per_rank]
    if not rows:
        return padding_rows(rows_per_rank, stream.key.row_length, padding_id)
    return make_micro_batch(stream, rows, padding_id)
