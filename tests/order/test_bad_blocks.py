"""Blocks that can't be read: found with their place, and left out on every rank from the same row on."""

import shutil
from collections import Counter
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from dialogpt_ds.errors import RunError
from dialogpt_ds.order.mixture import MixturePosition, order_state, position_from_state
from dialogpt_ds.order.position import Position, SkippedBlock
from dialogpt_ds.order.windows import BadBlocksError
from dialogpt_ds.shards.reader import ShardDirectory
from tests.helpers.damage import damage_member
from tests.helpers.streams import (
    contents,
    directory_of,
    epoch_rows,
    examples_in,
    first_rows,
    ids_of_block,
    key_of,
    mixture_of,
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> ShardDirectory:
    """300 examples in 30 blocks, windows of 4."""
    return directory_of(tmp_path_factory.mktemp("order"), 300, 10, 20_000)


def copy_of(directory: ShardDirectory, folder: Path) -> ShardDirectory:
    shutil.copytree(directory.folder, folder)
    return ShardDirectory.open(str(folder), "test")


def skipping(*blocks: tuple[int, Position]) -> tuple[tuple[SkippedBlock, ...], ...]:
    return (tuple(SkippedBlock(block, since) for block, since in blocks),)


def test_a_block_skipped_before_its_window_is_as_if_it_had_never_been_there(directory: ShardDirectory) -> None:
    lost = ids_of_block(directory, 7)
    rows = epoch_rows(mixture_of([directory], skipped=skipping((7, Position()))))
    assert examples_in(rows) == dict.fromkeys(set(range(1, 301)) - lost, 1)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 200),
    st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True),
    st.booleans(),
    st.integers(1, 7),
)
def test_blocks_skipped_at_any_row_leave_all_other_examples_in_their_place(
    directory: ShardDirectory, row: int, which: list[int], packed: bool, batch_rows: int
) -> None:
    """From any row on, blocks of the window that the row lies in are lost: what else is in an epoch comes exactly
    once."""
    key = key_of([directory], packed=packed)
    whole = epoch_rows(mixture_of([directory], key))
    row %= len(whole)
    here = (
        mixture_of([directory], key).batch(MixturePosition.start(), row).position_after
        if row
        else MixturePosition.start()
    )
    since = here.sources[0]
    segment = mixture_of([directory], key).batch(here, 1).rows.segments[0]
    blocks = sorted({int(segment.window.blocks[i % len(segment.window.blocks)]) for i in which})
    skipped = skipping(*((block, since) for block in blocks))
    state = order_state(key, MixturePosition(row, here.sources, skipped))
    position = position_from_state(state, key)
    assert position.skipped == skipped
    lost = set().union(*(ids_of_block(directory, block) for block in blocks))
    rows, place = [], position
    while place.sources[0].epoch == 0:
        batch = mixture_of([directory], key, place.skipped).batch(place, batch_rows)  # resumed at every step
        rows += [
            tokens
            for tokens, (segment_of, _) in zip(contents(batch), batch.rows, strict=True)
            if segment_of.plan.epoch == 0
        ]
        place = batch.position_after
    before, after = Counter(examples_in(whole[:row])), examples_in(rows)
    assert not lost & set(after), "nothing of a lost block is trained on any more"
    assert all(any(tokens) for tokens in rows), "no row is empty"
    rest_of_window = whole[row : row + segment.window.num_rows - segment.start]
    emptied = any(set(examples_in([tokens])) <= lost for tokens in rest_of_window)
    for example in set(range(1, 301)) - lost:
        seen = before[example] + after[example]
        assert seen == 1 or (emptied and seen > 1), (
            "no other example is lost, and none is repeated but in place of an emptied row"
        )
    assert rows == first_rows(mixture_of([directory], key, skipped), len(rows), position), "whatever the batches"


def test_rows_that_lose_all_their_examples_are_replaced_so_that_the_window_keeps_its_length(
    directory: ShardDirectory,
) -> None:
    """Without packing every row of a lost block is empty; another row of the window takes its place."""
    key = key_of([directory], packed=False)
    plan = mixture_of([directory], key).streams[0]._epoch(0)
    block, other = int(plan.blocks[1]), plan.blocks[[0, 2, 3]]
    stream = mixture_of([directory], key, skipping((block, Position(0, 0, 5)))).streams[0]
    assert stream.window_rows(0, 0) == 40
    rows = first_rows(mixture_of([directory], key, skipping((block, Position(0, 0, 5)))), 40)
    substitutes = [n for n, count in examples_in(rows[5:]).items() if count == 2]
    lost = 10 - len(ids_of_block(directory, block) & set(examples_in(first_rows(mixture_of([directory], key), 5))))
    assert len(substitutes) == lost > 5
    assert set(substitutes) <= set().union(*(ids_of_block(directory, int(b)) for b in other))


def test_a_window_without_any_block_left_is_passed_over(directory: ShardDirectory) -> None:
    plan = mixture_of([directory]).streams[0]._epoch(0)
    gone = [int(block) for block in plan.blocks[4:8]]
    rows = epoch_rows(mixture_of([directory], skipped=skipping(*((block, Position()) for block in gone))))
    lost = set().union(*(ids_of_block(directory, block) for block in gone))
    assert examples_in(rows) == dict.fromkeys(set(range(1, 301)) - lost, 1)
    everything = skipping(*((block, Position()) for block in range(directory.num_blocks)))
    with pytest.raises(RunError, match="no block of it can be read any more"):
        epoch_rows(mixture_of([directory], skipped=everything))


@pytest.mark.parametrize(
    ("member", "shape_lost"), [("tokens.npy", False), ("turn_lengths.npy", True), ("turn_weights.npy", True)]
)
def test_damage_is_reported_with_file_member_offset_and_checksums(
    directory: ShardDirectory, tmp_path: Path, member: str, shape_lost: bool
) -> None:
    copy = copy_of(directory, tmp_path / "copy")
    file, offset = damage_member(copy, 12, member)
    with pytest.raises(BadBlocksError) as caught:
        epoch_rows(mixture_of([copy]))
    (bad,) = caught.value.blocks
    assert (bad.block, bad.shape_lost) == (12, shape_lost)
    assert bad.message.startswith(f"shard {file}, block 12, member 00000012.{member}, offset {offset:,}: checksum ")
    expected = int(copy.index.crc32[12, ["tokens.npy", "turn_lengths.npy", "turn_weights.npy"].index(member)])
    assert f", expected {expected:08x}; " in bad.message


def test_all_unreadable_blocks_of_a_window_are_reported_at_once(directory: ShardDirectory, tmp_path: Path) -> None:
    copy = copy_of(directory, tmp_path / "copy")
    plan = mixture_of([copy]).streams[0]._epoch(0)
    gone = sorted(int(block) for block in plan.blocks[:4])
    for block in gone[1:]:
        damage_member(copy, block, "tokens.npy")
    with pytest.raises(BadBlocksError) as caught:
        epoch_rows(mixture_of([copy]))
    assert sorted(bad.block for bad in caught.value.blocks) == gone[1:]


@pytest.mark.parametrize("what", ["vanished", "truncated"])
def test_a_shard_that_goes_away_or_shrinks_under_an_open_run(
    directory: ShardDirectory, tmp_path: Path, what: str
) -> None:
    """Reading beyond the end of a mapped file would kill the process; its size is looked at first."""
    copy = copy_of(directory, tmp_path / "copy")
    stream = mixture_of([copy])
    epoch_rows(stream)
    shard = copy.folder / "shard-000001.tar"
    if what == "vanished":
        shard.unlink()
        message = f"shard {shard}, block \\d+ can't be opened: .*No such file"
    else:
        with open(shard, "r+b") as file:
            file.truncate(512)
        message = (
            f"shard {shard}, block \\d+ can't be opened: it has 512 bytes, expected "
            f"{copy.manifest.shardlist[1].filesize:,}"
        )
    with pytest.raises(BadBlocksError, match=message) as caught:
        epoch_rows(stream, epochs=2)
    assert all(copy.index.shard[bad.block] == 1 for bad in caught.value.blocks)
