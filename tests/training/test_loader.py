"""A run is stopped and gone on with at another number of ranks, accumulation and loader workers: one and the same
rows."""

import subprocess
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest

from dialogpt_ds.order.batches import MicroBatch, RankSlice, RankStep
from dialogpt_ds.order.mixture import MixtureKey, MixturePosition, order_state, position_from_state
from dialogpt_ds.shards.reader import ShardDirectory
from dialogpt_ds.training.data import step_batches
from tests.conftest import ROOT
from tests.helpers.streams import EOS, Row, directory_of, epoch_rows, first_rows, key_of, mixture_of

GLOBAL_ROWS = 24


@dataclass(frozen=True)
class Stage:
    """A part of a run. `rows` is a run's global batch; the same training has the same one everywhere."""

    ranks: int
    accumulation: int
    workers: int
    steps: int
    rows: int = GLOBAL_ROWS


def rows_of_stage(
    directories: list[ShardDirectory], key: MixtureKey, stage: Stage, position: MixturePosition
) -> tuple[list[Row], MixturePosition]:
    """Run all ranks of a stage with real loader processes, and put the rows of their micro-batches together."""
    micro = stage.rows // (stage.ranks * stage.accumulation)
    assert micro * stage.ranks * stage.accumulation == stage.rows
    rows: dict[int, Row] = {}
    positions = set()
    for rank in range(stage.ranks):
        share = RankSlice(rank, stage.ranks, micro, stage.accumulation)
        steps = step_batches(directories, key, share, position, EOS, stage.workers)
        for number, step in enumerate(islice(steps, stage.steps)):
            assert isinstance(step, RankStep), step
            assert step.num_rows == stage.rows
            for part, micro_batch in enumerate(step.micro_batches):
                for place, tokens in zip(share.rows(part), micro_batch.input_ids.tolist(), strict=True):
                    assert number * stage.rows + place not in rows, "no row goes to two ranks"
                    rows[number * stage.rows + place] = tuple(tokens)
        positions.add(step.position_after)
    assert len(positions) == 1, "the state is equal on all ranks"
    return [rows[place] for place in range(len(rows))], positions.pop()


def check(directories: list[ShardDirectory], key: MixtureKey, stages: list[Stage]) -> MixturePosition:
    """Run stages one after the other, each from the state that the one before has saved; returns the last position."""
    position, rows = MixturePosition.start(len(directories)), []
    for stage in stages:
        more, position = rows_of_stage(directories, key, stage, position_from_state(order_state(key, position), key))
        rows += more
    assert rows == first_rows(mixture_of(directories, key), len(rows))
    return position


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> ShardDirectory:
    """2,000 examples in windows of 40: about 16 rows each, so that a global batch spans windows."""
    return directory_of(tmp_path_factory.mktemp("order"), 2_000, 10, 60_000)


SCENARIOS = {
    "1, 2, 3, 4 and 8 ranks": [
        Stage(1, 1, 1, 2),
        Stage(2, 1, 1, 2),
        Stage(3, 1, 1, 2),
        Stage(4, 1, 1, 2),
        Stage(8, 1, 1, 2),
    ],
    "8, 4, 3, 2 and 1 ranks": [
        Stage(8, 3, 1, 1),
        Stage(4, 2, 1, 2),
        Stage(3, 4, 1, 1),
        Stage(2, 6, 1, 2),
        Stage(1, 24, 1, 2),
    ],
    "other accumulation": [Stage(2, 1, 1, 2), Stage(2, 2, 1, 2), Stage(2, 4, 1, 2), Stage(2, 12, 1, 2)],
    "other numbers of loader workers": [Stage(2, 1, 0, 3), Stage(2, 1, 1, 3), Stage(2, 1, 2, 3), Stage(2, 1, 3, 4)],
    "two resumes within one epoch": [Stage(2, 1, 1, 3), Stage(2, 1, 1, 3), Stage(2, 1, 1, 3)],
    "a resume after every step": [Stage(2, 1, 0, 1)] * 12,
    "over three epochs": [Stage(2, 1, 1, 40), Stage(4, 1, 2, 40), Stage(3, 1, 0, 40)],
    "another global batch": [Stage(2, 1, 1, 3, rows=8), Stage(3, 2, 2, 3, rows=30), Stage(1, 1, 0, 3, rows=7)],
}


@pytest.mark.parametrize("stages", SCENARIOS.values(), ids=SCENARIOS.keys())
def test_the_rows_go_on_exactly(directory: ShardDirectory, stages: list[Stage]) -> None:
    position = check([directory], key_of([directory]), stages)
    if len(stages) == 3 and stages[0].steps == 40:
        assert position.sources[0].epoch >= 2


def test_a_resume_at_step_0(directory: ShardDirectory) -> None:
    key = key_of([directory])
    start = MixturePosition.start()
    assert position_from_state(order_state(key, start), key) == start
    check([directory], key, [Stage(4, 1, 1, 2)])


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("before_the_end", [1, 0], ids=["before the last row of a window", "at the end of a window"])
def test_a_resume_around_a_windows_last_row(directory: ShardDirectory, ranks: int, before_the_end: int) -> None:
    key = key_of([directory])
    rows = mixture_of([directory], key).streams[0].window_rows(0, 0)
    first = Stage(1, 1, 1, 1, rows=rows - before_the_end)
    _, position = rows_of_stage([directory], key, first, MixturePosition.start())
    place = position.sources[0]
    assert (place.window, place.row) == ((0, rows - 1) if before_the_end else (1, 0))
    check([directory], key, [first, Stage(ranks, 1, 1, 3)])


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_a_resume_exactly_at_the_epoch_boundary(directory: ShardDirectory, ranks: int) -> None:
    key = key_of([directory])
    rows = len(epoch_rows(mixture_of([directory], key)))
    whole = Stage(1, 1, 1, 1, rows=rows)
    _, position = rows_of_stage([directory], key, whole, MixturePosition.start())
    assert (position.sources[0].epoch, position.sources[0].window, position.sources[0].row) == (1, 0, 0)
    check([directory], key, [whole, Stage(ranks, 1, 1, 3)])


def test_one_shard_of_one_block_and_many_ranks(tmp_path: Path) -> None:
    directory = directory_of(tmp_path / "one", 60, 1_000, 1 << 20)
    assert (len(directory.manifest.shardlist), directory.num_blocks) == (1, 1), (
        "smaller than a window, fewer blocks than ranks"
    )
    check([directory], key_of([directory], window=64), [Stage(8, 1, 1, 5), Stage(3, 2, 1, 5)])


def test_a_mixture_goes_on_exactly(directory: ShardDirectory, tmp_path: Path) -> None:
    directories = [directory, directory_of(tmp_path / "second", 90, 10, 60_000, seed=1, first_id=10_000)]
    check(directories, key_of(directories, (3, 1)), SCENARIOS["1, 2, 3, 4 and 8 ranks"])
    check(directories, key_of(directories, (2, 5)), SCENARIOS["other numbers of loader workers"])


def contents(micro_batch: MicroBatch) -> dict[str, object]:
    return {name: value if isinstance(value, int) else value.tolist() for name, value in vars(micro_batch).items()}


def test_pinning_keeps_every_value(directory: ShardDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Page-locked memory needs a GPU's driver; what is checked here is that nothing is lost on the way."""
    import torch

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
    step = next(step_batches([directory], key_of([directory]), RankSlice(0, 1, 4, 2), MixturePosition.start(), EOS, 0))
    assert isinstance(step, RankStep)
    pinned = step.pin_memory()
    for before, after in zip(step.micro_batches, pinned.micro_batches, strict=True):
        assert torch.is_tensor(after.input_ids)
        assert torch.is_tensor(after.example_starts)
        assert contents(before) == contents(after)
    assert pinned.position_after == step.position_after


@pytest.mark.parametrize("moment", ["half", "between"])
def test_a_killed_worker_is_noticed_beside_a_gpu(directory: ShardDirectory, moment: str) -> None:
    """torch's thread that pins memory would wait for the rest of a message for ever, and the rank for the thread."""
    command = [sys.executable, "-m", "tests.ranks.killed_loader", str(directory.folder), moment]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "a data loading process ended: " in done.stdout
    assert "--loader_workers 0 needs the least" in done.stdout
