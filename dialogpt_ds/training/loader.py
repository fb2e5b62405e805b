"""Batches ready before the step asks: a worker process plans and lays out rows while the rank computes."""

import itertools
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dialogpt_ds.distributed.stop_requests import ignore_in_child
from dialogpt_ds.errors import RunError
from dialogpt_ds.order.batches import RankSlice, RankStep, rank_step
from dialogpt_ds.order.mixture import Mixture, MixtureKey, MixturePosition
from dialogpt_ds.order.windows import BadBlock, BadBlocksError
from dialogpt_ds.shards.reader import ShardDirectory

STEPS_AHEAD = 4
"""Optimizer steps that each worker holds ready."""


@dataclass(frozen=True)
class Failure:
    """Why a rank has no batch for a step; takes the place of the step, so that all ranks can agree on what to do."""

    message: str
    bad_blocks: tuple[BadBlock, ...] = ()
    """Blocks that can't be read, where that is the reason."""


class _Steps(IterableDataset[RankStep | Failure]):
    """A rank's share of every optimizer step from a position on. Of n workers, worker k makes the steps k, k + n, k + 2n, ..."""

    def __init__(
        self, directories: Sequence[ShardDirectory], key: MixtureKey, share: RankSlice, position: MixturePosition, padding_id: int
    ) -> None:
        self.directories, self.key, self.share = directories, key, share
        self.position, self.padding_id = position, padding_id

    def __iter__(self) -> Iterator[RankStep | Failure]:
        info = get_worker_info()
        if info is not None:
            ignore_in_child()
        mine, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        stream = Mixture(self.directories, self.key, self.position.skipped)
        position = self.position
        try:
            for step in itertools.count():
                if step % workers != mine:
                    position = stream.skip(position, self.share.global_rows)
                    continue
                batch = stream.batch(position, self.share.global_rows)
                position = batch.position_after
                yield rank_step(batch, self.share, stream.row_length, self.padding_id)
        except BadBlocksError as error:
            yield Failure(str(error), tuple(error.blocks))
        except (RunError, OSError) as error:
            yield Failure(str(error))


def step_batches(
    directories: Sequence[ShardDirectory],
    key: MixtureKey,
    share: RankSlice,
    position: MixturePosition,
    padding_id: int,
    workers: int,
) -> Iterator[RankStep | Failure]:
    """Yield this rank's share of one optimizer step after the other, without end, or the reason why there is none.

    Args:
        directories: shard directories, one for each source of `key`.
        key: of the order.
        share: this rank's rows of a global batch.
        position: the first row.
        padding_id: token that fills rows up.
        workers: processes that prepare batches; 0 does it here.
    """
    loader = DataLoader(
        _Steps(directories, key, share, position, padding_id),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=STEPS_AHEAD if workers else None,
        multiprocessing_context="fork" if workers else None,  # a worker inherits the open shards
        # No thread of torch's that pins: it waits for the rest of a message for ever where a worker is killed in the middle of one.
        pin_memory=False,
    )
    try:
        yield from _iterate(loader)
    except RuntimeError as error:  # torch's word for a worker that was killed
        yield Failure(
            f"a data loading process ended: {error}. Was it killed for want of memory? --loader_workers 0 needs the least."
        )


def _iterate(loader: DataLoader[RankStep | Failure]) -> Iterator[RankStep | Failure]:
    """Yield from a loader; the death of one of its processes is raised as RuntimeError here and nowhere else.

    torch sets a signal handler that raises wherever the rank happens to be, be it in the middle of a collective that the others then
    wait in. Without any, a process that is killed while it writes leaves a reader that waits for the rest of the message for ever.
    """
    handler_before = signal.getsignal(signal.SIGCHLD)
    iterator = iter(loader)
    processes = getattr(iterator, "_workers", [])
    asking = False

    def check() -> None:
        for process in processes:
            if process.exitcode not in (None, 0):
                raise RuntimeError(f"process {process.pid} has exit code {process.exitcode}")

    def on_death(*_: Any) -> None:
        if asking:
            check()

    if processes:
        signal.signal(signal.SIGCHLD, on_death)
    try:
        while True:
            asking = True  # before the look at them: a death in between is either seen or signalled
            check()
            item = next(iterator, None)
            asking = False
            if item is None:
                return
            yield item
    finally:
        asking = False
        if processes:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if handler_before is None else handler_before)
