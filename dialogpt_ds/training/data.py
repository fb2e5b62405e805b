"""The rows that a run trains on: where it is in them, who prepares them, and what all ranks do about a block that can't
be read."""

import itertools
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dialogpt_ds.distributed.collectives import gather_reports
from dialogpt_ds.distributed.stop_requests import ignore_in_child
from dialogpt_ds.errors import RunError
from dialogpt_ds.order.batches import RankSlice, RankStep, rank_step
from dialogpt_ds.order.mixture import Mixture, MixtureKey, MixturePosition
from dialogpt_ds.order.position import Position, SkippedBlock
from dialogpt_ds.order.windows import BadBlock, BadBlocksError
from dialogpt_ds.shards.reader import ShardDirectory
from dialogpt_ds.training.settings import Settings

SHOWN_BLOCKS = 5
STEPS_AHEAD = 4
"""Optimizer steps that each worker holds ready."""


@dataclass(frozen=True)
class Failure:
    """Why a rank has no batch for a step; takes the place of the step, so that all ranks can agree on what to do."""

    message: str
    bad_blocks: tuple[BadBlock, ...] = ()
    """Blocks that can't be read, where that is the reason."""


class TrainingData:
    """The steps of a run, from a position on."""

    def __init__(self, settings: Settings, position: MixturePosition, device: torch.device) -> None:
        self.settings = settings
        self.position = position
        """The next row to be trained on: what a checkpoint keeps."""
        self._device = device
        self._batches: Iterator[RankStep | Failure] | None = None
        self._ahead: RankStep | Failure | None = None
        self._nobody_failed = False
        self.seconds_waited = 0.0
        """How long this rank has waited for rows since a step was asked for."""

    @property
    def num_skipped_blocks(self) -> int:
        """Blocks skipped so far because they can't be read."""
        return sum(len(blocks) for blocks in self.position.skipped)

    @property
    def num_skipped_examples(self) -> int:
        """Examples in those blocks: what each further epoch lacks."""
        directories = self.settings.directories
        return sum(
            int(directories[n].index.examples[s.block]) for n, skips in enumerate(self.position.skipped) for s in skips
        )

    def next_step(self) -> tuple[RankStep, list[str]]:
        """Return this rank's share of the next optimizer step, and notes for the user. Collective: every rank must
        call.

        A rank that can't read its rows says so before anybody computes. Then all stop with its message, or all leave
        out the same blocks from the same row on and ask again.

        Raises:
            RunError: on every rank, with the message of the lowest rank that has one.
        """
        said: list[str] = []
        self.seconds_waited = 0.0
        while True:
            known, outcome = self._nobody_failed, self._ahead or self._draw()
            self._ahead, self._nobody_failed = None, False
            failures = [] if known else gather_reports(outcome if isinstance(outcome, Failure) else None, self._device)
            if not failures:
                assert isinstance(outcome, RankStep)
                self.position = outcome.position_after
                return outcome, said
            said.append(self._skip_or_stop(failures))

    def look_ahead(self) -> bool:
        """Get this rank's share of the step after the one that the device is at work on; returns whether it can't be
        had.

        Where all ranks tell each other so, and hear of none that can't (nobody_failed), next_step() need not ask them.
        """
        if self._ahead is None:
            self._ahead = self._draw()
        return isinstance(self._ahead, Failure)

    def nobody_failed(self) -> None:
        """Say that look_ahead() was False on every rank."""
        self._nobody_failed = self._ahead is not None

    def _draw(self) -> RankStep | Failure:
        if self._batches is None:
            self._batches = self._start()
        started = time.perf_counter()
        outcome = next(self._batches)
        self.seconds_waited += time.perf_counter() - started
        if isinstance(outcome, RankStep) and self._device.type == "cuda":
            return outcome.pin_memory()  # from there a copy to the device needs no stop
        return outcome

    def close(self) -> None:
        """End the loader's processes."""
        self._batches = self._ahead = None
        self._nobody_failed = False

    def _start(self) -> Iterator[RankStep | Failure]:
        settings = self.settings
        return step_batches(
            settings.directories, settings.order_key, settings.share, self.position, settings.train.manifest.eos_id,
            settings.arguments.loader_workers,
        )  # fmt: skip

    def _skip_or_stop(self, failures: Sequence[Failure]) -> str:
        fatal = [failure for failure in failures if not failure.bad_blocks]
        bad = {(b.source, b.block): b for failure in failures for b in failure.bad_blocks}
        # One rank may have lost more of a block than another.
        for failure in failures:
            for block in failure.bad_blocks:
                if block.shape_lost:
                    bad[block.source, block.block] = block
        blocks = [bad[place] for place in sorted(bad)]
        if fatal:
            raise RunError(fatal[0].message)
        if self.settings.arguments.on_bad_block == "stop":
            raise RunError(
                f"{_messages(blocks)}\n"
                "The last complete checkpoint is untouched: mend the data and start the same command again, or give "
                "--on_bad_block skip to train without what can't be read."
            )
        self.close()
        self.position = self._without(blocks)
        directories = self.settings.directories
        examples = sum(int(directories[b.source].index.examples[b.block]) for b in blocks)
        return (
            f"warning: {len(blocks):,} of {sum(d.num_blocks for d in directories):,} blocks can't be read and are "
            f"skipped from here on, {examples:,} examples; {self.num_skipped_blocks:,} blocks with "
            f"{self.num_skipped_examples:,} examples in all:\n"
            f"{_messages(blocks)}"
        )

    def _without(self, blocks: Sequence[BadBlock]) -> MixturePosition:
        """Return the same position with `blocks` left out: from the next row on, or, where the plan of the window is
        lost with them, from the window's first row on. Then the window is planned anew, and some of its examples come
        twice or not at all this time."""
        skipped = [list(skips) for skips in self.position.skipped]
        for bad in blocks:
            here = self.position.sources[bad.source]
            since = Position(here.epoch, here.window, 0) if bad.shape_lost else here
            skipped[bad.source] = [skip for skip in skipped[bad.source] if skip.block != bad.block]
            skipped[bad.source].append(SkippedBlock(bad.block, since))
        return replace(self.position, skipped=tuple(tuple(skips) for skips in skipped))


def _messages(blocks: Sequence[BadBlock]) -> str:
    lines = [block.message for block in blocks[:SHOWN_BLOCKS]]
    if len(blocks) > SHOWN_BLOCKS:
        lines.append(f"... and {len(blocks) - SHOWN_BLOCKS:,} more")
    return "\n".join(lines)


class _Steps(IterableDataset[RankStep | Failure]):
    """A rank's share of every optimizer step from a position on. Of n workers, worker k makes the steps k, k + n, k +
    2n, ..."""

    def __init__(
        self,
        directories: Sequence[ShardDirectory],
        key: MixtureKey,
        share: RankSlice,
        position: MixturePosition,
        padding_id: int,
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
        # No thread of torch's that pins: it waits for the rest of a message for ever where a worker is killed in the
        # middle of one.
        pin_memory=False,
    )
    try:
        yield from _iterate(loader)
    except RuntimeError as error:  # torch's word for a worker that was killed
        yield Failure(
            f"a data loading process ended: {error}. Was it killed for want of memory? --loader_workers 0 needs the "
            "least."
        )


def _iterate(loader: DataLoader[RankStep | Failure]) -> Iterator[RankStep | Failure]:
    """Yield from a loader; the death of one of its processes is raised as RuntimeError here and nowhere else.

    torch sets a signal handler that raises wherever the rank happens to be, be it in the middle of a collective that
    the others then wait in. Without any, a process that is killed while it writes leaves a reader that waits for the
    rest of the message for ever.
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
