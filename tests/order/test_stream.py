"""The stream of rows: the same for any number of ranks, resumable at any row, every example once per epoch."""

import hashlib

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from dialogpt_ds.errors import UserError
from dialogpt_ds.order.batches import IGNORED_LABEL, RankSlice, padding_rows, rank_step
from dialogpt_ds.order.mixture import MixturePosition, order_state, position_from_state
from dialogpt_ds.order.position import OrderKey, Position
from dialogpt_ds.order.windows import epoch_blocks
from dialogpt_ds.shards.manifest import Index
from dialogpt_ds.shards.reader import ShardDirectory
from tests.helpers.streams import (
    EOS,
    ROW,
    contents,
    directory_of,
    epoch_rows,
    examples_in,
    first_rows,
    key_of,
    mixture_of,
)

START = MixturePosition.start()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> ShardDirectory:
    return directory_of(tmp_path_factory.mktemp("order"), 300, 10, 20_000)


def test_the_fixture_has_several_shards_and_windows(directory: ShardDirectory) -> None:
    assert len(directory.manifest.shardlist) > 3
    assert mixture_of([directory]).streams[0].num_windows() > 5


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 60),
    st.integers(1, 12),
    st.integers(5_000, 60_000),
    st.integers(1, 8),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_every_example_is_in_an_epoch_exactly_once(
    tmp_path_factory: pytest.TempPathFactory,
    count: int,
    per_block: int,
    shard_bytes: int,
    window: int,
    packed: bool,
    seed: int,
) -> None:
    directory = directory_of(tmp_path_factory.mktemp("any"), count, per_block, shard_bytes, seed)
    rows = epoch_rows(mixture_of([directory], key_of([directory], seed=seed, window=window, packed=packed)))
    assert examples_in(rows) == dict.fromkeys(range(1, count + 1), 1), "each example in one row"
    if not packed:
        assert len(rows) == count


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 50), st.integers(1, 9), st.integers(1, 6), st.integers(0, 2**31),
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)), min_size=1,
             max_size=4),
)  # fmt: skip
def test_whatever_the_stops_and_sizes_the_ranks_together_see_one_stream(
    tmp_path_factory: pytest.TempPathFactory,
    count: int,
    per_block: int,
    window: int,
    seed: int,
    stages: list[tuple[int, int, int, int]],
) -> None:
    """Each stage is a run of (world size, accumulation, micro-batch rows, steps) that goes on from the state of the one
    before."""
    directory = directory_of(tmp_path_factory.mktemp("any"), count, per_block, 8_000, seed)
    key = key_of([directory], seed=seed, window=window)
    position, rows = START, []
    for world, accumulation, micro, steps in stages:
        position = position_from_state(order_state(key, position), key)
        after = set()
        shares = [RankSlice(rank, world, micro, accumulation) for rank in range(world)]
        by_rank = []
        for share in shares:
            place, mine = position, []
            stream = mixture_of([directory], key)
            for _ in range(steps):
                step = rank_step(stream.batch(place, share.global_rows), share, ROW, EOS)
                place = step.position_after
                mine.append(step)
            after.add(place)
            by_rank.append(mine)
        assert len(after) == 1, "the state is equal on all ranks"
        position = after.pop()
        for step in range(steps):
            whole: dict[int, tuple[int, ...]] = {}
            for share, made in zip(shares, by_rank, strict=True):
                for number, micro_batch in enumerate(made[step].micro_batches):
                    for row, tokens in zip(share.rows(number), micro_batch.input_ids.tolist(), strict=True):
                        assert row not in whole
                        whole[row] = tuple(tokens)
            rows += [whole[row] for row in range(len(whole))]
    assert rows == first_rows(mixture_of([directory], key), len(rows))
    assert position.row == len(rows)


def test_resuming_at_every_row_of_two_epochs_gives_the_rest(directory: ShardDirectory) -> None:
    rows = epoch_rows(mixture_of([directory]), epochs=2)
    position, number = START, 0
    crossings = set()
    while position.sources[0].epoch < 2:
        fresh = mixture_of([directory]).batch(position, 1)
        assert contents(fresh) == [rows[number]]
        here, after = position.sources[0], fresh.position_after.sources[0]
        if (after.epoch, after.window) != (here.epoch, here.window):
            assert after.row == 0, "the end of a window is the start of the next: one name per place"
            crossings.add(after)
        position, number = fresh.position_after, number + 1
    assert number == len(rows)
    assert Position(1, 0, 0) in crossings
    assert rows[: len(rows) // 2] != rows[len(rows) // 2 :], "another epoch, another order"


def test_a_corpus_smaller_than_a_window(tmp_path_factory: pytest.TempPathFactory) -> None:
    small = directory_of(tmp_path_factory.mktemp("small"), 9, 5, 1 << 20)
    stream = mixture_of([small], key_of([small], window=64))
    assert stream.streams[0].num_windows() == 1
    assert examples_in(epoch_rows(stream)) == dict.fromkeys(range(1, 10), 1)


def test_the_blocks_of_an_epoch_are_each_once_in_groups_of_shards_and_never_change() -> None:
    """Golden value: another order for the same seed needs another ORDER_VERSION."""
    shard = np.repeat(np.arange(20, dtype=np.int32), 7)
    blank = np.zeros(len(shard))
    index = Index(shard, blank, blank, blank, blank, blank, blank, blank)
    key = OrderKey("f", 42, 128, 64, True)
    blocks = epoch_blocks(index, 20, key, 1)
    assert sorted(blocks) == list(range(140))
    first_group = set(shard[blocks[: 8 * 7]])
    assert len(first_group) == 8, "eight shards serve the first blocks"
    assert hashlib.sha256(blocks.astype("<i8").tobytes()).hexdigest()[:16] == "c0eee98166690c5d"


@pytest.mark.parametrize("packed", [True, False])
def test_skipping_over_rows_ends_where_taking_them_does(directory: ShardDirectory, packed: bool) -> None:
    key = key_of([directory], packed=packed)
    stream, position = mixture_of([directory], key), START
    for rows in (1, 5, 30, 64, 200, 3):
        after = stream.batch(position, rows).position_after
        assert mixture_of([directory], key).skip(position, rows) == after
        position = after


def test_facts_of_a_step_are_those_of_its_rows(directory: ShardDirectory) -> None:
    batch = mixture_of([directory]).batch(START, 37)
    micro = rank_step(batch, RankSlice(0, 1, 37, 1), ROW, EOS).micro_batches[0]
    real = micro.labels != IGNORED_LABEL
    assert batch.rows.num_targets == real.sum()
    assert batch.rows.weight_sum == pytest.approx(micro.weights.sum(), rel=1e-6)
    assert (micro.weights[~real] == 0).all()
    padded = [segment.window.row_tokens[number] < ROW for segment, number in batch.rows]
    # Positions start at 0 in each example, and once more where a row's padding begins.
    assert batch.rows.num_examples == (micro.position_ids == 0).sum() - sum(padded)


def test_labels_follow_their_places_and_positions_restart_with_each_example(directory: ShardDirectory) -> None:
    micro = rank_step(mixture_of([directory]).batch(START, 20), RankSlice(0, 1, 20, 1), ROW, EOS).micro_batches[0]
    real = micro.labels != IGNORED_LABEL
    flat, positions = micro.input_ids.ravel(), micro.position_ids.ravel()
    assert (flat[micro.target_places[real] + 1] == micro.labels[real]).all()
    assert (positions[micro.target_places[real] + 1] == positions[micro.target_places[real]] + 1).all(), "same example"
    assert len(micro.labels) % 128 == 0
    # Three turns to an example, each ending with EOS: the turn number goes up by one behind each EOS inside of an
    # example.
    turns = micro.turn_ids.ravel()
    inside = np.flatnonzero(positions[1:] > 0)
    text = inside[(flat[inside] != EOS) | (flat[inside + 1] != EOS)]  # not in the padding, which is EOS after EOS
    assert (turns[text + 1] - turns[text] == (flat[text] == EOS)).all()


def test_the_epoch_counts_examples(directory: ShardDirectory) -> None:
    stream, position, seen = mixture_of([directory]), START, 0
    while position.sources[0].epoch == 0:
        batch = stream.batch(position, 1)
        seen += batch.rows.num_examples
        assert batch.fractional_epoch == pytest.approx(seen / 300)
        assert batch.epoch == 0
        position = batch.position_after
    assert seen == 300
    assert stream.batch(position, 1).epoch == 1


def test_a_corpus_of_fewer_rows_than_a_global_batch_is_refused(directory: ShardDirectory) -> None:
    stream = mixture_of([directory])
    rows = len(epoch_rows(stream))
    stream.check_size(rows, "--train_input_file")
    with pytest.raises(
        UserError, match=f"gives {rows:,} rows of 32 tokens, fewer than the {rows + 1:,} rows that one optimizer step"
    ):
        stream.check_size(rows + 1, "--train_input_file")


def test_a_position_belongs_to_its_order(directory: ShardDirectory) -> None:
    key = key_of([directory])
    position = MixturePosition(77, (Position(3, 2, 1),), ((),))
    state = order_state(key, position)
    assert position_from_state(state, key) == position
    with pytest.raises(UserError, match=r"seed: checkpoint 1, now 2"):
        position_from_state(state, key_of([directory], seed=2))
    with pytest.raises(UserError, match=r"order_version: checkpoint 0, now 1"):
        position_from_state(state | {"order_version": 0}, key)
    other = state | {"sources": [state["sources"][0] | {"fingerprint": "another"}]}
    with pytest.raises(
        UserError, match=r"data as weight:fingerprint: checkpoint 1:another, now 1:" + key.sources[0].fingerprint[:12]
    ):
        position_from_state(other, key)


def test_padding_rows_hold_no_target() -> None:
    micro = padding_rows(2, ROW, EOS)
    assert micro.input_ids.shape == (2, ROW)
    assert (micro.labels == IGNORED_LABEL).all()
    assert not micro.weights.any()
