"""The stream of rows: the same for any number of ranks, resumable at any row, every example once per epoch."""

from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from dialogpt_ds.errors import UserError
from dialogpt_ds.order.batches import IGNORED_LABEL, Share, padding_rows, rank_step
from dialogpt_ds.order.position import OrderKey, Position, position_from_state, position_state
from dialogpt_ds.order.stream import GlobalBatch, RowStream
from dialogpt_ds.shards.blocks import make_block
from dialogpt_ds.shards.manifest import Index
from dialogpt_ds.shards.reader import ShardDirectory
from dialogpt_ds.shards.writer import ShardWriter, make_manifest

EOS = 0


def directory_of(folder: Path, num_examples: int, examples_per_block: int, shard_bytes: int, seed: int) -> ShardDirectory:
    """Write made-up examples whose tokens tell which example they are, in small blocks over several shards."""
    random = np.random.default_rng(seed)
    writer = ShardWriter(folder, shard_bytes)
    for start in range(0, num_examples, examples_per_block):
        examples = []
        for number in range(start, min(start + examples_per_block, num_examples)):
            turns = [([number + 1] * int(random.integers(1, 6)) + [EOS], float(random.choice([0.0, 0.5, 1.0]))) for _ in range(3)]
            examples.append([(turns[0][0], 0.0), turns[1], (turns[2][0], 1.0)])
        writer._write(make_block(examples, np.dtype(np.uint16), 32))
    index: Index = writer.finish()
    facts = {"name": "made up", "sha256": "0", "eos_id": EOS, "vocab_size": 60_000, "max_seq_length": 32}
    make_manifest(writer, index, facts, {}).write(folder)
    return ShardDirectory.open(str(folder), "test")


def stream_of(directory: ShardDirectory, seed: int = 1, window_blocks: int = 4, packed: bool = True) -> RowStream:
    return RowStream(directory, OrderKey(directory.manifest.fingerprint, seed, 32, window_blocks, packed))


def contents(stream: RowStream, batch: GlobalBatch) -> list[tuple[int, ...]]:
    """Return each row of a batch as its tokens."""
    step = rank_step(stream, batch, Share(0, 1, batch.num_rows, 1), EOS)
    return [tuple(row) for row in step.micro_batches[0].input_ids.tolist()]


def all_rows(stream: RowStream, epochs: int = 1) -> list[tuple[int, ...]]:
    rows, position = [], Position()
    while position.epoch < epochs:
        batch = stream.batch(position, 1)
        rows += contents(stream, batch)
        position = batch.position_after
    return rows


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> ShardDirectory:
    return directory_of(tmp_path_factory.mktemp("order"), 300, 10, 20_000, seed=0)


def test_the_fixture_has_several_shards_and_windows(directory: ShardDirectory) -> None:
    assert len(directory.manifest.shardlist) > 3
    assert stream_of(directory).batch(Position(), 1).segments[0].plan.num_windows > 5


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
    rows = all_rows(stream_of(directory, seed, window, packed))
    seen = [token for row in rows for token, before in zip(row, (EOS, *row), strict=False) if token != EOS and token != before]
    per_example = {number: len({tuple(row) for row in rows if number in row}) for number in set(seen)}
    assert set(seen) == set(range(1, count + 1))
    assert set(per_example.values()) == {1}, "an example lies in one row"
    if not packed:
        assert len(rows) == count


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(0, 10), st.integers(1, 6))
def test_ranks_and_accumulation_cut_one_and_the_same_stream(
    directory: ShardDirectory, world: int, accumulation: int, micro: int, stop: int, more: int
) -> None:
    stream = stream_of(directory)
    rows = world * accumulation * micro
    position = Position()
    for _ in range(stop):
        position = stream.batch(position, rows).position_after
    batch = stream_of(directory).batch(position, rows)  # a fresh stream: resumed from the position alone
    whole = contents(stream, batch)
    parts: dict[int, tuple[int, ...]] = {}
    for rank in range(world):
        share = Share(rank, world, micro, accumulation)
        step = rank_step(stream, batch, share, EOS)
        for number, micro_batch in enumerate(step.micro_batches):
            for row, tokens in zip(share.rows(number), micro_batch.input_ids.tolist(), strict=True):
                assert row not in parts
                parts[row] = tuple(tokens)
    assert [parts[row] for row in range(rows)] == whole
    # The same rows again at another size: prefix + resumed suffix = whole.
    single, position = [], batch.position_after
    for _ in range(more):
        one = stream.batch(position, 1)
        single += contents(stream, one)
        position = one.position_after
    assert single == contents(stream, stream.batch(batch.position_after, more))


def test_resuming_at_every_row_of_two_epochs_gives_the_rest(directory: ShardDirectory) -> None:
    rows = all_rows(stream_of(directory), epochs=2)
    position, number = Position(), 0
    crossings = set()
    while position.epoch < 2:
        fresh = stream_of(directory).batch(position, 1)
        assert contents(stream_of(directory), fresh) == [rows[number]]
        if (fresh.position_after.epoch, fresh.position_after.window) != (position.epoch, position.window):
            assert fresh.position_after.row == 0, "the end of a window is the start of the next: one name per place"
            crossings.add(fresh.position_after)
        position, number = fresh.position_after, number + 1
    assert number == len(rows)
    assert Position(1, 0, 0) in crossings
    assert rows[: len(rows) // 2] != rows[len(rows) // 2 :], "another epoch, another order"


def test_facts_of_a_step_are_those_of_its_rows(directory: ShardDirectory) -> None:
    stream = stream_of(directory)
    batch = stream.batch(Position(), 37)
    micro = rank_step(stream, batch, Share(0, 1, 37, 1), EOS).micro_batches[0]
    real = micro.labels != IGNORED_LABEL
    assert batch.num_targets == real.sum()
    assert batch.weight_sum == pytest.approx(micro.weights.sum(), rel=1e-6)
    assert (micro.weights[~real] == 0).all()
    padded = [segment.window.row_tokens[number] < 32 for segment, number in batch.rows()]
    # Positions start at 0 in each example, and once more where a row's padding begins.
    assert batch.num_examples == (micro.position_ids == 0).sum() - sum(padded)


def test_labels_follow_their_places_and_positions_restart_with_each_example(directory: ShardDirectory) -> None:
    stream = stream_of(directory)
    micro = rank_step(stream, stream.batch(Position(), 20), Share(0, 1, 20, 1), EOS).micro_batches[0]
    real = micro.labels != IGNORED_LABEL
    flat, positions = micro.input_ids.ravel(), micro.position_ids.ravel()
    assert (flat[micro.target_places[real] + 1] == micro.labels[real]).all()
    assert (positions[micro.target_places[real] + 1] == positions[micro.target_places[real]] + 1).all(), "same example"
    assert len(micro.labels) % 128 == 0


def test_the_epoch_counts_examples(directory: ShardDirectory) -> None:
    stream, position, seen = stream_of(directory), Position(), 0
    while position.epoch == 0:
        batch = stream.batch(position, 1)
        seen += batch.num_examples
        assert batch.fractional_epoch == pytest.approx(seen / 300)
        position = batch.position_after
    assert seen == 300
    assert stream.batch(position, 1).epoch == 1


def test_a_corpus_of_fewer_rows_than_a_global_batch_is_refused(directory: ShardDirectory) -> None:
    stream = stream_of(directory)
    rows = len(all_rows(stream))
    stream.check_size(rows, "--train_input_file")
    with pytest.raises(
        UserError, match=f"gives {rows:,} rows of 32 tokens, fewer than the {rows + 1:,} rows of one optimizer step"
    ):
        stream.check_size(rows + 1, "--train_input_file")


def test_a_position_belongs_to_its_order(directory: ShardDirectory) -> None:
    key = stream_of(directory).key
    state = position_state(key, Position(3, 2, 1))
    assert all(isinstance(value, (int, str, bool)) for value in state.values())
    assert position_from_state(state, key) == Position(3, 2, 1)
    with pytest.raises(UserError, match=r"seed: checkpoint 1, now 2"):
        position_from_state(state, stream_of(directory, seed=2).key)
    with pytest.raises(UserError, match=r"order_version: checkpoint 0, now 1"):
        position_from_state(state | {"order_version": 0}, key)


def test_padding_rows_hold_no_target() -> None:
    micro = padding_rows(2, 32, EOS)
    assert micro.input_ids.shape == (2, 32)
    assert (micro.labels == IGNORED_LABEL).all()
    assert not micro.weights.any()
