"""Batches ready before the step asks: a worker process plans and lays out rows while the rank computes."""

import itertools
from collections.abc import Iterator

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dialogpt_ds.errors import RunError
from dialogpt_ds.order.batches import RankStep, Share, rank_step
from dialogpt_ds.order.position import OrderKey, Position
from dialogpt_ds.order.stream import RowStream
from dialogpt_ds.shards.reader import ShardDirectory


class _Steps(IterableDataset[RankStep | str]):
    """A rank's share of every optimizer step from a position on. Of n workers, worker k makes the steps k, k + n, k + 2n, ..."""

    def __init__(self, directory: ShardDirectory, key: OrderKey, share: Share, position: Position, padding_id: int) -> None:
        self.directory, self.key, self.share = directory, key, share
        self.position, self.padding_id = position, padding_id

    def __iter__(self) -> Iterator[RankStep | str]:
        info = get_worker_info()
        mine, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        stream = RowStream(self.directory, self.key)
        position = self.position
        try:
            for step in itertools.count():
                batch = stream.batch(position, self.share.global_rows)
                position = batch.position_after
                if step % workers == mine:
                    yield rank_step(stream, batch, self.share, self.padding_id)
        except RunError as error:
            yield str(error)


def step_batches(
    directory: ShardDirectory, key: OrderKey, share: Share, position: Position, padding_id: int, workers: int
) -> Iterator[RankStep]:
    """Yield this rank's share of one optimizer step after the other, without end.

    Raises:
        RunError: a block can't be read; the message is the reader's own, whatever process it came from.
    """
    steps = _Steps(directory, key, share, position, padding_id)
    loader = DataLoader(
        steps,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        multiprocessing_context="fork" if workers else None,
    )  # a worker inherits the open shards
    for step in loader:
        if isinstance(step, str):
            raise RunError(step)
        yield step
